import pytest
import torch

from lightning_custom.errors import ConfigError
from lightning_custom.parts import WHOLE, parts, require_parts
from lightning_custom.testing import single_process


def test_parts_together_are_the_batch():
    batch = torch.randn(6, 2)
    found = [part.of(batch) for part in parts(3, torch.Generator())]
    assert [len(part) for part in found] == [2, 2, 2]
    assert torch.equal(torch.cat(found), batch)
    assert WHOLE.of(batch) is batch


def test_every_part_draws_the_same_numbers_and_what_follows_is_as_after_one():
    draw, other = (torch.Generator().manual_seed(0) for _ in range(2))
    drawn = [torch.rand(4, generator=draw) for _ in parts(3, draw)]
    assert torch.equal(drawn[0], torch.rand(4, generator=other))
    assert all(torch.equal(numbers, drawn[0]) for numbers in drawn)
    assert torch.equal(torch.rand(4, generator=draw), torch.rand(4, generator=other))


def test_unequal_parts_are_refused():
    require_parts(single_process(), 12, 3)
    with pytest.raises(ConfigError, match=r"accumulate: 5, but batch_size 12 on 1 processes .* multiple of 5"):
        require_parts(single_process(), 12, 5)
