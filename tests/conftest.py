"""Set-up of the whole suite: which device the kernels run on, seeds, poisoned memory."""

from __future__ import annotations

import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # before the first import of a kernel
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402

try:
    import triton  # noqa: F401

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if HAS_TRITON and not HAS_GPU:
    from grpo_core.verify.interpreter import prepare_interpreter

    prepare_interpreter()

# the suite may share its two cores; a deadline would measure the neighbours
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


# every backend that tests choose from, and the one of tests that need no other
BACKENDS = ("torch", "cpu", "triton")
CPU_BACKEND = "cpu"


def is_interpreted(backend: str) -> bool:
    """Whether its kernels run in the interpreter, which is slow: tests then give it fewer cases."""
    return backend == "triton" and not HAS_GPU


# test files that run every kernel
INTERPRETED_QUICKLY = ("test_row_kernels.py", "test_advantages.py", "test_weights.py")
# how many cases of a test `make quick` has by a slow backend, spread over its parameters
PLAIN_CASES, INTERPRETED_CASES = 1, 3


def _quick_cases(backend: str, file: str) -> int | None:
    """How many cases of a test by this backend `make quick` has; None is all of them."""
    if is_interpreted(backend):
        return INTERPRETED_CASES if file in INTERPRETED_QUICKLY else 0
    return PLAIN_CASES if backend == "torch" else None


def _mark_slow_cases(items: list[pytest.Item]) -> None:
    """Marks `slow` what plain PyTorch and interpreted kernels need not repeat in `make quick`."""
    cases: dict[tuple[object, str], list[pytest.Item]] = {}
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if backend in BACKENDS and not {"rare", "slow"} & set(item.keywords):
            cases.setdefault((item.function, backend), []).append(item)
    for (_, backend), same in cases.items():
        count = _quick_cases(backend, same[0].path.name)
        if count is None or count >= len(same):
            continue
        kept = {len(same) * (2 * nth + 1) // (2 * count) for nth in range(count)}
        for place, item in enumerate(same):
            if place not in kept:
                item.add_marker(pytest.mark.slow)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips `gpu` tests without a GPU; leaves out `rare` ones unless -m names them."""
    if "rare" not in config.option.markexpr:
        rare = [item for item in items if "rare" in item.keywords]
        config.hook.pytest_deselected(items=rare)
        items[:] = [item for item in items if "rare" not in item.keywords]
    _mark_slow_cases(items)
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def poison():
    """Fills `torch.empty` with NaN, so that an element nobody writes is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; without a GPU, Triton is interpreted."""
    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("needs triton")
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    """Where the backend's tensors live."""
    return "cuda" if HAS_GPU and backend == "triton" else "cpu"
