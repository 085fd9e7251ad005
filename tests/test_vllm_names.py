"""What the adapters and their stand-in use of vLLM is what the installed one has, by its source.

Nothing of vLLM is imported or run: a folder with its source on the path is enough.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from grpo_core.trainer.rollout import Sampling
from grpo_core.trainer.vllm import nccl, server
from grpo_core.trainer.vllm.common import request_options
from tests import fake_vllm

FOUND = importlib.util.find_spec("vllm")
pytestmark = pytest.mark.skipif(FOUND is None, reason="there is no vLLM to compare with")
# what `VllmEngine` gives to LLM, beside the model
ENGINE = {
    *("dtype", "gpu_memory_utilization", "max_model_len", "enable_sleep_mode", "logprobs_mode"),
    *("generation_config", "weight_transfer_config", "return_sampling_mask", "enforce_eager"),
}
RL_CALLS = {
    "init_weight_transfer_engine": ["self", "request"],
    "start_weight_update": ["self"],
    "update_weights": ["self", "request"],
    "finish_weight_update": ["self", "weight_version"],
    "get_weight_version": ["self"],
}


def text(*names: str) -> str:
    """The source of the first of these files that there is."""
    assert FOUND is not None and FOUND.origin is not None
    root = Path(FOUND.origin).parent
    return next((root / name).read_text("utf-8") for name in names if (root / name).exists())


def functions(source: str) -> dict[str, list[str]]:
    """Argument names of every function, the last one of a name."""
    return {
        node.name: [a.arg for a in [*node.args.args, *node.args.kwonlyargs]]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def fields(source: str, name: str) -> set[str]:
    """What a class declares."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            body = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            return {part.target.id for part in body if isinstance(part.target, ast.Name)}
    raise AssertionError(f"no class {name}")


def test_llm() -> None:
    llm = functions(text("entrypoints/llm.py"))
    assert {"prompts", "sampling_params", "use_tqdm"} <= set(llm["generate"])
    assert llm["sleep"][:2] == ["self", "level"] and "wake_up" in llm
    assert "reset_prefix_cache" in llm
    # in a file of its own from 0.31 or so on
    rl = functions(text("entrypoints/rl/offline.py", "entrypoints/llm.py"))
    assert {name: rl[name] for name in RL_CALLS} == RL_CALLS
    assert fields(text("engine/arg_utils.py"), "EngineArgs") >= ENGINE
    assert "backend" in fields(text("config/weight_transfer.py"), "WeightTransferConfig")


def test_requests_and_outputs() -> None:
    named = set(request_options(Sampling(4), [1]))
    params = fields(text("sampling_params.py"), "SamplingParams")
    assert named | {"seed", "detokenize"} <= params
    assert set(vars(fake_vllm.SamplingParams())) <= params
    request = fields(text("entrypoints/openai/completion/protocol.py"), "CompletionRequest")
    assert named | {"model", "prompt", "seed", "return_token_ids"} <= request
    choice = fields(text("entrypoints/openai/completion/protocol.py"), "CompletionResponseChoice")
    assert {"token_ids", "logprobs", "finish_reason"} <= choice
    generate = text("entrypoints/scale_out/token_in_token_out/protocol.py")
    assert {"model", "token_ids", "sampling_params"} <= fields(generate, "GenerateRequest")
    # in a base class from 0.31 or so on
    base = "GenerateChoiceBase" if "GenerateChoiceBase" in generate else "GenerateResponseChoice"
    assert {"token_ids", "sampling_mask", "finish_reason"} <= fields(generate, base)
    assert fields(text("outputs.py"), "SamplingMask") == {"token_ids"}
    assert "return_sampling_mask" in fields(text("config/model.py"), "ModelConfig")
    output = fields(text("outputs.py"), "CompletionOutput")
    assert set(fake_vllm.CompletionOutput.__dataclass_fields__) <= output
    assert {"logprob", "rank", "decoded_token"} <= fields(text("logprobs.py"), "Logprob")


def test_weight_transfer() -> None:
    folder = "distributed/weight_transfer"
    packed, mine = text(f"{folder}/packed_tensor.py"), functions(text_of_fake())
    for name in ("packed_ipc_producer", "packed_nccl_broadcast_producer"):
        assert functions(packed)[name] == mine[name]
    piece = fields(packed, "PackedIpcChunk")
    assert set(fake_vllm.PackedIpcChunk.__dataclass_fields__) == piece
    update = fields(text(f"{folder}/ipc_engine.py"), "IPCWeightTransferUpdateInfo")
    assert {"names", "dtype_names", "shapes", "tensor_sizes", "ipc_handles_pickled"} <= update
    assert fields(text(f"{folder}/ipc_engine.py"), "IPCWeightTransferInitInfo") == {"packed"}
    common = text(f"{folder}/nccl_common.py")
    join = {"master_address", "master_port", "rank_offset", "world_size", "packed"}
    assert join <= fields(common, "NCCLWeightTransferInitInfo")
    assert functions(common)["trainer_init"][0] == "init_info"
    update = fields(text(f"{folder}/nccl_engine.py"), "NCCLWeightTransferUpdateInfo")
    assert update == {"names", "dtype_names", "shapes"}
    assert {"get_ip", "get_open_port"} <= functions(text("utils/network_utils.py")).keys()


def test_the_backend_of_the_plugin() -> None:
    """What `folder` subclasses and calls; the module itself imports vLLM."""
    folder = "distributed/weight_transfer"
    base = functions(class_of(text(f"{folder}/base.py"), "WeightTransferEngine"))
    ours = Path(server.__file__).with_name("folder.py").read_text("utf-8")
    mine = functions(class_of(ours, "FolderEngine"))
    assert len(mine) == 5 and {name: base[name] for name in mine} == mine
    assert functions(text(f"{folder}/factory.py"))["register_engine"][:2] == ["cls", "name"]
    reload = text("model_executor/model_loader/reload/layerwise.py")
    assert functions(reload)["initialize_layerwise_reload"] == ["model"]
    # it passes its arguments on
    assert functions(reload)["finalize_layerwise_reload"] == []
    assert functions(reload)["finalize_layerwise_processing"] == ["model", "model_config"]
    embedding = text("model_executor/layers/vocab_parallel_embedding.py")
    method = functions(class_of(embedding, "UnquantizedEmbeddingMethod"))
    assert method["process_weights_after_loading"] == ["self", "layer"]
    assert class_of(embedding, "ParallelLMHead")


def class_of(source: str, name: str) -> str:
    """The source of a class."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return ast.unparse(node)
    raise AssertionError(f"no class {name}")


def text_of_fake() -> str:
    """The stand-in's source."""
    return Path(fake_vllm.__file__).read_text("utf-8")


def test_routes() -> None:
    routers = (
        text("entrypoints/rl/online/api_router.py", "entrypoints/serve/dev/rlhf/api_router.py"),
        text("entrypoints/serve/dev/cache/api_router.py"),
        text("entrypoints/serve/dev/server_info/api_router.py"),
        text("entrypoints/openai/completion/api_router.py"),
        text("entrypoints/openai/models/api_router.py"),
        text("entrypoints/scale_out/token_in_token_out/api_router.py"),
    )
    known = re.findall(r'@router\.(get|post)\(\s*"([^"]+)"', "\n".join(routers))
    ours = "".join(Path(module.__file__).read_text("utf-8") for module in (server, nccl))
    asked = re.findall(r'(?:self|server|client)\.(get|post)\(\s*"/?([a-z0-9_/]+)', ours)
    assert len(set(asked)) >= 13
    assert {(how, f"/{route}") for how, route in asked} <= set(known)
