"""The stand-in for `vllm serve`: routes, answers and errors as `tests/vllm` finds them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.fake_vllm import Refused, SamplingParams, Worker


@contextmanager
def server(
    worker: Worker, logprobs_mode: str = "processed_logprobs", backend: str | None = ""
) -> Iterator[str]:
    """`vllm serve`, at the address it yields; without a backend of None, that of the worker."""
    config = {
        "model_config": {
            "logprobs_mode": logprobs_mode,
            "return_sampling_mask": worker.keeps,
            "dtype": str(worker.model.dtype),
            "max_model_len": worker.longest,
        },
        "weight_transfer_config": None if backend is None else {"backend": worker.backend},
    }
    gets: dict[str, Callable[[], Any]] = {
        "/server_info": lambda: {"vllm_config": config},
        "/v1/models": lambda: {"data": [{"id": worker.name, "max_model_len": worker.longest}]},
        "/weight_info": lambda: {"weight_version": worker.call("get_weight_version")},
        "/get_world_size": lambda: {"world_size": 1},
        "/is_paused": lambda: {"is_paused": worker.paused},
    }

    def act(method: str, message: str, *names: str) -> Callable[[dict[str, Any]], Any]:
        """A route that calls the worker with fields of the body, and answers with a message."""

        def answer(body: dict[str, Any]) -> dict[str, str]:
            worker.call(method, *(body.get(name) for name in names))
            return {"message": message}

        return answer

    posts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "/init_weight_transfer_engine": act(
            "init_weight_transfer_engine", "Weight transfer initialized", "init_info"
        ),
        "/start_weight_update": act("start_weight_update", "Weight update started"),
        "/update_weights": act("update_weights", "Weights updated", "update_info"),
        "/finish_weight_update": act(
            "finish_weight_update", "Weight update finished", "weight_version"
        ),
        "/reset_prefix_cache": lambda _: {"success": worker.reset_prefix_cache()},
        "/pause": lambda _: worker.pause() or {"status": "paused"},
        "/resume": lambda _: worker.resume() or {"status": "resumed"},
        "/v1/completions": lambda b: completions(worker, b, logprobs_mode),
        "/inference/v1/generate": lambda b: generate(worker, b, logprobs_mode),
    }

    class Handler(BaseHTTPRequestHandler):
        def answer(self, act: Callable[[], Any] | None) -> None:
            status, said = answer_of(act)
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            if worker.dead:
                # the process ends; later connections are refused
                threading.Thread(target=found.close, daemon=True).start()

        def do_GET(self) -> None:
            self.answer(gets.get(self.path.partition("?")[0]))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if worker.drops and "completions" in self.path:
                worker.drops -= 1
                if worker.drops % 2:
                    # an answer that breaks off
                    self.send_response(200)
                    self.send_header("Content-Length", "9")
                    self.end_headers()
                return
            path, _, query = self.path.partition("?")
            # running requests are not aborted, new ones wait
            assert path != "/pause" or query == "mode=wait"
            act = posts.get(path)
            self.answer(act and (lambda: act(body)))

        def log_message(self, *_: Any) -> None:
            pass

    found = Listener(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{found.server_port}"
    finally:
        if worker.sent is not None:
            worker.sent.put(None)
        found.close()
        thread.join()


class Listener(ThreadingHTTPServer):
    """As many connections may wait as a rollout opens."""

    request_queue_size = 128

    def close(self) -> None:
        self.shutdown()
        self.server_close()


def answer_of(act: Callable[[], Any] | None) -> tuple[int, Any]:
    """Status and body of an answer."""
    if act is None:
        return 404, {"detail": "Not Found"}
    try:
        return 200, act()
    except Refused as error:
        kind, param, code = "BadRequestError", error.param, error.code
        message = str(error)
    except Exception as error:
        # paths are left out
        message = re.sub(r"(?:/[\w\-.]+)+", "<path>", str(error))
        kind, param, code = "InternalServerError", None, 500
    return code, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def completions(worker: Worker, body: dict[str, Any], mode: str) -> dict[str, Any]:
    """`/v1/completions` of one prompt of token ids."""
    check_name(body.pop("model"))
    assert body.pop("return_token_ids")
    out = worker.complete(body.pop("prompt"), SamplingParams(**body), mode)
    assert out.logprobs is not None
    told = [next(iter(scores.values())).logprob for scores in out.logprobs]
    choice = {
        "index": 0,
        "text": "",
        "token_ids": out.token_ids,
        "logprobs": {"token_logprobs": told},
        "finish_reason": out.finish_reason,
    }
    return {"choices": [choice]}


def check_name(model: str) -> None:
    """Raises Refused for a model that it does not serve."""
    if model != "micro":
        raise Refused(f"The model `{model}` does not exist.", "model", 404)


def generate(worker: Worker, body: dict[str, Any], mode: str) -> dict[str, Any]:
    """`/inference/v1/generate` of one prompt of token ids, the route that tells sampling masks."""
    assert set(body) == {"model", "token_ids", "sampling_params"}
    check_name(body["model"])
    out = worker.complete(body["token_ids"], SamplingParams(**body["sampling_params"]), mode)
    assert out.logprobs is not None
    told = [next(iter(scores.values())).logprob for scores in out.logprobs]
    choice = {
        "index": 0,
        "token_ids": out.token_ids,
        "logprobs": {"content": [{"logprob": each} for each in told]},
        "finish_reason": out.finish_reason,
        "sampling_mask": out.sampling_mask and out.sampling_mask.token_ids,
    }
    return {"choices": [choice]}
