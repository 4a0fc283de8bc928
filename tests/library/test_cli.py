import contextlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_custom.cli import command_line, parse_config
from lightning_custom.errors import CheckpointError, ConfigError
from lightning_custom.run import Run
from lightning_custom.testing import single_process
from tests.library.counting_loop import PRESETS, CountingConfig, CountVerb, run


@pytest.fixture(autouse=True)
def _warnings_as_they_were(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


def parsed(*words: str) -> CountingConfig:
    return parse_config(CountingConfig, words, PRESETS)


def status(*words: str, main: Any = lambda config: None) -> int:
    verbs = {"count": (CountVerb, lambda request: print("counted", request.count))}
    return command_line(CountingConfig, main, presets=PRESETS, verbs=verbs, arguments=words)


def file_with(folder: Path, text: str | bytes) -> str:
    path = folder / "given.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def run_in(folder: Path, **fields: Any) -> str:
    """A run directory with the config of ``fields``."""
    owner = Run(CountingConfig(run_dir=str(folder), **fields))
    owner.open()
    owner.store_config()
    owner.close()
    return str(folder)


# Where a setting comes from


def test_without_arguments_the_first_preset_and_the_defaults_hold():
    assert parsed() == CountingConfig()


def test_every_setting_is_a_flag():
    words = ["--steps", "9", "--stop_at=4", "--max_time", "1h", "--seed", "3", "--resume", "must", "--log_every", "5"]
    words += [
        "--validate_every",
        "6",
        "--checkpoint_every",
        "7",
        "--keep",
        "8",
        "--accelerator",
        "cpu",
        "--devices",
        "2",
    ]
    words += ["--num_nodes", "3", "--strategy", "ddp", "--precision", "64-true", "--deterministic", "false"]
    words += ["--betas", "[0.1, 0.2]", "--loss", "absolute"]
    assert parsed(*words) == CountingConfig(
        steps=9, stop_at=4, max_time="1h", seed=3, resume="must", log_every=5, validate_every=6, checkpoint_every=7,
        keep=8, devices=2, num_nodes=3, strategy="ddp", precision="64-true", deterministic=False, betas=(0.1, 0.2),
        loss="absolute",
    )  # fmt: skip


def test_a_preset_replaces_defaults_and_flags_replace_the_preset():
    assert parsed("--preset", "wide") == CountingConfig(**PRESETS["wide"])
    assert parsed("--preset=wide", "--lr", "0.7") == CountingConfig(**{**PRESETS["wide"], "lr": 0.7})


def test_a_file_replaces_the_preset_and_flags_replace_the_file(tmp_path):
    file = file_with(tmp_path, "lr: 1e-4\nbetas: [0.3, 0.4]\n")
    assert parsed("--preset", "wide", "--config", file) == CountingConfig(size=5, lr=1e-4, betas=(0.3, 0.4))
    assert parsed("--config", file, "--lr", "0.7").lr == 0.7


def test_the_stored_config_replaces_preset_and_file_and_flags_replace_it(tmp_path):
    folder = run_in(tmp_path / "run", lr=0.5, betas=(0.6, 0.7), steps=50)
    file = file_with(tmp_path, "lr: 0.3\nsize: 9\nsteps: 8\n")
    expected = CountingConfig(run_dir=folder, lr=0.5, betas=(0.6, 0.7), steps=50)
    with pytest.warns(
        UserWarning, match=f"preset: wide is not heard where the run in {folder} began.*: size 3, lr 0.5"
    ):
        assert parsed("--preset", "wide", "--config", file, "--run_dir", folder) == expected
    assert parsed(f"--run_dir={folder}", "--steps", "60").steps == 60
    assert isinstance(parsed("--run_dir", folder).betas, tuple)


def test_one_value_for_a_list_is_refused_with_how_to_write_it():
    with pytest.raises(
        ConfigError, match=r"betas: '0.5'; it must be several values, written as '\[a, b\]', or one as '\[a\]'"
    ):
        parsed("--betas", "0.5")


def test_a_preset_that_a_run_began_with_is_repeated_in_silence(tmp_path):
    wide = PRESETS["wide"]
    assert parsed("--preset", "wide", "--run_dir", run_in(tmp_path / "same", **wide)).size == 5
    other = run_in(tmp_path / "other", **{**wide, "lr": 0.7})
    assert parsed("--preset", "wide", "--run_dir", other, "--lr", "0.7").lr == 0.7
    file = str(Path(other) / "config.yaml")
    assert parsed("--preset", "wide", "--config", file, "--run_dir", str(tmp_path / "fresh")).lr == 0.7


def test_a_directory_without_a_run_stores_nothing(tmp_path):
    assert parsed("--preset", "wide", "--run_dir", str(tmp_path)).size == 5


def test_config_yaml_starts_a_fresh_run_like_it(tmp_path):
    first = CountingConfig(lr=0.3, betas=(0.5, 0.6), size=4, steps=3, seed=5, run_dir=str(tmp_path / "a"))
    straight = run(single_process(), first)
    again = parsed("--config", str(tmp_path / "a" / "config.yaml"), "--run_dir", str(tmp_path / "b"))
    assert again == CountingConfig(**{**vars(first), "run_dir": str(tmp_path / "b")})
    fresh = run(single_process(), again)
    assert fresh.step == 3
    assert fresh.total == straight.total != 0


def test_printed_settings_are_a_config_file(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed("--preset", "wide", "--steps", "9", "--print_config")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["steps"] == 9
    assert parsed("--config", file_with(tmp_path, text)) == CountingConfig(**PRESETS["wide"], steps=9)


def test_help_names_every_flag_with_its_text(capsys):
    with pytest.raises(SystemExit) as caught:
        parsed("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--preset", "--config", "--print_config", "--lr", "--run_dir", "--resume {auto,must,never}"):
        assert flag in text
    assert "Learning rate." in text
    assert "Newest checkpoints to keep, beside the best." in text


def test_a_repeated_command_goes_on(tmp_path):
    words = ("--preset", "wide", "--run_dir", str(tmp_path / "run"))
    steps: list[int] = []

    def main(config: CountingConfig) -> str:
        run(single_process(), config, after_step=lambda state: steps.append(state.step))
        return str(config.run_dir)

    assert status(*words, "--stop_at", "2", main=main) == 0
    assert status(*words, main=main) == 0
    assert status(*words, main=main) == 0
    assert steps == [1, 2, 3, 4, 5, 6]


# What is wrong


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--stepz", "3"], "unrecognized arguments: --stepz 3; did you mean --steps? see --help"),
        (["--step", "3"], "unrecognized arguments: --step 3; did you mean --steps?"),
        (["--steps", "3", "more"], "unrecognized arguments: more; see --help"),
        (["--steps", "abc"], "error: steps: 'abc'; it must be a whole number; see --help"),
        (["--steps", "3.5"], "steps: '3.5'; it must be a whole number"),
        (["--steps"], "argument --steps: expected one argument"),
        (["--steps", "-3"], "steps: -3; it must be at least 0"),
        (["--steps", ""], "steps: ''; it must be a whole number"),
        (["--devices", "two"], "devices: 'two'; it must be a whole number or null"),
        (["--keep", "0"], "keep: 0; it must be at least 1"),
        (["--loss", "cubic"], "loss: 'cubic'; it must be one of 'square', 'absolute'"),
        (["--resume", "maybe"], "resume: 'maybe'; it must be one of 'auto', 'must', 'never'"),
        (["--deterministic", "perhaps"], "deterministic: 'perhaps'; it must be true or false"),
        (["--betas", "[1, 2, 3]"], "betas"),
        (["--preset", "huge"], "preset: 'huge' is unknown; there are small, wide"),
        (["--preset"], "preset: no value; write --preset VALUE"),
        (["--run_dir"], "run_dir: no value; write --run_dir VALUE"),
        (["--config", "nowhere.yaml"], "config: cannot read nowhere.yaml: No such file or directory; give a file that"),
        (["--config", "."], "config: cannot read .: Is a directory"),
        (["draw"], "'draw' is not a verb; there are: count. Flags begin with --"),
        (["count"], "run_dir"),
        (["count", "--run_dir", "x", "--count", "many"], "count: 'many'; it must be a whole number"),
        (["count", "--run_dir", "x", "--steps", "3"], "unrecognized arguments: --steps 3"),
    ],
)
def test_a_wrong_word_is_one_line_and_status_2(capsys, words, expected):
    assert status(*words, main=lambda config: pytest.fail("it ran")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err


@pytest.mark.parametrize(
    "text, expected",
    [
        ("steps: seven", "given.yaml: steps: 'seven'; it must be a whole number"),
        ("steps: -7", "steps: -7; it must be at least 0"),
        ("stepz: 7\nlrr: 2", "given.yaml has lrr, stepz, which CountingConfig has not; take it out"),
        ("steps: [", "given.yaml is not valid YAML: "),
        ("just words", "given.yaml must hold 'name: value' lines"),
        (b"\xff\xfe\x00\x01", "given.yaml is not valid YAML: "),
    ],
)
def test_a_wrong_file_is_one_line_and_status_2(tmp_path, capsys, text, expected):
    assert status("--config", file_with(tmp_path, text), main=lambda config: pytest.fail("it ran")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err


@pytest.mark.parametrize("error", [ConfigError("lr: 9; less"), CheckpointError("step-1/state.pt: gone")])
def test_what_the_user_can_mend_is_one_line_and_status_2(capsys, error):
    def main(config: CountingConfig) -> None:
        raise error

    assert status(main=main) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_bug_keeps_its_traceback():
    def main(config: CountingConfig) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        status(main=main)


def test_warnings_are_one_line(capsys):
    def main(config: CountingConfig) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            # pytest records warnings instead of showing them
            print(warnings.formatwarning("mind the gap", UserWarning, "file.py", 3), file=sys.stderr, end="")

    assert status(main=main) == 0
    assert capsys.readouterr().err == "warning: mind the gap\n"


def test_a_run_of_another_recipe_is_named_with_what_goes_on_with_it(tmp_path, capsys):
    """Not "take it out", which would be said of a file that is given with --config."""
    folder = run_in(tmp_path / "run")
    Path(folder, "config.yaml").write_text("steps: 5\ngamma: 0.5\n")
    for recipe, expected in (
        (None, "holds a run with gamma, which CountingConfig has not; check the path, or go on with the version"),
        (
            "counting_loop",
            "holds a run with gamma, which CountingConfig has not; check the path, or go on with the ver",
        ),
        ("gan", "holds a run of gan, not of counting_loop; check the path, or go on with: python -m recipes.gan"),
    ):
        if recipe is not None:
            Path(folder, "status.json").write_text(json.dumps({"recipe": recipe, "command": "python -m recipes.gan"}))
        assert status("--run_dir", folder, main=lambda config: pytest.fail("it ran")) == 2
        assert f"error: run_dir: {folder} {expected}" in capsys.readouterr().err


def test_help_names_the_presets_and_the_verbs(capsys):
    with pytest.raises(SystemExit):
        status("--help")
    out = capsys.readouterr().out
    assert "settings to start from: small, wide; the first where none is given" in " ".join(out.split())
    assert "count --help    Print a number." in out


# Status


@pytest.mark.parametrize(
    "state, says", [("stopped", "stopped after step 3 of 6, saved; go on with: "), ("complete", "")]
)
def test_a_stopped_run_says_how_to_go_on(tmp_path, capsys, state, says):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    Run(CountingConfig(run_dir=str(run_dir))).write_status(state, 3)
    assert status(main=lambda config: str(run_dir)) == 0
    out = capsys.readouterr().out
    assert out.startswith(says)
    assert out.endswith(f"--run_dir {run_dir}\n" if says else "")
    assert out.count("\n") == len(says[:1])


def test_a_verb_gets_its_own_flags(capsys):
    assert status("count", "--run_dir", "x", "--count", "5", main=lambda config: pytest.fail("it ran")) == 0
    assert capsys.readouterr().out == "counted 5\n"


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, 143),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 0),
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"}, 0),
        ({"SLURM_PROCID": "0"}, 0),
    ],
)
def test_who_carries_the_status_of_a_signal(tmp_path, monkeypatch, environment, expected):
    Run(CountingConfig(run_dir=str(tmp_path))).write_status("stopped", 3, signal=15)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert status(main=lambda config: str(tmp_path)) == expected


@pytest.mark.distributed
def test_a_process_that_fails_says_so_and_leaves_nobody_behind(tmp_path):
    """Under torchrun: the failing process gives its number and error, and all are gone soon."""
    program = tmp_path / "failing.py"
    program.write_text(
        "import sys\n"
        "from tests.library.counting_loop import *\n"
        "def main(config):\n"
        "    fabric = launch(config)\n"
        "    def fail(state):\n"
        "        if fabric.global_rank == 1 and state.step == 2:\n"
        "            raise ZeroDivisionError('by design')\n"
        "    run(fabric, config, after_step=fail)\n"
        "    return config.run_dir\n"
        "sys.exit(command_line(CountingConfig, main, presets=PRESETS))\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    repository = Path(__file__).parents[2]
    process = subprocess.Popen(
        [*launcher, str(program), "--run_dir", str(tmp_path / "run"), "--steps", "100000"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
    assert process.returncode == 1, output
    assert "process 1 failed: ZeroDivisionError: by design" in output
