"""Options of the commands: declared in dataclasses, read from a command line or YAML, checked.

Nothing here imports torch or transformers, so that help and errors appear at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

WARMUP = 5  # steps of warm-up, unless the run is shorter or the option is given
# the keys of `objective.recipes.RECIPES`, which imports torch
RECIPE_NAMES = (
    *("ppo", "dual_clip", "grpo", "dr_grpo", "dapo", "bnpo", "intellect2", "gspo"),
    *("gspo_token", "gmpo", "luspo", "cispo", "scalerl", "sapo", "vespo", "rloo"),
    *("reinforce_plus_plus", "reinforce_plus_plus_baseline", "gpg", "maxrl", "gdpo", "dro"),
    *("dppo", "ipo", "m2po", "fipo", "sdar", "topr"),
    "opd",
)
# patterns in the messages of argparse, and what replaces them
MESSAGES = (
    (r"^argument ", ""),
    (r"expected one argument$", "expected a value, got none"),
    (r"expected at least one argument$", "expected at least one value, got none"),
    (r"^the following arguments are required: (.*)$", r"\1: expected a value, got none"),
    (r"invalid int value: (.*)$", r"expected a whole number, got \1"),
    (r"invalid float value: (.*)$", r"expected a number, got \1"),
)


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text for the command line.

    A subclass that declares the field again, as in `steps: int = 100`, keeps the help text.
    """
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def help_text(kind: type, name: str) -> str:
    """The help text of an option: that of the class itself or of the nearest base with one."""
    declared = (vars(base).get("__dataclass_fields__", {}).get(name) for base in kind.__mro__)
    return next(each.metadata["help"] for each in declared if each and each.metadata)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line: the option, what was expected, what it got.

    Args:
        command: name of the module behind `python -m`.
        settings: of `argparse.ArgumentParser`.
    """

    def __init__(self, command: str, **settings: Any) -> None:
        super().__init__(prog=f"python -m {command}", allow_abbrev=False, **settings)
        # argparse alone would take -1e-6 for an option
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.I)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """The options as a namespace; `--group-size` is accepted for `--group_size`."""
        given = map(self._as_declared, sys.argv[1:] if args is None else args)
        options, unknown = self.parse_known_args(list(given), namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            if not word.startswith("-"):
                self.error(f"{word}: expected an option such as --help, got {word!r}")
            known = [name for name in self._option_string_actions if name.startswith("--")]
            self.error(f"{word}: no such option{nearest(word, known) or '; see --help'}")
        return options

    def error(self, message: str) -> NoReturn:
        """Exits with status 2; the first process prints one line."""
        for pattern, form in MESSAGES:
            message = re.sub(pattern, form, message)
        message = re.sub(r"invalid choice: (.*?) \(choose from (.*)\)$", _choice, message)
        if f"--{message.partition(':')[0]}" in self._option_string_actions:
            message = f"--{message}"
        if is_first_process():
            print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)

    def _as_declared(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if name.startswith("--") and name not in self._option_string_actions:
            return name.replace("-", "_").replace("__", "--", 1) + equals + value
        return word


def add_options(parser: Parser, kind: type) -> None:
    """An option for every field of a dataclass; those in its own body come first in the help."""
    hints, declared = get_type_hints(kind), {each.name: each for each in fields(kind)}
    for name in dict.fromkeys([*kind.__annotations__, *declared]):
        hint, text = hints[name], help_text(kind, name).replace("%", "%%")
        factory: Any = declared[name].default_factory
        is_list = factory is not MISSING
        default: Any = factory() if is_list else declared[name].default
        settings: dict[str, Any] = {"default": default}
        if isinstance(hint, UnionType) or get_origin(hint) is list:
            hint = get_args(hint)[0]
        if is_list:
            settings["nargs"] = "+"
        if get_origin(hint) is Literal:
            settings["choices"] = get_args(hint)
        elif hint is bool:
            settings |= {"type": _truth, "nargs": "?", "const": True, "metavar": "True"}
        else:
            settings |= {"type": hint, "metavar": {int: "N", float: "X", str: "TEXT"}[hint]}
        if default not in (None, "", []):
            text += f" (default: {' '.join(map(str, default)) if is_list else default})"
        parser.add_argument(f"--{name}", help=text, **settings)
        if default is True:
            parser.add_argument(
                f"--no_{name}", action="store_false", dest=name, help=argparse.SUPPRESS
            )


def read_yaml(path: Path) -> list[str]:
    """The options of a YAML file as words of a command line; null means not given.

    Raises:
        ValueError: the file cannot be read, or does not map names to values.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8")) or {}
    except OSError as error:
        raise ValueError(f"{path}: expected a file of options, got {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML, got {error}") from error
    expected = "options, a name and a value each"
    require(isinstance(content, dict), str(path), expected, f"{content!r:.60}")
    words = []
    for name, value in content.items():
        is_right = not isinstance(value, dict)
        require(is_right, f"{path}: {name}", "a value or a list", f"{value!r:.60}")
        if isinstance(value, list):
            # an empty list is an error for rewards, and the default of the other lists
            words += [f"--{name}", *map(str, value)] if value or name == "rewards" else []
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def is_first_process() -> bool:
    """Whether this is the only process, or the first that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def nearest(word: str, known: Iterable[str]) -> str:
    """A question that names the known word most like this one, or ""."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def require(condition: bool, option: str, expected: str, got: object) -> None:
    """Raises ValueError with one line unless the condition holds."""
    if not condition:
        raise ValueError(f"{option}: expected {expected}, got {got}")


def check_at_least(config: Any, least: float, *names: str) -> None:
    """Raises ValueError if one of these options is below `least`, or not finite."""
    for name in names:
        value = getattr(config, name)
        require(
            least <= value < math.inf, name, f"at least {least}" if least else "0 or more", value
        )


def check_more_than_0(config: Any, *names: str) -> None:
    """Raises ValueError if one of these options is 0, negative or not finite."""
    for name in names:
        value = getattr(config, name)
        require(0 < value < math.inf, name, "more than 0", value)


def check_choices(config: Any, kind: type) -> None:
    """Raises ValueError if a field of `kind` is not one of its literals."""
    for name, hint in get_type_hints(kind).items():
        if get_origin(hint) is Literal:
            value = getattr(config, name)
            require(value in get_args(hint), name, f"one of {get_args(hint)}", repr(value))


def check_filters(config: Any) -> None:
    """Raises ValueError if an option that filters the sampler's vocabulary is out of its range."""
    require(0 < config.top_p <= 1, "top_p", "a number above 0, at most 1", config.top_p)
    check_at_least(config, 0, "top_k")
    require(0 <= config.min_p < 1, "min_p", "a number from 0, below 1", config.min_p)


def check_warmup(config: Any) -> None:
    """Raises ValueError unless a given warm-up is shorter than the run."""
    given = config.warmup_steps
    fits = given is None or 0 <= given < config.steps
    require(fits, "warmup_steps", f"0 to {config.steps - 1}", given)


def warmup(config: Any) -> int:
    """Steps of warm-up: as given, else 5, or all but the last step of a shorter run."""
    given: int | None = config.warmup_steps
    return min(WARMUP, config.steps - 1) if given is None else given


class UserCodeError(ValueError):
    """A file of the user's raised when it was imported; what it raised is the `__cause__`."""


def load_from_file(option: str, name: str) -> Any:
    """The object that path.py:name stands for.

    Raises:
        ValueError: there is no such file, or it has no such name.
        UserCodeError: the file cannot be imported.
    """
    path, _, attribute = name.rpartition(":")
    check_file(option, path)
    # the whole path: two files of one name are two modules
    spec = importlib.util.spec_from_file_location(f"{option} {Path(path).resolve()}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # pickle, inspect and dataclasses look the module up there
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserCodeError(f"{option}: {path} raised {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        names = [each for each in vars(module) if not each.startswith("_")]
        raise ValueError(
            f"{option}: expected a name in {path}, got {attribute!r}{nearest(attribute, names)}"
        )
    return getattr(module, attribute)


def existing_file(text: str) -> Path:
    """The path of an existing file, on a command line."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"expected a file, found no {text}")
    return Path(text)


def new_file(text: str) -> Path:
    """The path of a file to write, on a command line."""
    if not Path(text).parent.is_dir() or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in an existing folder, got {text}")
    return Path(text)


def vocabulary(text: str) -> int:
    """A vocabulary size, on a command line: at least one token to sample and one not to."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 2, got {text!r}")
    return int(text)


def check_file(option: str, path: str) -> None:
    """Raises ValueError unless an option names a file that can be read."""
    if not Path(path).is_file():
        raise ValueError(f"{option}: expected a file, found no {path}")
    require(os.access(path, os.R_OK), option, "a file that can be read", path)


def check_package(option: str, module: str, package: str = "") -> None:
    """Raises ModuleNotFoundError unless the package that an option needs is installed."""
    try:
        missing = importlib.util.find_spec(module) is None
    except ValueError:
        # the module is None in sys.modules, or has no spec
        missing = sys.modules[module] is None
    if missing:
        package = package or module
        raise ModuleNotFoundError(f"{option}: needs {module}, not installed: pip install {package}")


def check_unchanged(
    now: Mapping[str, Any], before: Mapping[str, Any], where: Path, free: Collection[str] = ()
) -> None:
    """Raises ValueError if an option is not what it was in `where`, unless it may change."""
    for name, value in now.items():
        is_right = name in free or before.get(name) == value
        require(is_right, name, f"{before.get(name)} as in {where}", value)


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
