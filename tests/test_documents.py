"""Every page of the documentation: its Python runs, its commands, options and links exist.

Python snippets of a page share one namespace and run in order. docs/api.md has a section for every
public name; `python -m tests.test_documents` writes the signatures there anew.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import dataclasses
import importlib
import importlib.util
import inspect
import linecache
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, ForwardRef, NamedTuple

import pytest
import torch

import grpo_core
from grpo_core import Objective, fused_loss

pytestmark = [
    # a command is run as such, although its module may be imported
    pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning"),
    # one worker runs every page once
    pytest.mark.xdist_group("documents"),
]
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
API = DOCS / "api.md"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
# A snippet with this text is not run; its syntax, names and imports are checked all the same.
NOT_RUN = {
    "grpo_core.integrations.verl": "verl needs an environment of its own, see make test-verl",
    "import openrlhf": "OpenRLHF needs an environment of its own",
    "import open_instruct": "open-instruct is in no package index",
}
# options in the text that belong to programs of others
OTHERS = {
    "--cpu",
    "--num_processes",
    "--nnodes",
    "--rdzv_endpoint",
    "--no-deps",
    "--benchmark-only",
    "--rows",
    "--return-sampling-mask",
    "--enable-scale-out",
}
COMMANDS = ["train", "reinforce", "compare", "recipes", "plot", "show", "inspect", "verify"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    line: int  # of its first line, from 1


def blocks(page: Path, *languages: str) -> list[Block]:
    """Blocks of a page in some languages."""
    text = page.read_text("utf-8")
    found = [
        Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1)
        for match in BLOCK.finditer(text)
    ]
    return [block for block in found if block.language in languages]


def reason_not_to_run(block: Block) -> str | None:
    """Why the snippet cannot run here."""
    return next((why for text, why in NOT_RUN.items() if text in block.text), None)


def name_of(page: Path) -> str:
    """The page as a test is named."""
    return str(page.relative_to(ROOT))


# --- Python --------------------------------------------------------------------------------------


def run(page: Path, folder: Path) -> dict[str, Any]:
    """Runs the page's Python in order; lines of a traceback are those of the page."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    source = folder / f"{page.stem}.py"
    snippets = blocks(page, "python")
    lines = [""] * page.read_text("utf-8").count("\n")
    for block in snippets:
        inside = block.text.splitlines()
        lines[block.line - 1 : block.line - 1 + len(inside)] = inside
    # a jitted function is read from its file
    source.write_text("\n".join(lines), "utf-8")
    linecache.checkcache(str(source))
    for block in snippets:
        tree = ast.parse(block.text)
        undefined = sorted(names_read(tree) - names_made(tree) - namespace.keys() - set(BUILTINS))
        assert not undefined, f"{name_of(page)}:{block.line}: {undefined} not defined"
        if reason_not_to_run(block) is None:
            ast.increment_lineno(tree, block.line - 1)
            exec(compile(tree, str(source), "exec", dont_inherit=True), namespace)
        else:
            check_imports(tree)
            namespace |= dict.fromkeys(names_made(tree))
    return namespace


BUILTINS = dir(builtins)


def names_read(tree: ast.AST) -> set[str]:
    """Names that are looked up."""
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return {node.id for node in names if isinstance(node.ctx, ast.Load)}


def names_made(tree: ast.AST) -> set[str]:
    """Names that are bound somewhere in the snippet."""
    made = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            made.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.alias):
            made.add(node.asname or node.name.partition(".")[0])
    return made


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of every `from module import name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            yield from ((node.module, alias.name) for alias in node.names)


def check_imports(tree: ast.AST) -> None:
    """What is imported of ours exists, by the source: the module may not import here."""
    for module, name in imports(tree):
        if module.startswith("grpo_core"):
            spec = importlib.util.find_spec(module)
            assert spec is not None and spec.origin is not None, module
            assert name in names_made(ast.parse(Path(spec.origin).read_text("utf-8"))), name


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], dict[str, Any]]:
    """`run` in a fresh working directory; what a page has left is kept."""

    @cache
    def once(page: Path) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            folder = tmp_path_factory.mktemp(page.stem)
            patch.chdir(folder)
            torch.manual_seed(0)
            return run(page, folder)

    return once


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_runs_as_it_stands(page: Path, run_once: Callable[[Path], dict[str, Any]]) -> None:
    if not blocks(page, "python"):
        pytest.skip("no Python")
    run_once(page)


@pytest.mark.parametrize("text", NOT_RUN)
def test_what_is_not_run_is_in_the_documents(text: str) -> None:
    assert any(text in block.text for page in PAGES for block in blocks(page, "python"))


def test_a_name_that_is_not_defined_is_found(tmp_path: Path, monkeypatch) -> None:
    """Also in a function that is not called, where Python would say nothing."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```python\ndef reward(texts):\n    return re.findall('a', texts)\n```\n")
    with pytest.raises(AssertionError, match=r"page.md:2: \['re'\] not defined"):
        run(page, tmp_path)


def test_the_step_trains_on_nothing_behind_the_first_end_token(
    run_once: Callable[[Path], dict[str, Any]],
) -> None:
    """The whole step of docs/usage.md, held to a loop over its completions."""
    found = run_once(DOCS / "usage.md")
    ids, start = found["ids"].tolist(), found["prompt_length"]
    trained = []
    for tokens in ids:
        completion = tokens[start:]
        ends = completion.index(found["END"]) + 1 if found["END"] in completion else len(completion)
        # the token at place t is predicted at t - 1
        trained.append([start - 1 <= t < start - 1 + ends for t in range(len(tokens))])
    expected = torch.tensor(trained)
    assert 0 < expected[:, start - 1 : -1].float().mean() < 1, "expected some padding"
    assert torch.equal(found["step"].logp != 0, expected)
    assert torch.equal(found["step"].metrics["tokens"], expected.sum())


def test_the_surrogate_of_the_document_is_its_formula(
    backend: str, device: str, run_once: Callable[[Path], dict[str, Any]]
) -> None:
    """From user code, on every backend: −(r^p / p)·A, by autograd over plain PyTorch."""
    objective = run_once(DOCS / "objectives.md")["DAMPED"]
    assert isinstance(objective, Objective)
    (power,) = objective.surrogate.args
    logits = torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True)
    target, old_logp = torch.randint(11, (3, 5)), -2 + torch.randn(3, 5)
    advantage = torch.tensor([1.0, -2.0, 0.5])
    logp = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    ratio = (logp - old_logp).exp()
    loss = (-(ratio**power) / power * advantage[:, None]).mean()
    (expected,) = torch.autograd.grad(loss, logits)
    ours = logits.detach().float().to(device).requires_grad_()
    out = fused_loss(
        *(ours, target.to(device)),
        objective=objective,
        advantage=advantage.to(device),
        old_logp=old_logp.to(device),
        backend=backend,
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss.cpu().double(), loss)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.cpu().double(), expected, rtol=1e-4, atol=1e-7)


# --- commands ------------------------------------------------------------------------------------


class Parsed(BaseException):
    """What a command made of its options; raised so that nothing runs."""


def parse(command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """(parser, what it did not know) of `python -m grpo_core.command`."""
    real = argparse.ArgumentParser.parse_known_args

    def stop(self: Any, args: Any = None, namespace: Any = None) -> Any:
        raise Parsed(self, real(self, args, namespace)[1])

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(sys, "argv", [command, *arguments])
        try:
            runpy.run_module(f"grpo_core.{command}", run_name="__main__", alter_sys=True)
        except Parsed as parsed:
            return parsed.args
        except SystemExit:
            pytest.fail(f"grpo_core.{command} refuses {arguments}")
    raise AssertionError(f"{command}: expected a parser")


def commands(page: Path) -> Iterator[list[str]]:
    """Every command of the page's shell blocks, and those in its text, without its environment."""
    shell = "\n".join(block.text for block in blocks(page, "bash")).replace("\\\n", " ")
    text = BLOCK.sub("", page.read_text("utf-8"))
    inline = re.findall(r"`((?:python|pip|make|bash) [^`]+)`", text)
    for line in [*shell.splitlines(), *(one.replace("\n", " ") for one in inline)]:
        words = shlex.split(line.replace("...", ""), comments=True)
        while words and "=" in words[0]:
            words = words[1:]
        if words:
            yield words


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails for a command whose program, options or files do not exist."""
    if "-m" in words:
        module, *arguments = words[words.index("-m") + 1 :]
        package, _, command = module.partition(".")
        if package == "grpo_core" and command in COMMANDS:
            _, unknown = parse(
                command, [one for one in arguments if one not in ("&", "--help")], monkeypatch
            )
            assert not unknown, f"{module} has no {unknown}"
        elif package in ("grpo_core", "bench", "tests"):
            assert importlib.util.find_spec(module), module
    elif words[0] == "pip":
        setup = (ROOT / "setup.py").read_text("utf-8")
        for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
            assert all(f'"{extra}": [' in setup for extra in extras.split(",")), extras
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    for word in words:
        if word.startswith(("examples/", "bench/")) and "<" not in word and "." in word:
            assert (ROOT / word).exists(), word


@pytest.fixture
def with_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run that the commands may read."""
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN/metrics.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist_with_their_options(
    page: Path, with_a_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options of the YAML file that a page shows count as well."""
    (with_a_run / "run.yaml").touch()
    for block in blocks(page, "yaml"):
        (with_a_run / "run.yaml").write_text(block.text, "utf-8")
    for words in commands(page):
        check_command(words, monkeypatch)


@pytest.mark.usefixtures("with_a_run")
@pytest.mark.parametrize(
    "line",
    [
        "python -m grpo_core.train --no_such_option 1",
        "python -m grpo_core.reinforce --steps many",
        "python -m bench.no_such_module",
        "python examples/no_such_file.py",
        "pip install .[no_such_extra]",
        "make no_such_target",
    ],
)
def test_a_wrong_command_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_command(shlex.split(line), monkeypatch)


@pytest.mark.usefixtures("with_a_run")
def test_options_in_the_text_are_those_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    known = set(OTHERS)
    for command in COMMANDS:
        arguments = ["RUN"] if command in ("show", "plot") else []
        parser, _ = parse(command, arguments, monkeypatch)
        known |= parser._option_string_actions.keys()
    for page in PAGES:
        text = BLOCK.sub("", page.read_text("utf-8"))
        spans = re.findall(r"`([^`]+)`", text)
        named = {option for span in spans for option in re.findall(r"(?<!\S)--[a-z][\w-]+", span)}
        assert named <= known, (name_of(page), named - known)


# --- links and index -----------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Anchors of the page's headings, as GitHub makes them."""
    text = BLOCK.sub("", page.read_text("utf-8"))
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = sum(re.fullmatch(rf"{re.escape(kept)}(-\d+)?", one) is not None for one in found)
        found.add(f"{kept}-{number}" if number else kept)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text("utf-8")
    for page in set(DOCS.glob("*.md")) - {DOCS / "README.md"}:
        assert f"]({page.name})" in index, page.name


def test_every_extra_is_in_the_section_on_installing() -> None:
    section = (
        (ROOT / "README.md").read_text("utf-8").partition("## Install")[2].partition("\n## ")[0]
    )
    call = ast.parse((ROOT / "setup.py").read_text("utf-8")).body[-1]
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    (extras,) = (one.value for one in call.value.keywords if one.arg == "extras_require")
    for extra in ast.literal_eval(extras):
        assert f"`[{extra}]`" in section, extra


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 140


def test_every_folder_is_in_the_picture() -> None:
    shown = (DOCS / "architecture.md").read_text("utf-8")
    folders = [path.parent.name for path in (ROOT / "grpo_core").rglob("__init__.py")]
    assert not [name for name in folders if name != "grpo_core" and f"{name}/" not in shown]


# --- docs/api.md ---------------------------------------------------------------------------------


class Section(NamedTuple):
    """A name of docs/api.md, and the text below its heading."""

    module: str
    name: str
    text: str


def sections() -> list[Section]:
    """What docs/api.md describes."""
    found, module = [], ""
    for part in re.split(r"^(?=##)", API.read_text("utf-8"), flags=re.MULTILINE):
        heading, _, text = part.partition("\n")
        if heading.startswith("## "):
            module = heading.removeprefix("## ").strip()
        elif heading.startswith("### "):
            found.append(Section(module, heading.removeprefix("### ").strip(), text))
    return found


def public_names() -> set[tuple[str, str]]:
    """Names of the package itself, and every other one of ours that a snippet imports."""
    names = {("grpo_core", name) for name in grpo_core.__all__}
    for page in PAGES:
        for block in blocks(page, "python"):
            names |= set(imports(ast.parse(block.text)))
    ours = {(m, n) for m, n in names if m.partition(".")[0] == "grpo_core"}
    # functions of Triton have no signature of Python, see docs/objectives.md
    return {(module, name) for module, name in ours if not module.startswith("grpo_core.kernels")}


def thing(module: str, name: str) -> Any:
    """The object; where its module needs a package that is not here, a function of its source."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text("utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
                assert node.module is not None
                return thing(node.module, name)
        (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
        found.body = [ast.Pass()]
        namespace: dict[str, Any] = {}
        exec("from __future__ import annotations\n" + ast.unparse(found), namespace)
        return namespace[name]


def signature(module: str, name: str) -> str:
    """How docs/api.md shows it."""
    found = thing(module, name)
    if not callable(found):
        return f"{name}: {type(found).__name__}"
    factories = {}
    if dataclasses.is_dataclass(found):
        for field in dataclasses.fields(found):
            if field.default_factory is not dataclasses.MISSING:
                made = field.default_factory.__name__
                factories[field.name] = "..." if made == "<lambda>" else f"{made}()"
    shown = inspect.signature(found)
    parts, kind = [], None
    for parameter in shown.parameters.values():
        if parameter.name.startswith("_"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and kind is not parameter.KEYWORD_ONLY:
            parts += ["*"] if kind is not parameter.VAR_POSITIONAL else []
        kind = parameter.kind
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        text = stars.get(kind, "") + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {plain(parameter.annotation)}"
        if parameter.name in factories:
            text += f" = {factories[parameter.name]}"
        elif parameter.default is not parameter.empty:
            text += f" = {parameter.default!r}".replace("'", '"')
        parts.append(text)
    head = f"{'class' if inspect.isclass(found) else 'def'} {name}("
    tail = ")"
    if not inspect.isclass(found) and shown.return_annotation is not shown.empty:
        tail += f" -> {plain(shown.return_annotation)}"
    line = head + ", ".join(parts) + tail
    if len(line) <= 100:
        return line
    return "\n".join([head, *(f"    {part}," for part in parts), tail])


def plain(annotation: Any) -> str:
    """An annotation as it stands in the source."""
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.replace("'", '"')


def with_signature(section: Section) -> str:
    """The section's text with today's signature as its first block."""
    block = f"\n```pyi\n{signature(section.module, section.name)}\n```\n"
    rest = re.sub(r"\A\n```pyi\n.*?^```\n", "", section.text, flags=re.MULTILINE | re.DOTALL)
    return block + rest


def test_every_public_name_has_a_section() -> None:
    described = {(section.module, section.name) for section in sections()}
    assert public_names() <= described, sorted(public_names() - described)


@pytest.mark.parametrize("section", sections(), ids=lambda one: f"{one.module}.{one.name}")
def test_a_section_has_the_signature_and_an_example(section: Section) -> None:
    assert section.text == with_signature(section), "run python -m tests.test_documents"
    examples = "\n".join(m[2] for m in BLOCK.finditer(section.text) if m[1] == "python")
    assert section.name in names_read(ast.parse(examples)), "expected an example that uses it"


def write() -> None:
    """Writes today's signatures into docs/api.md."""
    text = API.read_text("utf-8")
    for section in sections():
        heading = f"### {section.name}\n"
        text = text.replace(heading + section.text, heading + with_signature(section))
    API.write_text(text, "utf-8")


if __name__ == "__main__":
    write()
