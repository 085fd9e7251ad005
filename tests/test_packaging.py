"""The layout that two packages named `kernels` force on us, and every way to install it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# one worker builds, the others need not build the same again
pytestmark = pytest.mark.xdist_group("packaging")
PROBE = """
import grpo_core, grpo_core.kernels.surrogates, torch
logits = torch.zeros(1, 2, 5, requires_grad=True)
out = grpo_core.fused_loss(logits, torch.zeros(1, 2, dtype=torch.int64),
                           objective="dapo", advantage=torch.ones(1))
out.loss.backward()
assert logits.grad.abs().sum() > 0
print(grpo_core.__file__)
"""


def clean_environment() -> dict[str, str]:
    """This process's, without what leads to the checkout."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Runs this interpreter, with this project's directory nowhere on its path but by `cwd`."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_kernels_are_real_files_without_a_package_of_their_own() -> None:
    assert (ROOT / "grpo_core/kernels").is_symlink()
    assert os.readlink(ROOT / "grpo_core/kernels") == "../kernels"
    assert not (ROOT / "kernels/__init__.py").exists()


TRANSFORMERS = """
import importlib.util, transformers
from transformers import Qwen2ForCausalLM
found = importlib.util.find_spec("kernels")
print("absent" if found is None or found.origin is None else found.origin)
import grpo_core.kernels.kl
"""


@pytest.mark.slow
def test_transformers_works_without_hugging_faces_kernels() -> None:
    """From the repository root, where a folder of that name lies."""
    assert python("-c", TRANSFORMERS, cwd=ROOT).strip() == "absent"


@pytest.mark.slow
def test_transformers_works_beside_hugging_faces_kernels(tmp_path: Path) -> None:
    """With the real package installed in front of us on the path, it wins over our folder."""
    python(
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path),
        "kernels",
        cwd=tmp_path,
    )
    origin = python("-c", TRANSFORMERS, cwd=ROOT, PYTHONPATH=str(tmp_path)).strip()
    assert origin.startswith(str(tmp_path))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is under version control: building leaves files behind."""
    copy = tmp_path_factory.mktemp("checkout") / "grpo_core"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "grpo_core", "kernels"):
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def distributions(checkout: Path) -> Path:
    """An sdist, and a wheel built from that sdist."""
    out = checkout.parent / "dist"
    python("-m", "build", "--no-isolation", "--outdir", str(out), str(checkout), cwd=out.parent)
    return out


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_kernels_as_files(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    (sdist,) = distributions.glob("*.tar.gz")
    kernels = {path.name for path in (ROOT / "kernels").glob("*.py")}
    names = zipfile.ZipFile(wheel).namelist()
    assert {Path(n).name for n in names if n.startswith("grpo_core/kernels/")} == kernels
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "bench/"))]
    assert "grpo_core/py.typed" in names
    with tarfile.open(sdist) as archive:
        held = [m for m in archive.getmembers() if "grpo_core/kernels/" in m.name]
        assert {Path(m.name).name for m in held} == kernels
        assert all(m.isfile() for m in held)


@pytest.mark.slow
@pytest.mark.parametrize(
    # the wheel is built from the sdist
    "how",
    [
        "wheel",
        "editable",
        *(pytest.param(how, marks=pytest.mark.rare) for how in ("sdist", "folder")),
    ],
)
def test_every_way_to_install_imports(
    checkout: Path, distributions: Path, tmp_path: Path, how: str
) -> None:
    """Into a fresh environment that sees this one's packages; run from elsewhere."""
    source = {
        "wheel": next(distributions.glob("*.whl")),
        "sdist": next(distributions.glob("*.tar.gz")),
        "folder": checkout,
        "editable": checkout,
    }[how]
    python("-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    there = tmp_path / "venv/bin/python"
    site = subprocess.run(
        [there, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (Path(site) / "outer.pth").write_text(sysconfig.get_path("purelib"))
    option = ["--editable"] if how == "editable" else []
    python(
        "-m",
        "pip",
        "--python",
        str(there),
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--force-reinstall",
        *option,
        str(source),
        cwd=tmp_path,
    )
    done = subprocess.run(
        [there, "-c", PROBE],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    installed = Path(done.stdout.strip())
    assert installed.is_relative_to(checkout if how == "editable" else tmp_path)


TYPED = """
from grpo_core import LossOutput, fused_loss
out: LossOutput = fused_loss(1)
reveal_type(fused_loss)
"""
SKIPPED = "\n".join(f"[mypy-{name}.*]\nfollow_imports = skip" for name in ("torch", "transformers"))


@pytest.mark.slow
def test_mypy_sees_the_types_of_the_wheel(distributions: Path, tmp_path: Path) -> None:
    """By py.typed: without it every name of an installed package is Any, and nothing is wrong."""
    pytest.importorskip("mypy")
    (wheel,) = distributions.glob("*.whl")
    python("-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    (site,) = (tmp_path / "venv").glob("lib/*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    (tmp_path / "use.py").write_text(TYPED)
    # the types of torch take a minute, and are not in question
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n{SKIPPED}\n")
    there = ["--python-executable", str(tmp_path / "venv/bin/python")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *there, "use.py"],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert 'Missing positional argument "target"' in done.stdout, done.stdout + done.stderr
    assert "-> grpo_core.loss.outputs.LossOutput" in done.stdout, done.stdout
    assert "py.typed" not in done.stdout, done.stdout


WITHOUT_TRITON = """
import sys
# found by nobody, as a package that is not installed
sys.modules["triton"] = None
import torch
from grpo_core import fused_loss, group_advantages, token_logp, RECIPES
logits = torch.randn(2, 3, 7, requires_grad=True)
target = torch.randint(0, 7, (2, 3))
ref = token_logp(logits, target).logp
for name in RECIPES:
    given = {"ref_logp": ref} if RECIPES[name].kl != "exact" else {"ref_logits": logits.detach()}
    fused_loss(logits, target, objective=name, rewards=torch.tensor([0., 1.]), group_size=2,
               **given).loss.backward()
assert logits.grad.abs().sum() > 0
for call in (lambda: token_logp(logits, target, backend="triton"),
             lambda: group_advantages(torch.zeros(2), 2, backend="triton")):
    try:
        call()
    except NotImplementedError as error:
        assert "needs the package triton" in str(error)
    else:
        raise AssertionError("a backend that is missing has answered")
print("ok")
"""


def test_without_triton_the_torch_backend_does_everything() -> None:
    """As on macOS and Windows."""
    assert python("-c", WITHOUT_TRITON, cwd=ROOT).strip() == "ok"
