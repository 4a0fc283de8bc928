import dataclasses
import datetime
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from lightning_custom import config as config_module
from lightning_custom.config import (
    INVOCATION_FIELDS,
    RunConfig,
    check_unchanged,
    read_config,
    recipe_name,
    stored_fields,
    with_run_dir,
)
from lightning_custom.errors import ConfigError
from lightning_custom.testing import in_processes, single_process
from recipes.maml import MAMLConfig


@dataclass(frozen=True, kw_only=True)
class OwnConfig(RunConfig):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.0, 0.99)
    width: int | None = None


def stored(config: RunConfig) -> dict:
    """As ``config.yaml`` brings it back."""
    return yaml.safe_load(yaml.safe_dump(stored_fields(config)))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(ConfigError, match=f"seed: {seed}; it must be at"):
        RunConfig(seed=seed)


def test_a_word_that_a_field_does_not_know_is_refused_as_on_the_command_line():
    with pytest.raises(ConfigError, match=r"^resume: 'always'; choose one of auto, must, never$"):
        OwnConfig(resume="always")
    # Both would be silent: the inner loop would leave the head alone, and the queries see each other.
    for field, word in (("adapt", "tail"), ("batch_statistics", "suport")):
        with pytest.raises(ConfigError, match=f"^{field}: '{word}'; choose one of "):
            MAMLConfig(**{field: word})


def test_what_belongs_to_one_start_is_not_stored():
    names = {field.name for field in dataclasses.fields(OwnConfig)}
    assert stored_fields(OwnConfig()).keys() == names - INVOCATION_FIELDS
    assert {"run_dir", "resume", "stop_at", "max_time"} <= INVOCATION_FIELDS


def test_an_equal_config_passes_through_its_file():
    config = OwnConfig(lr=1e-5, betas=(0.1, 0.2), width=3)
    check_unchanged(config, stored(config), steps_fixed=True)


@pytest.mark.parametrize(
    "change",
    [
        {"log_every": 7}, {"validate_every": 7}, {"checkpoint_every": 7}, {"keep": 7}, {"accelerator": "cpu"},
        {"devices": 2}, {"num_nodes": 2}, {"strategy": "ddp"}, {"precision": "64-true"}, {"threads": 2},
        {"deterministic": False}, {"resume": "must"}, {"stop_at": 3}, {"max_time": "1h"}, {"run_dir": "there"},
    ],
)  # fmt: skip
def test_run_and_runtime_fields_may_change(change):
    check_unchanged(dataclasses.replace(OwnConfig(), **change), stored(OwnConfig()), steps_fixed=True)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lr": 0.5}, r"lr \(0.001 -> 0.5\)"),
        ({"seed": 1}, r"seed \(0 -> 1\)"),
        ({"betas": (0.0, 0.9)}, r"betas \(\[0.0, 0.99\] -> \(0.0, 0.9\)\)"),
        ({"width": 4}, r"width \(None -> 4\)"),
        ({"lr": 0.5, "width": 4, "keep": 9}, r"another config: lr \(0.001 -> 0.5\), width \(None -> 4\); take"),
    ],
)
def test_other_fields_may_not_and_all_are_listed(change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        check_unchanged(dataclasses.replace(OwnConfig(), **change), stored(OwnConfig()), steps_fixed=False)
    assert "keep" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_steps_may_change_where_no_schedule_reads_them():
    longer = OwnConfig(steps=2000)
    check_unchanged(longer, stored(OwnConfig()), steps_fixed=False)
    with pytest.raises(ConfigError, match=r"steps \(1000 -> 2000\); take the change back, or start afresh"):
        check_unchanged(longer, stored(OwnConfig()), steps_fixed=True)


def test_a_field_newer_than_the_run_is_not_compared():
    older = stored(OwnConfig())
    del older["width"]
    check_unchanged(OwnConfig(width=4), older, steps_fixed=False)


@pytest.mark.parametrize(
    "field, value, least",
    [
        ("steps", -1, 0), ("stop_at", 0, 1), ("seed", -1, 0), ("keep", 0, 1), ("devices", 0, 1), ("num_nodes", 0, 1),
        ("threads", 0, 1), ("log_every", -1, 0), ("validate_every", -5, 0), ("checkpoint_every", -1, 0),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_named(field, value, least):
    with pytest.raises(ConfigError, match=rf"^{field}: {value}; it must be at least {least}$"):
        OwnConfig(**{field: value})
    assert getattr(OwnConfig(**{field: least}), field) == least


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "cannot read .*file.yaml: No such file or directory; give a file that exists"),
        (b"steps: [", "file.yaml is not valid YAML: "),
        (b"\xff\xfe\x00", "file.yaml is not valid YAML: "),
        (b"a: !!python/object/apply:os.getcwd []", "file.yaml is not valid YAML: could not determine a constructor"),
        (b"- 1", "file.yaml must hold 'name: value' lines"),
        (b"", "file.yaml must hold 'name: value' lines"),
    ],
)
def test_a_file_that_is_no_config_is_named_on_one_line(tmp_path, content, words):
    path = tmp_path / "file.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_a_directory_is_no_config(tmp_path):
    with pytest.raises(ConfigError, match="Is a directory"):
        read_config(tmp_path)


class Noon(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2030, 1, 2, 12, 0, 0)


def test_runs_begun_in_one_second_get_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config_module.datetime, "datetime", Noon)
    names = [with_run_dir(single_process(), OwnConfig()).run_dir for _ in range(3)]
    first = "runs/test_config/2030-01-02-120000"
    assert names == [first, f"{first}-2", f"{first}-3"]
    assert all(Path(name).is_dir() for name in names)


def test_a_start_that_writes_nothing_leaves_no_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at_exit = []
    monkeypatch.setattr(config_module.atexit, "register", lambda *call: at_exit.append(call))
    refused, used = (Path(with_run_dir(single_process(), OwnConfig()).run_dir).absolute() for _ in range(2))
    (used / "config.yaml").touch()
    monkeypatch.chdir("/")
    for function, *arguments in at_exit:
        function(*arguments)
    assert (refused.exists(), used.exists()) == (False, True)


def test_a_given_directory_stays():
    assert with_run_dir(single_process(), OwnConfig(run_dir="mine")).run_dir == "mine"


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir: cannot create runs/test_config/.*; choose one with --run_dir"):
        with_run_dir(single_process(), OwnConfig())


def test_the_recipe_is_the_last_word_of_the_configs_module():
    assert recipe_name(OwnConfig) == "test_config"
    assert recipe_name(RunConfig) == "config"


def claim(fabric, folder):
    import os

    os.chdir(folder)
    return with_run_dir(fabric, OwnConfig()).run_dir


@pytest.mark.distributed
def test_process_0_decides_the_directory_for_all(tmp_path):
    first, second = in_processes(claim, 2, str(tmp_path))
    assert first == second
    assert [path.name for path in (tmp_path / "runs" / "test_config").iterdir()] == [Path(first).name]
