"""The command line of a recipe, built from its config: the same flags everywhere, one line for what is wrong."""

import dataclasses
import difflib
import os
import re
import shutil
import sys
import time
import traceback
import warnings
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from lightning_custom.config import RunConfig, read_config
from lightning_custom.errors import CheckpointError, ConfigError, NonFiniteError, SolverError
from lightning_custom.run import CONFIG, exit_status, fields_of_run, stopped_line

Main = Callable[[Any], Any]
WRONG_USAGE = 2
_PARENT = os.getppid()


def command_line(
    config: type[RunConfig],
    main: Main,
    *,
    presets: Mapping[str, Mapping[str, Any]],
    verbs: Mapping[str, tuple[type[Any], Main]] | None = None,
    description: str | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse ``arguments`` (``sys.argv``), run, and return the exit status.

    ``main`` gets the config and returns the run's directory, whose ``status.json`` holds what the status is made of:
    0 complete or stopped without a signal, 128 plus a signal's number. ``verbs`` are other first words, each with a
    dataclass of its own flags. What the user can mend, a :class:`ConfigError` or :class:`CheckpointError`, is one
    line and status 2.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    warnings.formatwarning = _one_line_warning
    try:
        verb = (verbs or {}).get(words[0]) if words else None
        if verb is not None:
            kind, action = verb
            action(_parse_verb(kind, words[1:]))
            return 0
        if words and not words[0].startswith("-"):
            known = ", ".join(verbs or ()) or "none"
            raise ConfigError(f"{words[0]!r} is not a verb; there are: {known}. Flags begin with --")
        settings = parse_config(config, words, presets, _with_verbs(description, verbs or {}))
        run_dir = _run(main, settings)
        if dist.is_available() and dist.is_initialized():
            # gloo's threads abort a program that ends without this, now and then.
            dist.destroy_process_group()
        if _is_first() and settings.replay_step is not None:
            print(f"replayed step {settings.replay_step}: {run_dir}", flush=True)
        elif _is_first() and run_dir is not None and (line := stopped_line(run_dir)):
            print(line, flush=True)
        return 0 if run_dir is None or _launched_from_outside() else exit_status(run_dir) if _is_first() else 0
    except (ConfigError, CheckpointError, NonFiniteError, SolverError) as error:
        if _left_by_process_0():
            return 0
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, (NonFiniteError, SolverError)) else WRONG_USAGE
    except Exception as error:
        if _one_of_several():
            traceback.print_exc()
            print(f"process {_rank()} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            # The others wait in a collective; leaving at once closes their connections.
            os._exit(1)
        raise


def _run(main: Main, settings: RunConfig) -> str | None:
    try:
        return main(settings)  # type: ignore[no-any-return]
    except NonFiniteError as error:
        if settings.replay_step is None and error.run_dir is not None:
            if _one_of_several():
                error.what += f" (--replay_step {error.step} names the module)"
            else:
                _name_the_module(error, main, settings)
        raise


def _name_the_module(error: NonFiniteError, main: Main, settings: RunConfig) -> None:
    """Do the failed steps again from the last good checkpoint with every module checked; add what that finds."""
    print(f"{error.what} by step {error.step}; doing it again to find the module", file=sys.stderr, flush=True)
    try:
        folder = main(dataclasses.replace(settings, run_dir=error.run_dir, replay_step=error.step))
    except NonFiniteError as found:
        folder, error.step = found.run_dir, found.step
        if found.what != error.what:
            error.what += f"; {found.what}"
    shutil.rmtree(folder, ignore_errors=True)


def parse_config(
    config: type[RunConfig],
    words: Sequence[str],
    presets: Mapping[str, Mapping[str, Any]],
    description: str | None = None,
) -> Any:
    """The config from defaults < preset < ``--config`` < the run directory's own < explicit flags."""
    given, parser = _early_flags(words), _parser(config, presets, description)
    default_preset = next(iter(presets), None)
    preset = given.get("preset") or default_preset
    if preset is not None:
        if preset not in presets:
            raise ConfigError(f"preset: {preset!r} is unknown; there are {', '.join(presets)}")
        parser.set_defaults(dict(presets[preset]))
    if "config" in given:
        _set_defaults(parser, _fields_of_file(Path(given["config"]), config), given["config"])
    goes_on = "run_dir" in given and (Path(given["run_dir"]) / CONFIG).exists()
    if goes_on:
        _set_defaults(parser, fields_of_run(config, given["run_dir"]), str(Path(given["run_dir"]) / CONFIG))
    values = _parse(parser, words)
    if goes_on and "preset" in given:
        _warn_of_a_preset_that_is_not_heard(presets[given["preset"]], values, given, words)
    fields = {field.name for field in dataclasses.fields(config)}
    return config(**{name: value for name, value in values.items() if name in fields})


def _warn_of_a_preset_that_is_not_heard(
    preset: Mapping[str, Any], values: Mapping[str, Any], given: Mapping[str, str], words: Sequence[str]
) -> None:
    flags = {word.partition("=")[0].removeprefix("--") for word in words}
    kept = [f"{name} {values[name]!r}" for name, value in preset.items() if values[name] != value and name not in flags]
    if kept:
        warnings.warn(
            f"preset: {given['preset']} is not heard where the run in {given['run_dir']} began with another setting, "
            f"which it keeps: {', '.join(kept)}",
            stacklevel=3,
        )


def _parser(
    config: type[RunConfig], presets: Mapping[str, Mapping[str, Any]], description: str | None
) -> ArgumentParser:
    parser = _new_parser(description)
    known = ", ".join(presets) or "none"
    parser.add_argument("--preset", type=str, help=f"settings to start from: {known}; the first where none is given")
    parser.add_argument("--config", type=str, help="YAML file of settings, such as RUN_DIR/config.yaml")
    parser.add_argument("--print_config", action="store_true", help="print the settings and leave")
    parser.add_class_arguments(config)
    return parser


def _with_verbs(description: str | None, verbs: Mapping[str, tuple[type[Any], Main]]) -> str | None:
    lines = [f"  {verb} --help    {_first_line(kind)}" for verb, (kind, _) in verbs.items()]
    return "\n".join([description or "", "Other first words:", *lines]) if lines else description


def _first_line(kind: type[Any]) -> str:
    return (kind.__doc__ or kind.__name__).splitlines()[0]


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of a recipe's docstring, which hold commands."""


def _new_parser(description: str | None) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
        usage=SUPPRESS,
        formatter_class=_HelpFormatter,
        print_config=None,  # its own --print_config would take ours for a flag with a value
    )


def _early_flags(words: Sequence[str]) -> dict[str, str]:
    """The flags that decide where defaults come from, before the rest is parsed."""
    found = {}
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in ("--preset", "--config", "--run_dir"):
            if not equals:
                if i + 1 >= len(words):
                    raise ConfigError(f"{name[2:]}: no value; write {name} VALUE")
                value = words[i + 1]
            found[name[2:]] = value
    return found


def _fields_of_file(file: Path, config: type[RunConfig]) -> dict[str, Any]:
    fields = read_config(file)
    unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(config)})
    if unknown:
        raise ConfigError(f"config: {file} has {', '.join(unknown)}, which {config.__name__} has not; take it out")
    return fields


def _set_defaults(parser: ArgumentParser, fields: Mapping[str, Any], file: str) -> None:
    try:
        parsed = parser.parse_object(dict(fields))
    except Exception as error:
        raise ConfigError(f"config: {file}: {_one_line(error)}") from error
    parser.set_defaults({name: parsed[name] for name in fields})


def _parse(parser: ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    try:
        values = parser.parse_args(list(words))
    except SystemExit:  # --help
        raise
    except Exception as error:
        raise ConfigError(f"{_one_line(error)}; {_meant(parser, error)}see --help") from error
    found: dict[str, Any] = values.as_dict()
    if found.get("print_config"):
        hidden = ("print_config", "preset", "config")
        kept = {name: value for name, value in found.items() if name not in hidden}
        print(yaml.safe_dump(kept, sort_keys=False), end="")
        raise SystemExit(0)
    return found


def _parse_verb(kind: type[Any], words: Sequence[str]) -> Any:
    parser = _new_parser(_first_line(kind))
    parser.add_class_arguments(kind)
    return kind(**_parse(parser, words))


_WANTED = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'NoneType'>": "null",
    "<class 'tuple'>": "several values, written as '[a, b]', or one as '[a]'",
}


_WRONG_VALUE = (
    r'Parser key "(?P<name>[^"]*)": (?P<why>.*?)[. ]*(?:Given value type: .*? )?'
    r"(?:Got|Given) value: ?(?P<value>.*)$"
)


def _one_line(error: BaseException) -> str:
    """The parser's message, of a wrong value as ``steps: 'abc'; it must be a whole number``."""
    line = " ".join(str(error).split()).replace("error: ", "")
    wrong = re.match(_WRONG_VALUE, line)
    wanted = re.findall(r"Expected an? (<class '\w+'>|typing\.Literal\[.*?\])", wrong["why"]) if wrong else []
    if wrong is None or not wanted:
        return line
    words = [_WANTED.get(kind) or "one of " + re.sub(r"typing\.Literal\[(.*)\]", r"\1", kind) for kind in wanted]
    return f"{wrong['name']}: {wrong['value']!r}; it must be {' or '.join(words)}"


def _meant(parser: ArgumentParser, error: BaseException) -> str:
    """The flag that a misspelled one is like; empty where none is."""
    text = str(error)
    unknown = text.partition("unrecognized arguments: ")[2].split()
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for word in unknown:
        near = difflib.get_close_matches(word.partition("=")[0], flags, 1, 0.75) if word.startswith("--") else []
        if near:
            return f"did you mean {near[0]}? "
    return ""


def _one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"warning: {message}\n"


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def _one_of_several() -> bool:
    # Fabric's ddp sets it for one process too.
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _is_first() -> bool:
    return _rank() == 0


def _left_by_process_0(seconds: float = 15.0) -> bool:
    """Whether this process is a child of Fabric's own launcher, and process 0 has left by an error of its own.

    The launcher kills process 0 as soon as a child leaves with a status. An error that all processes have is left to
    process 0 to say and to carry, so a child waits a while for it to go.
    """
    if _is_first() or not _one_of_several() or _launched_from_outside():
        return False
    deadline = time.monotonic() + seconds
    while os.getppid() == _PARENT and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.getppid() != _PARENT


def _launched_from_outside() -> bool:
    """Whether torchrun or SLURM started this process and will read a status other than 0 as a failure."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ
