import os
import subprocess
import sys
from pathlib import Path

import pytest

# Tensors of more than 32 MiB, which glibc maps afresh each time whatever it has learned of the program.
PROGRAM = """
import resource, torch
from lightning_custom.freed_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(10 * 2**20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

without, kept = faults(), keep_freed_memory()
faults()
print(without, int(kept), faults())
"""


def pages(**environment):
    command = [sys.executable, "-c", PROGRAM]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=variables | environment, check=True, capture_output=True, text=True
    )
    without, kept, with_kept = map(int, done.stdout.split())
    return without, bool(kept), with_kept


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="no glibc")
def test_freed_blocks_are_used_again_without_a_page_fault():
    without, kept, with_kept = pages()
    assert kept
    assert without > 20 * 15  # 20 mappings, of pages of at most 2 MiB
    assert with_kept < without / 20


def test_what_the_environment_asks_of_glibc_stays():
    without, kept, with_kept = pages(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept
    assert with_kept > without / 2
