"""The backends for a CPU: certain targets, threads and processes, what is compiled when."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from grpo_core import (
    RECIPES,
    backends,
    fused_linear_loss,
    fused_loss,
    linear_logp,
    linear_token_logp,
    token_logp,
)
from grpo_core.backends.cpu import _words, compiler, vectors
from grpo_core.backends.cpu.rows import kernels
from grpo_core.loss.reference import reference_loss
from grpo_core.objective.objective import Surrogate

ROOT = Path(__file__).parents[1]

BONUS = RECIPES["dapo"].replace(entropy_coef=0.1)


ON_CPU = pytest.mark.parametrize("backend", ["cpu", "torch"])


def dominated(margin: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(logits [4, 300], target): the target lies `margin` nats above words of all kinds."""
    torch.manual_seed(0)
    logits, target = torch.randn(4, 300, dtype=torch.float64) * 3, torch.arange(4) * 50
    logits[3, 7] = -math.inf
    logits.scatter_(1, target[:, None], logits.amax(1, keepdim=True) + margin)
    return logits.to(dtype), target


@ON_CPU
@pytest.mark.parametrize("margin", [40.0, 50.0, 80.0, 110.0, 700.0])
def test_a_target_far_above_all_others(margin: float, backend: str) -> None:
    """Its log-probability, −Σ of the others' odds, has all its digits; the gradient likewise."""
    logits, target = dominated(margin)
    exact = logits.double()
    mine = exact.gather(1, target[:, None])
    others = exact.scatter(1, target[:, None], -math.inf) - mine
    logp = -torch.log1p(others.exp().sum(1))
    torch.testing.assert_close(
        token_logp(logits, target, backend=backend).logp.double(),
        # below the least float32 number there is only 0
        torch.where(logp > -1e-45, 0.0, logp),
        rtol=5e-6,
        atol=2e-45,
    )
    leaf = logits.clone().requires_grad_()
    given = {"objective": BONUS, "advantage": torch.ones(4), "sequence_id": torch.arange(4)}
    fused_loss(leaf, target, backend=backend, **given).loss.backward()
    double = exact.requires_grad_()
    reference_loss(double, target, **given).loss.backward()
    # the target's own, 1 − p, is beyond float64; a row's gradients sum to 0
    others = double.grad.scatter(1, target[:, None], 0.0)
    expected = others.scatter(1, target[:, None], -others.sum(1, keepdim=True))
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=2e-5, atol=1e-38)


@ON_CPU
def test_nothing_but_the_target_is_allowed(backend: str) -> None:
    """All others −inf: probability 1, no entropy, no gradient, nothing dropped."""
    logits, target = torch.full((2, 70), -math.inf), torch.tensor([3, 69])
    logits.scatter_(1, target[:, None], 5.0).requires_grad_()
    out = fused_loss(
        logits,
        target,
        objective=BONUS,
        advantage=torch.ones(2),
        sequence_id=torch.arange(2),
        backend=backend,
    )
    out.loss.backward()
    assert out.logp.tolist() == out.entropy.tolist() == [0.0, 0.0]
    assert out.metrics["nonfinite_rows"] == 0
    assert not logits.grad.any()


@ON_CPU
@pytest.mark.parametrize("N", [1, 21])
@pytest.mark.parametrize(("V", "masked"), [(70_016, False), (33_001, True)])
def test_threads_do_not_change_a_bit(V: int, masked: bool, N: int, backend: str) -> None:
    """A row is summed by one thread, even where it is alone; shares end where rows may."""
    torch.manual_seed(2)
    logits, target = torch.randn(N, V) * 3, torch.randint(0, V, (N,))
    if masked and N > 1:
        target[torch.rand(N) < 0.4] = -100
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf = logits.clone().requires_grad_()
            out = fused_loss(
                leaf,
                target,
                objective=BONUS,
                advantage=torch.ones(N),
                sequence_id=torch.arange(N) // 4,
                backend=backend,
            )
            out.loss.backward()
            assert torch.get_num_threads() == threads
            found.append((out.logp, out.entropy, leaf.grad))
    finally:
        torch.set_num_threads(before)
    for one, other in pairwise(found):
        assert all(map(torch.equal, one, other))


@ON_CPU
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(default: torch.dtype, backend: str) -> None:
    """Results have the same bits, with runs of three rows between masked ones."""
    logits, target = torch.randn(40, 70), torch.arange(40)
    target[::4] = -100
    found = []
    given = {"advantage": torch.linspace(-1, 1, 40), "sequence_id": torch.arange(40)}
    for dtype in (torch.float32, default):
        leaf = logits.clone().requires_grad_()
        try:
            torch.set_default_dtype(dtype)
            out = fused_loss(leaf, target, objective=BONUS, backend=backend, **given)
            out.loss.backward()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append((out.loss.detach(), out.logp, out.entropy, leaf.grad))
    assert all(map(torch.equal, *found))


@ON_CPU
def test_a_certain_target_whose_reference_forbids_other_words(backend: str) -> None:
    """They have no probability left: the KL is the target's, and the row has no gradient."""
    logits, ref_logits = torch.zeros(2, 70), torch.zeros(2, 70)
    logits[:, 3] = torch.tensor([2000.0, 1.0])
    ref_logits[0, 5:9] = -math.inf
    leaf = logits.requires_grad_()
    out = fused_loss(
        leaf,
        torch.tensor([3, 3]),
        objective=RECIPES["grpo"].replace(kl="exact", beta=0.1),
        ref_logits=ref_logits,
        advantage=torch.ones(2),
        sequence_id=torch.arange(2),
        backend=backend,
    )
    out.loss.backward()
    assert out.metrics["nonfinite_rows"] == 0
    assert out.kl[0].item() == pytest.approx(math.log(66))
    assert not leaf.grad[0].any()
    assert leaf.grad[1].all()


@ON_CPU
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_the_entropy_of_a_broken_row_is_not_that_of_a_certain_one(
    broken: float, backend: str
) -> None:
    """Nothing is known of it: NaN, as its log-probability, and as in the reference."""
    logits = torch.zeros(2, 70)
    logits[0, 5] = broken
    found = token_logp(logits, torch.tensor([3, 3]), backend=backend)
    assert found.logp.isnan().tolist() == found.entropy.isnan().tolist() == [True, False]


@ON_CPU
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_an_infinite_kl_that_is_only_measured_leaves_the_gradient_alone(
    backend: str, entropy_coef: float
) -> None:
    """With beta 0; in the last row the forbidden token is nearly certain."""
    logits, ref_logits = torch.randn(3, 70), torch.randn(3, 70)
    logits[2, 7] = 30.0
    ref_logits[0, 5:9] = ref_logits[2, 7] = -math.inf
    given = {
        "objective": RECIPES["grpo"].replace(beta=0.0, entropy_coef=entropy_coef, kl="exact"),
        "advantage": torch.ones(3),
        "sequence_id": torch.arange(3),
        "backend": backend,
    }
    found = []
    for reference in (ref_logits, None):
        leaf = logits.clone().requires_grad_()
        out = fused_loss(leaf, torch.tensor([1, 2, 3]), ref_logits=reference, **given)
        out.loss.backward()
        found.append(leaf.grad)
        assert out.metrics["nonfinite_rows"] == 0
    assert torch.equal(*found)


@ON_CPU
def test_a_masked_token_of_a_broken_sequence_has_ratio_0(backend: str) -> None:
    """The ratio of the sequence is NaN, and every token that counts is left out."""
    logits = torch.zeros(1, 3, 5)
    logits[0, 0, 1] = math.nan
    out = fused_loss(
        logits,
        torch.zeros(1, 3, dtype=torch.int64),
        objective="gspo",
        advantage=torch.ones(1),
        mask=torch.tensor([[True, False, True]]),
        backend=backend,
    )
    assert out.ratio[0, 1] == 0
    assert out.ratio[0, [0, 2]].isnan().all()
    assert out.metrics["nonfinite_rows"] == 2


@ON_CPU
def test_a_masked_token_has_ratio_0_whatever_its_old_logp(backend: str) -> None:
    """VESPO's loss waits for its sequences: the ratio is made from vectors."""
    out = fused_loss(
        torch.zeros(1, 3, 5),
        torch.zeros(1, 3, dtype=torch.int64),
        objective="vespo",
        advantage=torch.ones(1),
        mask=torch.tensor([[False, True, False]]),
        old_logp=torch.tensor([[-1e4, -1.0, math.nan]]),
        backend=backend,
    )
    assert out.ratio[0, [0, 2]].tolist() == [0.0, 0.0]
    assert out.ratio[0, 1] == pytest.approx(math.e / 5)


def test_nothing_of_the_process_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread that begins meanwhile finds torch as the caller has set it up."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a setting of the whole process is changed")

    for name in (
        "manual_seed",
        "set_default_device",
        "set_default_dtype",
        "set_float32_matmul_precision",
        "set_flush_denormal",
        "set_num_interop_threads",
        "set_num_threads",
        "set_rng_state",
        "use_deterministic_algorithms",
    ):
        monkeypatch.setattr(torch, name, refuse)
    environment, state = dict(os.environ), torch.get_rng_state()
    target, advantage = torch.tensor([3, -100, 7]), torch.ones(3)
    packed = {"advantage": advantage, "sequence_id": torch.arange(3), "objective": BONUS}
    for V in (70, 40_000):
        logits, matrix = torch.zeros(3, V, requires_grad=True), torch.zeros(V, 4)
        hidden = torch.zeros(3, 4, requires_grad=True)
        token_logp(logits, target)
        linear_token_logp(hidden, matrix, target)
        fused_loss(logits, target, **packed).loss.backward()
        fused_linear_loss(hidden, matrix, target, **packed).loss.backward()
        linear_logp(hidden, matrix, target).logp.sum().backward()
    assert dict(os.environ) == environment
    assert torch.equal(torch.get_rng_state(), state)


@numba.njit
def load(row: Any, block: Any) -> None:
    """Compiled functions have no entry for Python."""
    vectors.load(row, 0, len(row), block)


@numba.njit
def store(block: Any, row: Any) -> None:
    """The way back."""
    vectors.store(block, len(row), row, 0)


def scalar(function: Any, x: Tensor) -> Tensor:
    """A compiled function of one float32, at every element of x."""
    out = np.empty(x.numel(), np.float32)

    @numba.njit(fastmath=False)
    def over(x: Any, out: Any) -> None:
        for i in range(len(x)):
            out[i] = function(x[i])

    over(x.numpy(), out)
    return torch.from_numpy(out)


@pytest.mark.parametrize("step", [61, pytest.param(1, marks=pytest.mark.rare)])
def test_powers_of_two_are_exact_to_one_unit_in_the_last_place(step: int) -> None:
    """Every `step`th float32 of [−126, −2⁻²⁴] and 0; below −126.5 it is 0, and NaN stays NaN."""
    first = torch.tensor(2.0**-24).view(torch.int32).item()
    last = torch.tensor(126.0).view(torch.int32).item()
    worst = 0.0
    for bits in torch.arange(first, last + 1, step, dtype=torch.int32).split(2**24):
        c = -bits.view(torch.float32)
        found, exact = scalar(vectors.exp2, c).double(), c.double().exp2()
        unit = torch.exp2(exact.log2().floor() - 23)
        worst = max(worst, float(((found - exact) / unit).abs().max()))
    assert worst < 1.0
    edge = torch.tensor([0.0, -126.51, -127.0, math.nan])
    assert scalar(vectors.exp2, edge)[:3].tolist() == [1.0, 0.0, 0.0]
    assert scalar(vectors.exp2, edge)[3].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_are_converted_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """All 65,536 words in; out, ties to even, numbers too large and those that vanish."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    block = np.empty(words.numel(), np.float32)
    row = words.view(dtype)
    load(_words(row), block)
    assert torch.equal(torch.from_numpy(block).nan_to_num(7.0), row.float().nan_to_num(7.0))
    near = row[row.isfinite()].float()
    spread = torch.linspace(0.998, 1.002, 2001)
    numbers = (near[::37, None] * spread).flatten()
    halves = (near[1:] + near[:-1])[(near[1:] + near[:-1]).isfinite()] / 2
    numbers = torch.cat([numbers, halves, torch.tensor([3e38, -3e38, 1e-40, 0.0, -0.0])])
    rounded = torch.empty(numbers.numel(), dtype=dtype)
    store(numbers.numpy(), _words(rounded))
    assert torch.equal(rounded, numbers.to(dtype))


def given(N: int, **more: Any) -> dict[str, Any]:
    """Arguments of a packed batch of N sequences with one token each."""
    vectors = {"advantage": torch.linspace(-1, 1, N), "sequence_id": torch.arange(N)}
    return {"objective": BONUS, "backend": "cpu", **vectors, **more}


def results(logits: Tensor, target: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    """logp, entropy and gradient."""
    leaf = logits.clone().requires_grad_()
    out = fused_loss(leaf, target, **arguments)
    out.loss.backward()
    return out.logp, out.entropy, leaf.grad


def test_nothing_is_compiled_after_the_first_call_of_a_dtype() -> None:
    """Sizes, layouts, temperatures, objectives, own surrogates and absent arguments are data."""
    logits, target = torch.randn(6, 70), torch.arange(6)
    results(logits, target, **given(6))
    kernel = kernels().loss
    before = len(kernel.signatures)
    for name in ("grpo", "cispo", "sapo", "dr_grpo", "dppo"):
        for V, temperature in ((1, 1.0), (33, 0.7), (4097, 2.0)):
            rows, words = torch.randn(3, V), torch.zeros(3, dtype=torch.int64)
            more = {"old_logp": torch.zeros(3)} if V == 33 else {"mask": torch.ones(3)}
            more |= {"ref_logp": torch.zeros(3)} if RECIPES[name].beta or V == 1 else {}
            more |= {"objective": name, "temperature": temperature, "normalizer": 3.0}
            results(rows, words, **given(3, **more))
            results(torch.randn(6, V + 1)[::2, 1:], words, **given(3, **more))
    assert len(kernel.signatures) == before


@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_every_row_is_computed_once(name: str) -> None:
    """Of several shares no row is left out, and none read again as its own gradient."""
    N, V = 200, 1000
    logits, target = torch.randn(N, V), torch.randint(0, V, (N,))
    vectors = {"objective": RECIPES[name].replace(entropy_coef=0.1), "inplace": True}
    vectors["old_logp"] = torch.full((N,), -7.0)
    found = []
    for backend in ("cpu", "torch"):
        leaf = logits.clone().requires_grad_()
        out = fused_loss(leaf * 1.0, target, **given(N, backend=backend, **vectors))
        out.loss.backward()
        found.append((out.logp, out.entropy, leaf.grad))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-9)


def test_two_python_threads_at_once() -> None:
    """Both share the helpers, and both get what each gets alone."""
    logits, target = torch.randn(2, 64, 20_000), torch.randint(0, 20_000, (2, 64))
    alone = [results(*rows, **given(64)) for rows in zip(logits, target, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            jobs = [
                pool.submit(results, *rows, **given(64))
                for rows in zip(logits, target, strict=True)
            ]
            for job, expected in zip(jobs, alone, strict=True):
                assert all(map(torch.equal, job.result(), expected))


class Rows(torch.utils.data.Dataset):
    """A dataset whose workers call the kernels."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        logits = torch.arange(40 * 9000).remainder(97).view(40, 9000) / 8 + index
        return results(logits, torch.arange(40), **given(40))[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_inside_the_workers_of_a_data_loader(start: str) -> None:
    """A forked worker has none of the threads that its parent had."""
    if start not in torch.multiprocessing.get_all_start_methods():
        pytest.skip("no such start method here")
    before, rows = torch.get_num_threads(), Rows()
    try:
        torch.set_num_threads(2)
        expected = [rows[index] for index in range(4)]
        loader = torch.utils.data.DataLoader(
            rows, batch_size=None, num_workers=2, multiprocessing_context=start
        )
        assert all(map(torch.equal, loader, expected))
    finally:
        torch.set_num_threads(before)


def test_a_forked_process_with_threads_of_its_own() -> None:
    """The parent's helpers are gone in the child, which starts its own.

    No operation of torch is large enough there for its OpenMP, which does not survive a fork.
    """
    code = """
import os, torch
from grpo_core import token_logp
torch.set_num_threads(3)
logits, target = torch.arange(40 * 20_000.0).remainder(97).view(40, -1) / 8, torch.arange(40)
first = token_logp(logits, target, backend="cpu").logp
child = os.fork()
same = torch.equal(first, token_logp(logits, target, backend="cpu").logp)
if not child:
    os._exit(0 if same else 1)
assert same and os.waitpid(child, 0)[1] == 0
"""
    run_python(code)


def test_a_thread_that_outlives_the_main_one() -> None:
    """No helper can be started there, so it computes alone."""
    code = """
import atexit, threading, torch
from grpo_core import token_logp
torch.set_num_threads(3)
logits, target = torch.arange(40 * 20_000.0).remainder(97).view(40, -1) / 8, torch.arange(40)
first = token_logp(logits, target, backend="cpu").logp
def again():
    print(torch.equal(first, token_logp(logits, target, backend="cpu").logp))
def wait():
    threading.main_thread().join()
    again()
threading.Thread(target=wait).start()
atexit.register(again)
"""
    assert run_python(code) == "True\nTrue\n"


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_of_autograd(mode: type) -> None:
    """Tensors made in inference mode have no version, and are read all the same."""
    logits, target = torch.randn(4, 300), torch.arange(4)
    expected = token_logp(logits, target, backend="cpu")
    with mode():
        found = token_logp(logits.clone(), target, backend="cpu")
    assert torch.equal(found.logp, expected.logp)


def run_python(code: str, **environment: str) -> str:
    """Runs it in a process of its own, in the repository; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_compiles_and_loads_nothing_of_numba() -> None:
    assert run_python("import sys, grpo_core; print('numba' in sys.modules)") == "False\n"


CALL = """
import torch
from grpo_core import token_logp
from grpo_core.backends.cpu.rows import kernels
token_logp(torch.zeros(2, 8), torch.tensor([0, 1]), backend="cpu")
stats = kernels().stats.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_compiled_code_is_kept_where_that_can_be_written(tmp_path: Path) -> None:
    """The second process loads what the first has compiled."""
    assert run_python(CALL, NUMBA_CACHE_DIR=str(tmp_path)) == "0 1\n"
    assert run_python(CALL, NUMBA_CACHE_DIR=str(tmp_path)) == "1 0\n"


def test_no_folder_for_compiled_code_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled in memory, in every process anew."""

    def refuse(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: ("compiled in memory", function)

    monkeypatch.setattr(compiler.numba, "njit", refuse)
    assert compiler.compile_kernel(len) == ("compiled in memory", len)


def plain(logp, log_ratio, advantage, strength):  # type: ignore[no-untyped-def]
    """ℓ = −A·(logp + strength·log_ratio), in no language in particular."""
    loss = -advantage * (logp + strength * log_ratio)
    return loss, -advantage + loss * 0, -advantage * strength + loss * 0


HIDDEN = {"strength": 0.5}


def beyond_numba(logp, log_ratio, advantage):  # type: ignore[no-untyped-def]
    """The same with its parameter in a dictionary, which Numba cannot compile."""
    return plain(logp, log_ratio, advantage, HIDDEN["strength"])


def test_a_surrogate_of_a_user() -> None:
    """Compiled where it can be; else one warning says why, and the results are the same."""
    logits, target = torch.randn(6, 70), torch.arange(6)
    vectors = {"old_logp": torch.full((6,), -4.0), "ref_logp": torch.full((6,), -4.0)}
    spec = RECIPES["grpo"].replace(beta=0.1, entropy_coef=0.01)
    one = spec.replace(surrogate=Surrogate(plain, (0.5,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = results(logits, target, **given(6, objective=one, **vectors))
    other = spec.replace(surrogate=Surrogate(beyond_numba))
    with pytest.warns(UserWarning, match="beyond_numba: Numba cannot compile it"):
        found = results(logits, target, **given(6, objective=other, **vectors))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = results(logits, target, **given(6, objective=other, **vectors))
    for ours, compiled, once_more in zip(found, expected, again, strict=True):
        torch.testing.assert_close(ours, compiled, rtol=1e-6, atol=1e-7)
        assert torch.equal(ours, once_more)


def closed_over(strength: float) -> Any:
    """`plain` with its parameter in a closure."""

    def surrogate(logp, log_ratio, advantage):  # type: ignore[no-untyped-def]
        loss = -advantage * (logp + strength * log_ratio)
        return loss, -advantage + loss * 0, -advantage * strength + loss * 0

    return surrogate


def with_default(logp, log_ratio, advantage, strength=0.5):  # type: ignore[no-untyped-def]
    """`plain` with a default."""
    loss = -advantage * (logp + strength * log_ratio)
    return loss, -advantage + loss * 0, -advantage * strength + loss * 0


def by_keyword(logp, log_ratio, advantage, *, strength=0.5):  # type: ignore[no-untyped-def]
    """`plain` with a parameter that has a name alone."""
    loss = -advantage * (logp + strength * log_ratio)
    return loss, -advantage + loss * 0, -advantage * strength + loss * 0


@ON_CPU
@pytest.mark.filterwarnings("ignore:by_keyword. Numba cannot compile it")
@pytest.mark.parametrize("function", [closed_over(0.5), with_default, by_keyword])
def test_closures_and_defaults_of_a_surrogate(function: Any, backend: str) -> None:
    logits, target = torch.randn(6, 70), torch.arange(6)
    spec = RECIPES["dapo"].replace(surrogate=Surrogate(plain, (0.5,)))
    more = {"old_logp": torch.full((6,), -4.0), "backend": backend}
    expected = results(logits, target, **given(6, objective=spec, **more))
    spec = spec.replace(surrogate=Surrogate(function))
    found = results(logits, target, **given(6, objective=spec, **more))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def refusing(logp, log_ratio, advantage, strength):  # type: ignore[no-untyped-def]
    """A surrogate that checks its parameter."""
    if strength < 1:
        raise ValueError("strength below 1")
    return -advantage * logp, -advantage, advantage * 0


def importing(logp, log_ratio, advantage):  # type: ignore[no-untyped-def]
    """A surrogate with a statement that Numba cannot read."""
    import math as _  # noqa: F401

    return -advantage * logp, -advantage, advantage * 0


def test_what_a_compiled_function_cannot_do() -> None:
    """An exception reaches the caller, and a statement unknown to Numba is no error."""
    logits, target = torch.randn(6, 70), torch.arange(6)
    spec = RECIPES["dapo"].replace(surrogate=Surrogate(refusing, (0.5,)))
    with pytest.warns(UserWarning, match="refusing"), pytest.raises(ValueError, match="below 1"):
        results(logits, target, **given(6, objective=spec))
    spec = spec.replace(surrogate=Surrogate(importing))
    with pytest.warns(UserWarning, match="importing"):
        results(logits, target, **given(6, objective=spec))


def with_nine(logp, log_ratio, advantage, a, b, c, d, e, f, g, h, strength=7.0):  # type: ignore[no-untyped-def]
    """`plain`, whose ninth parameter is not lost though it has a default."""
    return (
        -advantage * (logp + strength * log_ratio),
        -advantage + logp * 0,
        -advantage * strength + logp * 0,
    )


def test_more_parameters_than_compiled_surrogates_take() -> None:
    logits, target = torch.randn(6, 70), torch.arange(6)
    spec = RECIPES["dapo"].replace(surrogate=Surrogate(plain, (0.5,)))
    more = {"old_logp": torch.full((6,), -4.0)}
    expected = results(logits, target, **given(6, objective=spec, **more))
    spec = spec.replace(surrogate=Surrogate(with_nine, (1.0,) * 8 + (0.5,)))
    with pytest.warns(UserWarning, match="more than 8 parameters"):
        found = results(logits, target, **given(6, objective=spec, **more))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_an_interpreting_numba_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """NUMBA_DISABLE_JIT, which its users debug with."""
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    backends.default_backend.cache_clear()
    try:
        assert backends.default_backend("cpu") == "torch"
        with pytest.raises(NotImplementedError, match="NUMBA_DISABLE_JIT"):
            backends.choose_backend("cpu", torch.zeros(1))
    finally:
        backends.default_backend.cache_clear()


def test_without_numba_plain_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    backends.default_backend.cache_clear()
    try:
        assert backends.default_backend("cpu") == "torch"
        with pytest.raises(NotImplementedError, match='"cpu" needs the package numba'):
            backends.choose_backend("cpu", torch.zeros(1))
    finally:
        backends.default_backend.cache_clear()


def test_a_numba_that_is_too_old_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its LLVM would end the process."""
    monkeypatch.setattr(numba, "version_info", (0, 61, 2))
    backends.default_backend.cache_clear()
    try:
        assert backends.default_backend("cpu") == "torch"
        with pytest.raises(NotImplementedError, match=r"numba >= 0\.62, got "):
            backends.choose_backend("cpu", torch.zeros(1))
    finally:
        backends.default_backend.cache_clear()


def test_a_tensor_elsewhere_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="needs tensors on a CPU, got meta"):
        backends.choose_backend("cpu", torch.empty(1, device="meta"))
