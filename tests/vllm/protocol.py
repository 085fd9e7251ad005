"""What a server answers: the same checks for the real one and for the stand-in of the quick suite.

Weights come as files. `Talk` asks; a worker's death is the last thing that it is asked for.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tests.vllm.real import ask


class Talk:
    """Requests to a server.

    Args:
        url: its address.
        folder: for weights.
        model: of the same kind as the server's.
    """

    def __init__(self, url: str, folder: Path, model: Any) -> None:
        self.url, self.folder, self.model = url, folder, model
        self.name = self.get("/v1/models")["data"][0]["id"]

    def get(self, route: str) -> Any:
        """The answer to a GET that succeeds."""
        status, said = ask(self.url + route)
        assert status == 200
        return said

    def post(self, route: str, **body: Any) -> tuple[int, Any]:
        """Status and answer of a POST."""
        return ask(self.url + route, body)

    def complete(self, **changes: Any) -> tuple[int, Any]:
        """Status and answer of a request for a completion."""
        body = {"model": self.name, "prompt": [5, 6, 7], "max_tokens": 8, "seed": 4, "logprobs": 0}
        body |= {"n": 1, "temperature": 1.0, "stop_token_ids": [1], "return_token_ids": True}
        return self.post("/v1/completions", **body | changes)

    def open(self) -> None:
        """Tells it the folder."""
        done = self.post("/init_weight_transfer_engine", init_info={"folder": str(self.folder)})
        assert done == (200, {"message": "Weight transfer initialized"})

    def update(self, file: str) -> tuple[int, Any]:
        """Status and answer of an update by this file, after a start."""
        started = self.post("/start_weight_update")
        assert started == (200, {"message": "Weight update started"})
        return self.post("/update_weights", update_info={"file": file})

    def save(self, name: str, **more: Any) -> str:
        """Writes the model's weights, and others."""
        weights = {name: tensor.clone() for name, tensor in self.model.named_parameters()}
        save_file(weights | more, self.folder / name)
        return name


def refusal(answer: tuple[int, Any], code: int = 400) -> str:
    """The message of an answer that refuses, in vLLM's form."""
    status, said = answer
    assert status == code and set(said["error"]) == {"message", "type", "param", "code"}
    assert said["error"]["code"] == code
    message: str = said["error"]["message"]
    return message


def failure(answer: tuple[int, Any]) -> str:
    """The message of an error within the worker."""
    message = refusal(answer, 500)
    assert message.startswith("Call to collective_rpc method failed: Worker failed with error")
    return message


def check_fresh(talk: Talk) -> None:
    """A start succeeds before there is a folder; the weights fail, and their end too."""
    assert talk.get("/weight_info") == {"weight_version": "default"}
    assert failure(talk.update("absent.safetensors"))
    assert "without a matching start" in failure(talk.post("/finish_weight_update"))
    assert "must be called before" in failure(talk.post("/update_weights", update_info={}))
    heal(talk)


def heal(talk: Talk) -> None:
    """Ends an update that is open or has failed; if one is open, a start is refused."""
    talk.post("/start_weight_update")
    done = talk.post("/finish_weight_update")
    assert done == (200, {"message": "Weight update finished"})


def check_configuration(talk: Talk, longest: int) -> None:
    """Length and dtype are told."""
    config = talk.get("/server_info?config_format=json")["vllm_config"]
    model = config["model_config"]
    assert (model["dtype"], model["max_model_len"]) == ("torch.float32", longest)
    assert model["logprobs_mode"] == "processed_logprobs"
    assert config["weight_transfer_config"]["backend"] == "grpo_folder"
    assert talk.get("/get_world_size") == {"world_size": 1}


def check_requests(talk: Talk, longest: int) -> None:
    """What is refused, and that completions are cut where the server's length ends."""
    assert refusal(talk.complete(prompt=[])) == "You must pass at least one prompt"
    long = refusal(talk.complete(prompt=[5] * (longest + 5)))
    assert f"maximum context length is {longest} tokens" in long
    full = refusal(talk.complete(prompt=[5] * longest))
    assert full.startswith("max_tokens must be at least 1, got 0.")
    unknown = refusal(talk.complete(prompt=[5, 99999]))
    assert unknown == "Token id 99999 is out of vocabulary"
    assert "out-of-vocab" in refusal(talk.complete(stop_token_ids=[99999]))
    assert "does not exist" in refusal(talk.complete(model="another"), 404)
    for route in ("/nowhere", "/v2/completions"):
        assert talk.post(route) == (404, {"detail": "Not Found"})
    status, said = talk.complete(prompt=[5] * (longest - 3), stop_token_ids=[])
    (choice,) = said["choices"]
    assert status == 200 and choice["finish_reason"] in ("length", "stop")
    assert len(choice["token_ids"]) <= 3 == longest - len([5] * (longest - 3))
    assert len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"])


def check_updates(talk: Talk) -> None:
    """A version is set by the end alone; a second start, a foreign file or field are refused."""
    talk.open()
    good = talk.save("good.safetensors")
    assert talk.update(good) == (200, {"message": "Weights updated"})
    twice = failure(talk.post("/start_weight_update"))
    assert "while a weight update is already active. Call finish_weight_update first." in twice
    done = talk.post("/finish_weight_update", weight_version="a/1")
    assert done == (200, {"message": "Weight update finished"})
    assert talk.get("/weight_info") == {"weight_version": "a/1"}
    assert "unexpected keyword" in failure(
        talk.post("/init_weight_transfer_engine", init_info={"x": 1})
    )
    # paths are left out of messages
    for file in ("absent.safetensors", str(talk.folder / ".." / "x.safetensors"), "/etc/passwd"):
        assert str(talk.folder) not in failure(talk.update(file))
        heal(talk)
    assert talk.get("/weight_info") == {"weight_version": "a/1"}
    assert talk.complete()[0] == 200


def check_failed_updates(talk: Talk) -> None:
    """After a part of a fused layer and an unknown name the next one fails, unless it is healed."""
    talk.open()
    good = talk.save("good.safetensors")
    weights = dict(talk.model.named_parameters())
    part = {name: weights[name].detach().clone() for name in weights if "q_proj" in name}
    bad = "bad.safetensors"
    save_file(part | {"model.unknown.weight": part[next(iter(part))].clone()}, talk.folder / bad)
    assert "no module or parameter named" in failure(talk.update(bad))
    assert "weight_loader" in failure(talk.update(good))
    assert talk.update(good)[0] == 200
    assert talk.post("/finish_weight_update", weight_version="a/2")[0] == 200
    assert talk.complete()[0] == 200
    assert "no module or parameter named" in failure(talk.update(bad))
    heal(talk)
    assert talk.update(good)[0] == 200
    assert talk.post("/finish_weight_update", weight_version="a/3")[0] == 200
    assert talk.complete()[0] == 200


def check_pause(talk: Talk) -> None:
    """Completions wait for the end of a pause, in which an update is safe."""
    talk.open()
    good, answers = talk.save("good.safetensors"), []
    assert talk.post("/pause?mode=wait") == (200, {"status": "paused"})
    assert talk.get("/is_paused") == {"is_paused": True}
    assert talk.post("/pause?mode=wait") == (200, {"status": "paused"})
    assert talk.update(good)[0] == 200
    thread = threading.Thread(target=lambda: answers.append(talk.complete()))
    thread.start()
    time.sleep(0.5)
    assert not answers
    assert talk.post("/reset_prefix_cache") == (200, {"success": True})
    assert talk.post("/finish_weight_update", weight_version="a/4")[0] == 200
    assert not answers
    assert talk.post("/resume") == (200, {"status": "resumed"})
    thread.join(60)
    assert answers[0][0] == 200
    assert talk.post("/resume") == (200, {"status": "resumed"})
    assert talk.get("/is_paused") == {"is_paused": False}


def check_death(talk: Talk) -> None:
    """A completion during an update ends the server."""
    talk.open()
    assert talk.post("/start_weight_update")[0] == 200
    said = refusal(talk.complete(), 500)
    assert said.startswith("EngineCore encountered an issue.")
    for _ in range(100):
        try:
            talk.post("/finish_weight_update")
        except OSError:
            return
        time.sleep(0.2)
    raise AssertionError("the server lives")
