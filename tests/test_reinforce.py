"""`python -m grpo_core.reinforce` on a model and prompts that are made here."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_core.reinforce import main
from grpo_core.runs.config import RunConfig
from grpo_core.runs.demo import decimals
from grpo_core.runs.model import check_positions
from grpo_core.runs.run import flat, open_logger
from grpo_core.trainer.measure import MACHINE
from grpo_core.trainer.trainer import Trainer
from tests.test_checkpoint import full_disk

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
]

KINDS = ("held out", "best", "worst")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, train.jsonl and rewards.py."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = decimals.build_tokenizer()
    decimals.build_model(tokenizer, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    pairs = decimals.held_out_pairs(20)
    records = [{"prompt": pair.question, "answer": pair.answer} for pair in pairs]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "rewards.py").write_text(
        "def digits(completions, **_):\n"
        "    return [sum(c.isdigit() for c in text) / 8 for text in completions]\n"
    )
    return folder


def options(files: Path, output: Path, *more: str) -> list[str]:
    """A run of three steps of two prompts."""
    given: dict[str, Any] = {
        "model": files / "model",
        "data": files / "train.jsonl",
        "output": output,
        "held_out": 4,
        "steps": 3,
        "prompts": 2,
        "group_size": 4,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "max_new_tokens": 8,
        "checkpoint_every": 1,
        "evaluate_every": 2,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    rewards = ["--rewards", f"{files / 'rewards.py'}:digits", "format"]
    # weights of these two
    weights = [] if "--rewards" in more else ["--reward_weights", "1", "0.2"]
    return [*words, *rewards, *weights, *more]


def records(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MACHINE} for line in lines]


def asked(files: Path) -> tuple[set[str], set[str]]:
    """The prompts that are held out, and those that are trained on."""
    lines = (files / "train.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    return set(prompts[:4]), set(prompts[4:])


@pytest.fixture(scope="module")
def straight(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    assert main(options(files, output)) == 0
    return output


def test_a_run_leaves_behind_what_it_promises(straight: Path, files: Path) -> None:
    assert json.loads((straight / "config.json").read_text())["steps"] == 3
    logged = records(straight)
    assert [record["step"] for record in logged] == [0, 1, 2, 3]
    reward = "digits"
    expected = logged[1][reward] + 0.2 * logged[1]["format"]
    assert logged[1]["reward"] == pytest.approx(expected, rel=1e-5)
    assert ["held_out" in record for record in logged] == [True, False, True, True]
    samples = [json.loads(line) for line in (straight / "samples.jsonl").read_text().splitlines()]
    kinds = {kind: [s["step"] for s in samples if s["kind"] == kind] for kind in KINDS}
    assert kinds["held out"] == [0] * 4 + [2] * 4 + [3] * 4
    assert kinds["best"] == [2, 3] and set(kinds["worst"]) <= {2, 3}
    assert {s["prompt"] for s in samples if s["kind"] == "held out"} <= asked(files)[0]
    assert {s["prompt"] for s in samples if s["kind"] != "held out"} <= asked(files)[1]
    for sample in samples:
        digits = sum(c.isdigit() for c in sample["completion"]) / 8
        assert sample["parts"][reward] == digits
        assert sample["reward"] == pytest.approx(digits + 0.2 * sample["parts"]["format"])
    results = json.loads((straight / "results.json").read_text())
    assert results["before"]["sampled"]["reward"] == logged[0]["held_out"]["reward"]
    trained = AutoModelForCausalLM.from_pretrained(straight / "model")
    start = AutoModelForCausalLM.from_pretrained(files / "model")
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    assert [path.name for path in sorted((straight / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000003",
    ]


def test_an_interrupted_run_goes_on(
    files: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Problems are drawn on from where they were; all is as in a straight run."""
    step = Trainer.step

    def terminated(self: Trainer) -> dict[str, Any]:
        signal.raise_signal(signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", terminated)
        assert main(options(files, tmp_path / "run")) == 128 + signal.SIGTERM
    assert main(options(files, tmp_path / "run", "--resume", "True")) == 0
    assert records(tmp_path / "run") == records(straight)
    kept = [(run / "samples.jsonl").read_text() for run in (tmp_path / "run", straight)]
    assert kept[0] == kept[1]
    ours, theirs = (run / "model/model.safetensors" for run in (tmp_path / "run", straight))
    assert ours.read_bytes() == theirs.read_bytes()


def test_the_same_command_again_deletes_nothing(
    files: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless it is told to: then it begins anew, and nothing of the old run is left."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert any("checkpoints" in path.parts for path in before)
    for more in ([], ["--seed", "5"]):
        with pytest.raises(SystemExit) as stop:
            main(options(files, run, *more))
        assert stop.value.code == 2
        assert "--resume True" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert main(options(files, run, "--steps", "2", "--overwrite", "True")) == 0
    assert [record["step"] for record in records(run)] == [0, 1, 2]
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-000001", "step-000002"]


def test_an_own_surrogate_from_a_file(files: Path, straight: Path, tmp_path: Path) -> None:
    """DAPO's clip written down once more trains the same model as the recipe, bit for bit."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import math\n"
        "from grpo_core import RECIPES, Surrogate\n"
        "from grpo_core.kernels.language import tl, triton\n\n\n"
        "@triton.jit\n"
        "def asymmetric(logp, log_ratio, advantage, low, high):\n"
        "    ratio = tl.exp(log_ratio)\n"
        "    free = ratio * advantage\n"
        "    bound = tl.minimum(tl.maximum(ratio, 1 - low), 1 + high) * advantage\n"
        "    slope = tl.where(free <= bound, -free, 0.0)\n"
        "    return -tl.minimum(free, bound), slope * 0, slope\n\n\n"
        "wide = RECIPES['dapo'].replace(surrogate=Surrogate(asymmetric, (0.2, 0.28), True))\n"
        "narrow = wide.replace(surrogate=Surrogate(asymmetric, (0.0, 0.0), True))\n"
    )
    models = {}
    for name in (f"{file}:wide", f"{file}:narrow", "dapo"):
        run = tmp_path / name.rpartition(":")[2]
        more = ["--steps", "2", "--objective", name, "--epochs", "2", "--learning_rate", "0.01"]
        assert main(options(files, run, *more)) == 0
        assert records(run)[2]["tokens"] > 0
        models[run.name] = (run / "model/model.safetensors").read_bytes()
    assert models["wide"] == models["dapo"] != models["narrow"]
    assert json.loads((tmp_path / "wide/config.json").read_text())["objective"] == f"{file}:wide"


def test_a_completion_that_the_model_cannot_read_is_refused(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before weights are read: the longest prompt and max_new_tokens fill its 256 positions."""
    tokenizer = decimals.build_tokenizer()
    lines = (files / "train.jsonl").read_text().splitlines()
    longest = max(len(tokenizer(json.loads(line)["prompt"])["input_ids"]) for line in lines)
    monkeypatch.setattr("grpo_core.runs.run.load_model", lambda *_: pytest.fail("too late"))
    with pytest.raises(SystemExit):
        main(options(files, tmp_path, "--max_new_tokens", str(257 - longest)))
    assert capsys.readouterr().err.endswith(
        f"error: --max_new_tokens: expected at most {256 - longest}, since the model has 256 "
        f"positions and the longest prompt {longest} tokens, got {257 - longest}; "
        "--longest_prompt leaves long prompts out\n"
    )
    with pytest.raises(ValueError, match=r"max_new_tokens: .* the longest prompt 300 tokens"):
        check_positions(RunConfig(model=str(files / "model"), data="d"), 300)
    check_positions(
        RunConfig(model=str(files / "model"), data="d", max_new_tokens=256 - longest), longest
    )


def test_another_run_or_none_cannot_be_resumed(
    files: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output, more, message in (
        (straight, ["--seed", "3"], "seed: expected 0 as in"),
        (tmp_path, [], "resume: expected an interrupted run, found no"),
    ):
        with pytest.raises(SystemExit):
            main(options(files, output, "--resume", "True", *more))
        assert message in capsys.readouterr().err
    assert (straight / "results.json").exists()


def test_options_from_a_file_and_an_adapter(
    files: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """YAML first, then what stands behind it; LoRA leaves an adapter.

    No bars of other libraries are drawn above the console, nor their advice to developers.
    """
    pytest.importorskip("peft")
    file = tmp_path / "run.yaml"
    settings = {
        "model": str(files / "model"),
        "data": str(files / "train.jsonl"),
        "rewards": ["accuracy", "format"],
        "steps": 9,
        "prompts": 2,
        "group_size": 2,
        "warmup_steps": 0,
        "max_new_tokens": 6,
        "lora_rank": 2,
        "beta": 0.1,
        "tokens_per_microbatch": 40,
        "template": None,
        "system": None,
        "gradient_checkpointing": True,
        "autocast": True,
        "held_out": 3,
        "eval_samples": 3,
        "eval_k": [1, 2],
        "eval_temperature": 0.7,
        "console": "off",
    }
    file.write_text(json.dumps(settings))
    run = tmp_path / "run"
    assert main([str(file), "--steps", "1", "--output", str(run)]) == 0
    assert json.loads((run / "config.json").read_text())["steps"] == 1
    assert (run / "model/adapter_model.safetensors").exists()
    (first,) = records(run)[1:]
    assert {"accuracy", "format", "kl"} <= first.keys()
    assert "Loading weights" not in capfd.readouterr().err
    assert not [w.message for w in recwarn if issubclass(w.category, FutureWarning)]
    figures = first["held_out"]
    several = {f"format/{name}" for name in ("avg@3", "pass@1", "pass@2")}
    assert {*several, "greedy_format", "greedy_accuracy"} <= figures.keys()
    assert figures["format/avg@3"] == pytest.approx(figures["format/pass@1"])
    after = json.loads((run / "results.json").read_text())["after"]
    assert after["sampled"]["format/pass@2"] == figures["format/pass@2"]
    assert after["greedy"]["format"] == figures["greedy_format"]


def test_a_run_does_not_go_on_with_other_data(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither with other held-out problems (the first four) nor with others to train on."""
    run, data = tmp_path / "run", tmp_path / "train.jsonl"
    given = options(files, run, "--data", str(data), "--steps", "2", "--max_new_tokens", "2")
    lines = (files / "train.jsonl").read_text().splitlines()
    data.write_text("\n".join(lines))
    assert main(given) == 0
    for changed in ([lines[1], lines[0], *lines[2:]], [*lines, lines[0]]):
        data.write_text("\n".join(changed))
        before = (run / "metrics.jsonl").read_text()
        with pytest.raises(SystemExit):
            main([*given, "--resume", "True"])
        message = capsys.readouterr().err
        assert "data_fingerprint: expected 20 problems, sha256" in message
        assert f"as in {run / 'config.json'}, got {len(changed)} problems, sha256" in message
        assert (run / "metrics.jsonl").read_text() == before
    # the same records with other blanks
    data.write_text("\n\n".join(lines) + "\n")
    assert main([*given, "--resume", "True"]) == 0


def test_a_full_disk_ends_a_run_with_a_line(files: Path, tmp_path: Path) -> None:
    with full_disk(20_000), pytest.raises(SystemExit, match=r"stopped: .*could not be written"):
        main(options(files, tmp_path / "run"))
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_generation_config_that_contradicts_itself(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is ignored and saved as it was; where it needs an end token, it is refused at once."""
    model = tmp_path / "model"
    shutil.copytree(files / "model", model)
    file = model / "generation_config.json"
    written = json.loads(file.read_text()) | {"top_p": 0.9, "pad_token_id": None}
    written.pop("do_sample", None)
    file.write_text(json.dumps(written))
    run = tmp_path / "run"
    with pytest.warns(UserWarning, match="rollouts ignore top_p of the model's"):
        assert main(options(files, run, "--model", str(model), "--steps", "2")) == 0
    saved = json.loads((run / "model/generation_config.json").read_text())
    assert saved["top_p"] == 0.9 and "pad_token_id" not in saved
    file.write_text(json.dumps(written | {"eos_token_id": None}))
    with pytest.raises(SystemExit):
        main(options(files, tmp_path / "other", "--model", str(model)))
    assert "top_p" in capsys.readouterr().err and not any((tmp_path / "other").iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_new_tokens", "5000"], "max_new_tokens: expected at most"),
        (["--rewards", "speed"], "rewards: expected math, accuracy, format, brevity or path"),
        (["--objective", "none"], "objective: expected one of"),
        (["--held_out", "20"], "held_out: expected fewer than the 20 problems, got 20"),
        (["--log", "paper"], "log: expected one of"),
        (["--temperature", "0"], "temperature: expected more than 0"),
        (["--data", "nowhere.jsonl"], "--data: expected a file, found no nowhere.jsonl"),
        (["--model", ""], "model: expected a value"),
        (["--eval_samples", "2", "--eval_k", "4"], "eval_k: expected 1 to 2, the eval_samples"),
        (["--eval_samples", "0"], "eval_samples: expected at least 1, got 0"),
        (["--eval_temperature", "-1"], "eval_temperature: expected 0 or more, got -1.0"),
        (["--console", "loud"], "--console: expected one of rich, plain, off, got 'loud'"),
        (["--system", "Think."], "no chat template"),
        (
            ["--data", "{files}/model/config.json"],
            "--data: {files}/model/config.json: expected a l",
        ),
        (["--data", "reasoning_gym:chain"], "--data: name: expected a data set of reasoning-gym"),
        (["--attention", "slow"], "--model: expected a causal language model in {files}/model: "),
        (["--template", "Question:"], "template: expected a text with {prompt} in it, got 'Quest"),
        (["--reward_weights", "1"], "reward_weights: expected 2, one for each of"),
        (["--rewards", "nowhere.py:f"], "rewards: expected a file, found no nowhere.py"),
        (["--rewards", "math", "accuracy", "math"], "rewards: expected names that differ"),
        (["--rewards", "{files}/mine.py:NUMBER"], "mine.py has no function 'NUMBER'"),
        (
            ["--rewards", "{files}/mine.py:truth"],
            "a function with missing a required argument: 'truth'",
        ),
        (["--rewards", "{files}/failing.py:f"], "raised AttributeError: module 'math' has no"),
    ],
)
def test_bad_options_are_named_before_anything_is_touched(
    more: list[str],
    message: str,
    files: Path,
    mine: str,
    straight: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(path.name for path in straight.iterdir())
    with pytest.raises(SystemExit):
        more = [word.replace("{files}", str(files)) for word in more]
        main(options(files, straight, "--overwrite", "True", *more))
    shown = capsys.readouterr()
    assert message.replace("{files}", str(files)) in shown.err
    # what a file of the user's raises is shown with its traceback
    assert shown.err.count("\n") == 1 or "raised " in message
    assert sorted(path.name for path in straight.iterdir()) == before


REWARDS = """
def pick(completions):
    return [None if len(text) % 2 else float(len(text)) for text in completions]
def never(**columns):
    return [None] * len(columns["answer"])
def broken(completions, answer):
    return [{}[true] for true in answer]
def table(completions):
    return {text: 1.0 for text in completions}
def truth(completions, truth):
    return [1.0] * len(truth)
NUMBER = 3
"""


@pytest.fixture(scope="module")
def mine(files: Path) -> str:
    """A file with rewards, good and bad."""
    (files / "mine.py").write_text(REWARDS)
    (files / "failing.py").write_text("import math\nmath.nothing\n")
    return str(files / "mine.py")


@pytest.mark.parametrize(
    ("name", "held_out", "message"),
    [
        ("broken", "4", "held-out problems: reward 'broken' raised KeyError: '"),
        ("table", "0", "step 1: reward 'table': expected a list of 8 numbers, one for every comp"),
    ],
)
def test_a_reward_that_fails_is_named_with_what_it_raised(
    name: str,
    held_out: str,
    message: str,
    mine: str,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--held_out", held_out, "--rewards", f"{mine}:{name}"]
    assert main(options(files, tmp_path, *more)) == 1
    shown = capsys.readouterr().err
    assert f"\nstopped: {message}" in shown
    # its own line, and none of ours
    assert ("return [{}[true] for true in answer]" in shown) == (name == "broken")
    assert "rewards.py" not in shown


def test_what_no_reward_applies_to_is_counted(mine: str, files: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no reward applies to"):
        more = ["--console", "off", "--max_new_tokens", "5", "--rewards", f"{mine}:pick"]
        assert main(options(files, tmp_path / "some", *more)) == 0
    steps = records(tmp_path / "some")[1:]
    assert sum(step["unscored"] for step in steps) > 0
    assert all(0 < step["unscored"] < 8 and step["tokens"] > 0 for step in steps)
    assert all(step["reward"] == step["pick"] for step in steps)
    with pytest.warns(UserWarning, match="no reward applies to 8 completions of step 1"):
        more = ["--console", "off", "--rewards", f"{mine}:never"]
        assert main(options(files, tmp_path / "none", *more)) == 0
    for step in records(tmp_path / "none")[1:]:
        assert (step["unscored"], step["tokens"], step["skipped_updates"]) == (8, 0, 0)


def test_weights_are_one_for_each_reward(mine: str) -> None:
    def weights(rewards: list[str], *given: float) -> list[float]:
        found: list[float] = RunConfig(
            model="m", data="d", rewards=rewards, reward_weights=[*given]
        ).weights
        return found

    assert RunConfig(model="m", data="d").weights == weights(["math", "format"]) == [1.0, 0.2]
    # of the default pair alone
    assert weights(["format", "math"]) == weights(["accuracy", "format"]) == [1.0, 1.0]
    assert weights(["math"]) == [1.0]
    assert weights(["math", "format", "brevity"]) == [1.0, 1.0, 1.0]
    assert weights(["math", "format"], 3.0, 0.5) == [3.0, 0.5]
    for rewards, given in ((["math"], [1.0, 0.2]), (["math", "format"], [1.0])):
        with pytest.raises(ValueError, match=rf"reward_weights: expected {len(rewards)}, one for"):
            weights(rewards, *given)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="reward_weights: expected finite numbers, got"):
            weights(["math"], bad)


def test_null_in_a_file_is_an_option_not_given(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`~` is null; text begins with a dash, and has braces of LaTeX, if it likes."""
    file, run = tmp_path / "run.yaml", tmp_path / "run"
    settings = [f"model: {files / 'model'}", f"data: {files / 'train.jsonl'}", "system: null"]
    settings += ["steps: 1", "warmup_steps: 0", "prompts: 1", "group_size: 2", "minibatches: ~"]
    settings += ["rewards: [format]", "reward_weights: ~", "max_new_tokens: 3", "output: ~"]
    more = ["--output", str(run), "--console", "off"]
    file.write_text("\n".join([*settings, "template: ~"]))
    assert main([str(file), *more]) == 0
    used = json.loads((run / "config.json").read_text())
    assert (used["system"], used["template"], used["minibatches"]) == ("", "", 2)

    run = tmp_path / "braces"
    file.write_text("\n".join([*settings, r"template: '-\boxed{} {prompt}'", "held_out: 1"]))
    assert main([str(file), *more, "--output", str(run)]) == 0
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    first = json.loads((files / "train.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] == r"-\boxed{} " + first["prompt"]

    file.write_text("\n".join([*settings, "template: 'Question:'"]))
    with pytest.raises(SystemExit):
        main([str(file), *more, "--output", str(tmp_path / "refused")])
    assert "template: expected a text with {prompt} in it, got 'Question:'" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("reward", "answer"), [("math", None), ("accuracy", ["3.8"]), ("math", "missing")]
)
def test_data_without_answers_is_refused_where_rewards_compare(
    reward: str, answer: Any, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (files / "train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    records[2]["answer"] = answer
    if answer == "missing":
        del records[2]["answer"]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(SystemExit):
        main(options(files, tmp_path, "--data", str(data), "--rewards", "format", reward))
    got = "the columns ['prompt']" if answer == "missing" else str(answer)
    assert f"record 2: answer: expected text or a number, got {got}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_logger_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=f"{name}.* not installed: pip install {name}"):
        open_logger(name, tmp_path, {})


def test_a_logger_gets_the_numbers_of_a_record(tmp_path: Path) -> None:
    record = {"step": 3, "stage": "grpo", "reward": 1, "held_out": {"reward": 0.5}, "bad": None}
    assert flat(record) == {"reward": 1.0, "held_out/reward": 0.5}
    pytest.importorskip("tensorboard")
    open_logger("tensorboard", tmp_path, {})(record)
    assert list((tmp_path / "tensorboard").iterdir())
