"""Extract the interface of a vLLM release from its source: ``python released.py FOLDER VERSION > released.json``.

FOLDER holds the unpacked source distribution; it is not imported. The stand-in next to this file only accepts
calls that bind to these signatures.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from pathlib import Path
from typing import Any

FUNCTIONS = {
    "LLM.__init__": "vllm/entrypoints/llm.py",
    "LLM.generate": "vllm/entrypoints/llm.py",
    "LLM.collective_rpc": "vllm/entrypoints/llm.py",
    "LLM.reset_prefix_cache": "vllm/entrypoints/llm.py",
    "LLM.reset_mm_cache": "vllm/entrypoints/llm.py",
    "LLM.sleep": "vllm/entrypoints/llm.py",
    "LLM.wake_up": "vllm/entrypoints/llm.py",
    "LLMEngine.add_lora": "vllm/v1/engine/llm_engine.py",
    "LLMEngine.reset_encoder_cache": "vllm/v1/engine/llm_engine.py",
    "GPUModelRunner.reload_weights": "vllm/v1/worker/gpu/model_runner.py",
    "RequestOutput.__init__": "vllm/outputs.py",
}
"""The file of each function that is called."""
FIELDS = {
    "EngineArgs": "vllm/engine/arg_utils.py",
    "SamplingParams": "vllm/sampling_params.py",
    "TokensPrompt": "vllm/inputs/llm.py",
    "_PromptOptions": "vllm/inputs/llm.py",
    "LoRARequest": "vllm/lora/request.py",
    "CompletionOutput": "vllm/outputs.py",
    "Logprob": "vllm/logprobs.py",
    "VllmConfig": "vllm/config/vllm.py",
    "ModelConfig": "vllm/config/model.py",
    "DeviceConfig": "vllm/config/device.py",
    "LoRAConfig": "vllm/config/lora.py",
    "LoadLoRAAdapterRequest": "vllm/entrypoints/serve/lora/protocol.py",
    "GenerateRequest": "vllm/entrypoints/scale_out/token_in_token_out/protocol.py",
    "GenerateResponseBase": "vllm/entrypoints/scale_out/token_in_token_out/protocol.py",
    "GenerateChoiceBase": "vllm/entrypoints/scale_out/token_in_token_out/protocol.py",
    "GenerateLogProb": "vllm/entrypoints/scale_out/token_in_token_out/protocol.py",
}
"""The file of each class whose fields are set or read."""
ROUTES = (
    "vllm/entrypoints/serve/dev/cache/api_router.py",
    "vllm/entrypoints/serve/dev/rpc/api_router.py",
    "vllm/entrypoints/serve/dev/server_info/api_router.py",
    "vllm/entrypoints/serve/instrumentator/basic.py",
    "vllm/entrypoints/serve/instrumentator/health.py",
    "vllm/entrypoints/serve/lora/api_router.py",
    "vllm/entrypoints/scale_out/token_in_token_out/api_router.py",
)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Functions with their parameters, classes with their fields, and server routes, each with its file."""
    functions = {name: _function(folder, path, *name.split(".")) for name, path in FUNCTIONS.items()}
    fields = {name: _fields(folder, path, name) for name, path in FIELDS.items()}
    routes = {route: path for path in ROUTES for route in _routes(folder / path)}
    return {"functions": functions, "fields": fields, "routes": routes}


def _class(folder: Path, path: str, name: str) -> ast.ClassDef:
    tree = ast.parse((folder / path).read_text())
    return next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)


def _function(folder: Path, path: str, owner: str, name: str) -> dict[str, Any]:
    """Names, kinds and defaults of parameters, without self; of the last definition if there are overloads."""
    body = _class(folder, path, owner).body
    node = [item for item in body if isinstance(item, ast.FunctionDef) and item.name == name][-1]
    given = node.args
    plain = [*given.posonlyargs, *given.args][1:]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    rows = [[argument.arg, "POSITIONAL_OR_KEYWORD", _text(value)] for argument, value in zip(plain, defaults)]
    rows += [] if given.vararg is None else [[given.vararg.arg, "VAR_POSITIONAL", None]]
    rows += [[arg.arg, "KEYWORD_ONLY", _text(value)] for arg, value in zip(given.kwonlyargs, given.kw_defaults)]
    rows += [] if given.kwarg is None else [[given.kwarg.arg, "VAR_KEYWORD", None]]
    return {"at": f"{path}:{node.lineno}", "parameters": rows}


def _fields(folder: Path, path: str, name: str) -> dict[str, Any]:
    node = _class(folder, path, name)
    names = [
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_")
    ]
    return {"at": f"{path}:{node.lineno}", "names": names}


def _routes(path: Path) -> list[str]:
    """Routes such as ``POST /reset_prefix_cache``, from the decorators."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        is_route = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if is_route and node.func.attr in ("get", "post") and node.args and isinstance(node.args[0], ast.Constant):
            if not str(node.args[0].value).startswith("/"):
                continue
            found.append(f"{node.func.attr.upper()} {node.args[0].value}")
    return found


def _text(node: ast.expr | None) -> str | None:
    """The source of a default; None if there is none."""
    return None if node is None else ast.unparse(node)


def signature(function: dict[str, Any]) -> inspect.Signature:
    """The signature of a function described by :func:`read`."""
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                getattr(inspect.Parameter, kind),
                default=inspect.Parameter.empty if default is None else default,
            )
            for name, kind, default in function["parameters"]
        ]
    )


def write(parts: dict[str, dict[str, Any]], version: str) -> str:
    """Print JSON with a line per function, class and route."""
    lines = ["{", f'"version": {json.dumps(version)},']
    for number, (part, entries) in enumerate(parts.items(), 1):
        rows = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
        lines += [f"{json.dumps(part)}: {{", ",\n".join(rows), "}" + "," * (number < len(parts))]
    return "\n".join([*lines, "}"])


if __name__ == "__main__":
    print(write(read(Path(sys.argv[1])), sys.argv[2]))
