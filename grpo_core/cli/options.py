"""Options of the commands: declared, read, checked, and compared with those of an earlier run.

Nothing here imports torch or transformers: help and errors appear before those are loaded.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, field, fields
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

WARMUP = 5  # steps, where nobody says otherwise and the run is longer
# `recipes.RECIPES` has the objectives
RECIPE_NAMES = (
    *("ppo", "dual_clip", "grpo", "dr_grpo", "dapo", "bnpo", "intellect2", "gspo", "gmpo"),
    *("luspo", "cispo", "sapo", "vespo", "rloo"),
    *("reinforce_plus_plus", "reinforce_plus_plus_baseline", "gpg", "dro", "dppo", "topr"),
)
# what a run leaves in its directory
RUN_FILES: tuple[str, ...] = (
    "config.json",
    "metrics.jsonl",
    "samples.jsonl",
    "before.json",
    "results.json",
)
RUN_FILES += ("report.md", "curves.png", "compare.json", "compare.md", "compare.png")
RUN_FOLDERS = ("checkpoints", "model", "r1-zero", "sft", "r1")
# what may differ between a run and the command that resumes it
FREE: tuple[str, ...] = (
    "resume",
    "overwrite",
    "threads",
    "log",
    "output",
    "checkpoint_every",
    "keep_checkpoints",
)
FREE += ("console", "plot", "rollout_url", "rollout_memory", "rollout_sleep")

KINDS = {"int": "a whole number", "float": "a number", "Path": "a path"}
# what argparse says -> what was expected and what came
MESSAGES = (
    (r"^argument ", ""),
    (r"expected one argument$", "expected a value, got none"),
    (r"expected at least one argument$", "expected at least one value, got none"),
    (r"^the following arguments are required: (.*)$", r"\1: expected a value, got none"),
)


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text for the command line."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


class Parser(argparse.ArgumentParser):
    """Reads a command line; an error is one line: the option, what was expected, what came.

    Args:
        command: the module that is run.
        settings: of `argparse.ArgumentParser`.
    """

    def __init__(self, command: str, **settings: Any) -> None:
        super().__init__(prog=f"python -m {command}", allow_abbrev=False, **settings)
        # argparse takes -1e-6 for an option
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.I)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """The options as a namespace; `--group-size` is `--group_size`."""
        given = map(self._as_declared, sys.argv[1:] if args is None else args)
        found, unknown = self.parse_known_args(list(given), namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            if not word.startswith("-"):
                self.error(f"{word}: expected an option such as --help, got {word!r}")
            known = [name for name in self._option_string_actions if name.startswith("--")]
            self.error(f"{word}: no such option{nearest(word, known) or '; see --help'}")
        return found

    def error(self, message: str) -> NoReturn:
        """Exits with status 2 and one line, however many processes there are."""
        for pattern, form in MESSAGES:
            message = re.sub(pattern, form, message)
        message = re.sub(r"invalid choice: (.*?) \(choose from (.*)\)$", _choice, message)
        message = re.sub(r"invalid (\w+) value: (.*)$", _kind, message)
        if f"--{message.partition(':')[0]}" in self._option_string_actions:
            message = f"--{message}"
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)

    def _as_declared(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if name.startswith("--") and name not in self._option_string_actions:
            return name.replace("-", "_").replace("__", "--", 1) + equals + value
        return word


def begin(kind: type, command: str, arguments: Sequence[str] | None) -> tuple[Parser, Any]:
    """A command's parser and options; exits with one line if an option is wrong.

    Args:
        kind: the dataclass of the options; its `check_here` raises for what this machine lacks.
        command: the module that is run.
        arguments: None for those of the process. The first may be a YAML file.
    """
    parser = Parser(
        command,
        usage=f"python -m {command} [run.yaml] [--option value ...]",
        description=(kind.__doc__ or "").partition("\n")[0],
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30),
    )
    add_options(parser, kind)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and given[0].endswith((".yaml", ".yml")):
            # what follows on the command line counts more
            given = [*read_yaml(Path(given[0])), *given[1:]]
        config = kind(**vars(parser.parse_args(given)))
        config.check_here()
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    return parser, config


def add_options(parser: Parser, kind: type) -> None:
    """An option for every field of a dataclass, those that it declares itself first."""
    hints, declared = get_type_hints(kind), {each.name: each for each in fields(kind)}
    for each in (declared[name] for name in dict.fromkeys([*kind.__annotations__, *declared])):
        hint, text = hints[each.name], each.metadata["help"].replace("%", "%%")
        factory: Any = each.default_factory
        listed = factory is not MISSING
        default: Any = factory() if listed else each.default
        settings: dict[str, Any] = {"default": default}
        if isinstance(hint, UnionType) or get_origin(hint) is list:
            hint = get_args(hint)[0]
        if listed:
            settings["nargs"] = "+"
        if get_origin(hint) is Literal:
            settings["choices"] = get_args(hint)
        elif hint is bool:
            settings |= {"type": _truth, "nargs": "?", "const": True, "metavar": "True"}
        else:
            names = {int: "N", float: "X", str: "TEXT"}
            settings |= {"type": hint, "metavar": names[hint]}
        if default not in (None, "", []):
            shown = " ".join(map(str, default)) if listed else default
            text += f" (default: {shown})"
        parser.add_argument(f"--{each.name}", help=text, **settings)
        if default is True:
            parser.add_argument(
                f"--no_{each.name}", action="store_false", dest=each.name, help=argparse.SUPPRESS
            )


def read_yaml(path: Path) -> list[str]:
    """The options of a YAML file as a command line has them; null is an option not given.

    Raises:
        ValueError: the file cannot be read, or holds something else than options.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8")) or {}
    except OSError as error:
        raise ValueError(f"{path}: expected a file of options, got {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected options, a name and a value each, got {content!r:.60}")
    words = []
    for name, value in content.items():
        if isinstance(value, dict):
            raise ValueError(f"{path}: {name}: expected a value or a list, got {value!r:.60}")
        if isinstance(value, list):
            # an empty list is the default of some options, and an error in the others
            words += [f"--{name}", *map(str, value)] if value or name == "rewards" else []
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def prepare(line: str, threads: int) -> None:
    """Sets the process up for training.

    Bars and advice to developers of other libraries would stand between the lines of the console.

    Args:
        line: printed at once, since what a run imports takes seconds.
        threads: of the CPU; 0 is torch's choice.
    """
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
    import torch
    from transformers.utils import logging

    if threads:
        torch.set_num_threads(threads)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\b")


def nearest(word: str, known: Iterable[str]) -> str:
    """A question that names what somebody may have meant, or ""."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def check_at_least(config: Any, least: float, *names: str) -> None:
    """Raises ValueError for one of these options that is smaller, or not finite."""
    for name in names:
        if not least <= getattr(config, name) < math.inf:
            wanted = f"at least {least}" if least else "0 or more"
            raise ValueError(f"{name}: expected {wanted}, got {getattr(config, name)}")


def check_more_than_0(config: Any, *names: str) -> None:
    """Raises ValueError for one of these options that is 0, negative or not finite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}: expected more than 0, got {getattr(config, name)}")


def check_choices(config: Any, kind: type) -> None:
    """Raises ValueError for a field of `kind` that is none of its literals."""
    for name, hint in get_type_hints(kind).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            raise ValueError(
                f"{name}: expected one of {get_args(hint)}, got {getattr(config, name)!r}"
            )


def check_warmup(config: Any) -> None:
    """Raises ValueError for a given warm-up as long as the run, which would never end."""
    if config.warmup_steps is not None and not 0 <= config.warmup_steps < config.steps:
        raise ValueError(
            f"warmup_steps: expected 0 to {config.steps - 1}, got {config.warmup_steps}"
        )


def warmup(config: Any) -> int:
    """Steps of warm-up: as given, else 5 or all but the last."""
    given: int | None = config.warmup_steps
    return min(WARMUP, config.steps - 1) if given is None else given


def load_from_file(option: str, name: str) -> Any:
    """The object that path.py:name stands for.

    Raises:
        ValueError: there is no such file, it cannot be imported, or it has no such name.
    """
    path, _, attribute = name.rpartition(":")
    check_file(option, path)
    spec = importlib.util.spec_from_file_location(f"user_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    # where pickle and inspect look for what is defined in it
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        names = [name for name in vars(module) if not name.startswith("_")]
        raise ValueError(
            f"{option}: expected a name in {path}, got {attribute!r}{nearest(attribute, names)}"
        )
    return getattr(module, attribute)


def existing_file(text: str) -> Path:
    """A path on a command line that must be there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"expected a file, found no {text}")
    return Path(text)


def new_file(text: str) -> Path:
    """A path on a command line that will be written."""
    if not Path(text).parent.is_dir() or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in an existing folder, got {text}")
    return Path(text)


def vocabulary(text: str) -> int:
    """A size of a vocabulary on a command line: one token to reward, one to refuse."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 2, got {text!r}")
    return int(text)


def run_with_metrics(text: str) -> Path:
    """A run directory on a command line."""
    if not (Path(text) / "metrics.jsonl").is_file():
        raise argparse.ArgumentTypeError(f"expected a run directory, found no {text}/metrics.jsonl")
    return Path(text)


def check_file(option: str, path: str) -> None:
    """Raises ValueError unless the file that an option names can be read."""
    if not Path(path).is_file():
        raise ValueError(f"{option}: expected a file, found no {path}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{option}: expected a file that can be read, got {path}")


def check_package(option: str, module: str, package: str = "") -> None:
    """Raises ModuleNotFoundError unless a package that an option needs is installed."""
    try:
        missing = importlib.util.find_spec(module) is None
    except ValueError:
        # in sys.modules as None, or without a spec
        missing = sys.modules[module] is None
    if missing:
        package = package or module
        raise ModuleNotFoundError(f"{option}: needs {module}, not installed: pip install {package}")


def check_output(config: Any) -> None:
    """Makes the run directory ready, or resumes the run in it.

    Raises:
        ValueError: it holds a run that would be lost; there is none to resume, or one of other
            options; it cannot be written to.
    """
    if not config.output:
        raise ValueError("output: expected a folder, got nothing")
    directory = Path(config.output)
    resume = getattr(config, "resume", False)
    if resume and config.overwrite:
        raise ValueError("overwrite: expected False with --resume True, got True")
    if resume:
        file = directory / "config.json"
        before = read_resumed(file)
        check_unchanged(asdict(config), before.get("options", before), file, FREE)
    elif not config.overwrite:
        found = [name for name in (*RUN_FILES, *RUN_FOLDERS) if (directory / name).exists()]
        if found:
            goes_on = "go on with it by --resume True, " if hasattr(config, "resume") else ""
            raise ValueError(
                f"output: expected a folder without a run, found {directory / found[0]}; {goes_on}"
                "name another folder by --output, or delete that run by --overwrite True"
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output: expected a folder that can be made, got {directory} ({error.strerror})"
        ) from error
    if not os.access(directory, os.W_OK):
        raise ValueError(f"output: expected a folder that can be written to, got {directory}")


def check_kept(output: str, *paths: tuple[str, str]) -> None:
    """Raises ValueError if overwriting the run in `output` would delete what an option reads.

    Args:
        output: the run directory.
        paths: an option and the file or folder it names each, "" without one.
    """
    deleted = [(Path(output) / name).resolve() for name in (*RUN_FILES, *RUN_FOLDERS)]
    for option, path in paths:
        place = Path(path).resolve()
        # of a model's folder config.json is a part
        parts = {place, place / "config.json", *place.parents}
        if path and place.exists() and parts & set(deleted):
            raise ValueError(
                f"output: expected another folder, since --overwrite True would delete {path} of "
                f"--{option}, got {output}"
            )


def read_resumed(file: Path) -> Any:
    """What an interrupted run has left in `file`.

    Raises:
        ValueError: there is no such run.
    """
    if not file.exists():
        raise ValueError(f"resume: expected an interrupted run, found no {file}")
    return json.loads(file.read_text("utf-8"))


def check_unchanged(
    now: Mapping[str, Any], before: Mapping[str, Any], where: Path, free: Collection[str] = ()
) -> None:
    """Raises ValueError for an option that is not what it was in `where`, unless it is free."""
    for name, value in now.items():
        if name not in free and before.get(name) != value:
            raise ValueError(f"{name}: expected {before.get(name)} as in {where}, got {value}")


def _truth(text: str) -> bool:
    """True or False."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def _choice(message: re.Match[str]) -> str:
    given, choices = message[1], message[2].replace("'", "")
    close = nearest(given.strip("'"), choices.split(", "))
    return f"expected one of {choices}, got {given}{close}"


def _kind(message: re.Match[str]) -> str:
    return f"expected {KINDS.get(message[1], message[1])}, got {message[2]}"
