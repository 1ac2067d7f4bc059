"""A local server with the routes of ``vllm serve`` that are used, on the stand-in's engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vllm import RELEASED, Engine, SamplingParams, from_url, only, record


class FakeServer:
    """A running server: its settings, the requests it got, and its engine."""

    def __init__(self, folder: str, **pixels: int) -> None:
        self.engine = Engine(folder, **pixels)
        self.model = {"model": folder, "dtype": "torch.float32", "logprobs_mode": "processed_logprobs"}
        self.model |= {"generation_config": "vllm"}
        self.instance = "first"
        self.scales_out = self.updates_lora = True
        self.max_lora_rank: int | None = 16
        self.asked: list[tuple[str, Any]] = []
        self.lock = threading.Lock()
        self.answers: dict[str, tuple[int, Any]] = {}
        """Status and body to return instead of a route's own."""
        self.url = ""

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        route = f"{method} {path}"
        assert route in RELEASED["routes"], route
        self.asked.append((path, body))
        if path in self.answers:
            return self.answers[path]
        engine = self.engine
        match path:
            case "/health":
                return 200, None
            case "/server_info":
                rank = self.max_lora_rank
                lora = None if rank is None else vars(record("LoRAConfig", max_lora_rank=rank))
                model = vars(record("ModelConfig", **self.model))
                device = vars(record("DeviceConfig", device="cuda"))
                config = record(
                    "VllmConfig",
                    model_config=model,
                    lora_config=lora,
                    device_config=device,
                    instance_id=self.instance,
                )
                return 200, {"vllm_config": vars(config)}
            case "/version":
                return 200, {"version": RELEASED["version"]}
            case "/inference/v1/generate" if not self.scales_out:
                return 403, {"error": {"message": "Scale-out endpoints are disabled.", "code": 403}}
            case "/v1/load_lora_adapter" if not self.updates_lora:
                return 404, {"detail": "Not Found"}
            case "/v1/load_lora_adapter" | "/inference/v1/generate" if not body:
                return 400, {"error": {"message": "Field required", "code": 400}}
            case "/collective_rpc":
                assert body.keys() <= {"method", "args", "kwargs", "timeout"} and body["method"] == "reload_weights"
                engine.reload_weights(**body["kwargs"])
                return 200, {"results": [None]}
            case "/v1/load_lora_adapter":
                only("LoadLoRAAdapterRequest", body)
                engine.add_lora(body["lora_name"], body["lora_path"], load_inplace=body.get("load_inplace", False))
                return 200, None
            case "/reset_prefix_cache":
                return 200, {"success": engine.reset_prefix_cache()}
            case "/reset_mm_cache":
                return 200, engine.reset_mm_cache()
            case "/reset_encoder_cache":
                return 200, engine.reset_encoder_cache()
            case _:
                return 200, self.generate(body)

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        only("GenerateRequest", body)
        params = SamplingParams(**body["sampling_params"])
        parts = body.get("content_parts") or []
        assert all(part["type"] == "image_url" for part in parts)
        images = [from_url(part["url"]) for part in parts]
        ids, outputs = self.engine.complete(body["token_ids"], images, params, body.get("model"))
        choices = []
        for output in outputs:
            found = [(id, position[id].logprob) for id, position in zip(output.token_ids, output.logprobs)]
            content = [vars(record("GenerateLogProb", token_id=id, logprob=max(logp, -9999.0))) for id, logp in found]
            fields = {"index": output.index, "finish_reason": output.finish_reason, "token_ids": output.token_ids}
            choices.append(vars(record("GenerateChoiceBase", **fields)) | {"logprobs": {"content": content}})
        answer = vars(record("GenerateResponseBase", prompt_token_ids=ids if body.get("return_token_ids") else None))
        return answer | {"choices": choices}


@contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    """Serve on a free local port for the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._respond("GET", None)

        def do_POST(self) -> None:
            assert self.headers.get_content_type() == "application/json"
            self._respond("POST", json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _respond(self, method: str, body: Any) -> None:
            with server.lock:
                try:
                    status, answer = server.answer(method, self.path.partition("?")[0], body)
                except (AssertionError, RuntimeError, TypeError, ValueError) as error:
                    status, answer = 500, {"error": {"message": repr(error)}}
            self.send_response(status)
            if status in (301, 302, 307, 308):
                self.send_header("Location", answer)
                answer = None
            content = b"" if answer is None else json.dumps(answer).encode()
            if content:
                self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()
