"""A stand-in for vLLM that only accepts calls that bind to the released signatures (../released.json).

What a real engine computes with its own kernels, this one computes with the stock model of transformers, prompt after
prompt. It caches as vLLM does (keys and values by tokens, images and adapter; image features by what is in the image)
and never evicts, so a missing reset changes the sampled tokens.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from released import signature
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.cache_utils import DynamicCache
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from medvqa_rl.models.cache import cache_argument

RELEASED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "released.json").read_text())


def bind(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, with defaults.

    Raises:
        TypeError: the release does not take them so.
    """
    function = RELEASED["functions"][name]
    bound = signature(function).bind(*args, **kwargs).arguments
    defaults = {row[0]: ast.literal_eval(row[2]) for row in function["parameters"] if row[2] is not None}
    return defaults | bound


def only(name: str, given: Iterable[str]) -> None:
    """Refuse fields that a released class does not have."""
    unknown = set(given) - set(RELEASED["fields"][name]["names"])
    if unknown:
        raise TypeError(f"{name} has no {', '.join(sorted(unknown))}")


def record(name: str, **fields: Any) -> SimpleNamespace:
    """An object with fields of a released class."""
    only(name, fields)
    return SimpleNamespace(**fields)


class TokensPrompt(dict[str, Any]):
    def __init__(self, **fields: Any) -> None:
        known = [*RELEASED["fields"]["TokensPrompt"]["names"], *RELEASED["fields"]["_PromptOptions"]["names"]]
        assert not set(fields) - set(known), f"a prompt has no {set(fields) - set(known)}"
        super().__init__(**fields)


class SamplingParams(SimpleNamespace):
    """The fields that are used; refuses what the release refuses (sampling_params.py, ``_verify_args``)."""

    def __init__(self, **fields: Any) -> None:
        only("SamplingParams", fields)
        defaults = {"n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 16, "seed": None}
        defaults |= {"stop_token_ids": [], "ignore_eos": False, "logit_bias": {}, "logprobs": None, "detokenize": True}
        super().__init__(**(defaults | fields))
        if not 0.0 <= self.temperature <= 2.0:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        self.temperature = max(self.temperature, 1e-2)
        self.logit_bias = {int(token): bias for token, bias in self.logit_bias.items()}


class Engine:
    """The model, its caches and its adapter, for both library and server."""

    def __init__(self, folder: str, *, max_pixels: int | None = None, min_pixels: int | None = None) -> None:
        self.model = _load(folder)
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        size = dict(self.processor.size)
        self.processor.size = {
            "shortest_edge": min_pixels or size["shortest_edge"],
            "longest_edge": max_pixels or size["longest_edge"],
        }
        self.prefixes: dict[Any, tuple[DynamicCache, Tensor, int]] = {}
        self.features: dict[str, Tensor] = {}
        self.patches: dict[str, tuple[Tensor, Tensor]] = {}
        self.encoded = self.prefilled = 0
        self.adapters: dict[str, str] = {}

    @property
    def inner(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        given = bind("GPUModelRunner.reload_weights", *args, **kwargs)
        if given["weights_path"] is not None:
            self.model = _load(given["weights_path"])
            return
        own = dict(self.model.named_parameters())
        loaded = set()
        for name, weight in given["weights_iterator"]:
            assert not weight.requires_grad and not name.startswith("base_model."), name
            own[name].data.copy_(weight)
            loaded.add(name)
        assert loaded == set(own), f"not loaded: {sorted(set(own) - loaded)[:3]}"

    def add_lora(self, name: str, path: str, *, load_inplace: bool) -> None:
        """Load an adapter; peft_helper.py refuses fully trained modules."""
        settings = json.loads((Path(path) / "adapter_config.json").read_text())
        assert not settings["modules_to_save"], "vLLM only supports modules_to_save being None"
        if name in self.adapters and not load_inplace:
            return
        self.model = PeftModel.from_pretrained(_load(self.folder), path).eval()
        self.adapters[name] = path

    def reset_prefix_cache(self) -> bool:
        self.prefixes.clear()
        return True

    def reset_mm_cache(self) -> None:
        self.patches.clear()

    def reset_encoder_cache(self) -> None:
        self.features.clear()

    @torch.no_grad()
    def complete(
        self, ids: Sequence[int], images: Sequence[Any], params: SamplingParams, adapter: str | None
    ) -> tuple[list[int], list[SimpleNamespace]]:
        """The expanded prompt and its completions.

        Args:
            images: PIL images, or pairs of features and grid.
        """
        assert adapter is None or adapter in self.adapters
        keys, features, grids = [], [], []
        for image in images:
            key, feature, grid = self._encode(image)
            keys.append(key)
            features.append(feature)
            grids.append(grid)
        expanded = self._expand(ids, grids)
        place = (tuple(expanded), tuple(keys), adapter)
        if place not in self.prefixes:
            self.prefixes[place] = self._prefill(expanded, features, grids)
        cache, logits, position = self.prefixes[place]
        return expanded, self._decode(copy.deepcopy(cache), logits, position, params)

    def _encode(self, image: Any) -> tuple[str, Tensor, Tensor]:
        """An image's key, features and (1, 3) grid."""
        if not isinstance(image, Image.Image):
            embeds, grid = image
            return hashlib.sha256(embeds.numpy().tobytes()).hexdigest(), embeds, grid
        key = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        if key not in self.patches:
            found = self.processor(images=[image], return_tensors="pt")
            self.patches[key] = found["pixel_values"], found["image_grid_thw"]
        pixels, grid = self.patches[key]
        if key not in self.features:
            self.features[key] = self.inner.model.get_image_features(pixels, grid, return_dict=True).pooler_output[0]
            self.encoded += 1
        return key, self.features[key], grid

    def _expand(self, ids: Sequence[int], grids: Sequence[Tensor]) -> list[int]:
        """Expand the first placeholders, one per image, to the image's tokens, and keep any others, as observed in
        multimodal/processing/processor.py."""
        pad, merged = self.inner.config.image_token_id, self.processor.merge_size**2
        counts = [int(grid.prod()) // merged for grid in grids]
        assert list(ids).count(pad) >= len(counts), "Failed to apply prompt replacement"
        waiting = iter(counts)
        return [id for given in ids for id in ([given] * next(waiting, 1) if given == pad else [given])]

    def _prefill(
        self, ids: list[int], features: list[Tensor], grids: list[Tensor]
    ) -> tuple[DynamicCache, Tensor, int]:
        """Keys and values of a prompt, its last logits, and the next position."""
        self.prefilled += 1
        model, tokens = self.inner.model, torch.tensor([ids])
        is_image = tokens == self.inner.config.image_token_id
        embeds = model.language_model.embed_tokens(tokens)
        if features:
            embeds = embeds.masked_scatter(is_image[..., None], torch.cat(features).to(embeds.dtype))
        positions, _ = model.get_rope_index(
            tokens,
            mm_token_type_ids=is_image.int(),
            image_grid_thw=torch.cat(grids) if grids else None,
            attention_mask=torch.ones_like(tokens),
        )
        cache = DynamicCache()
        hidden = model.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            use_cache=True,
            **cache_argument(model.language_model, cache),
        ).last_hidden_state
        return cache, self.inner.lm_head(hidden[:, -1]).float(), int(positions.max()) + 1

    def _decode(
        self, cache: DynamicCache, logits: Tensor, position: int, params: SamplingParams
    ) -> list[SimpleNamespace]:
        generators = [torch.Generator().manual_seed(params.seed + index) for index in range(params.n)]
        cache.batch_repeat_interleave(params.n)
        logits = logits.repeat(params.n, 1)
        stop = {*params.stop_token_ids} | (set() if params.ignore_eos else {self.tokenizer.eos_token_id})
        tokens: list[list[int]] = [[] for _ in generators]
        logps: list[list[float]] = [[] for _ in generators]
        ended: list[str | None] = [None] * params.n
        language_model = self.inner.model.language_model
        for step in range(params.max_tokens):
            processed = _process(logits, params)
            picked = [
                int(torch.multinomial(row.exp(), 1, generator=generator))
                for row, generator in zip(processed, generators)
            ]
            for row, token in enumerate(picked):
                if ended[row] is None:
                    tokens[row].append(token)
                    logps[row].append(float(processed[row, token]))
                    ended[row] = "stop" if token in stop else "length" if step + 1 == params.max_tokens else None
            if None not in ended:
                break
            hidden = language_model(
                inputs_embeds=language_model.embed_tokens(torch.tensor(picked))[:, None],
                position_ids=torch.full((3, params.n, 1), position + step),
                use_cache=True,
                **cache_argument(language_model, cache),
            ).last_hidden_state
            logits = self.inner.lm_head(hidden[:, -1]).float()
        return [
            record(
                "CompletionOutput",
                index=index,
                text="",
                token_ids=tokens[index],
                cumulative_logprob=None,
                logprobs=[{id: record("Logprob", logprob=logp)} for id, logp in zip(tokens[index], logps[index])],
                finish_reason=ended[index],
            )
            for index in reversed(range(params.n))  # in no order that may be relied on
        ]


def _process(logits: Tensor, params: SamplingParams) -> Tensor:
    """Log-probabilities after bias, temperature, top-k and top-p (v1/sample/sampler.py, ``processed_logprobs``)."""
    scores = logits.clone()
    for token, bias in params.logit_bias.items():
        scores[:, token] += bias
    scores = scores / params.temperature
    if params.top_k > 0:
        kept = scores.topk(params.top_k, dim=-1).indices
        scores = torch.full_like(scores, -torch.inf).scatter(-1, kept, scores.gather(-1, kept))
    if params.top_p < 1.0:
        ranked, order = scores.sort(dim=-1, descending=True)
        share = ranked.softmax(dim=-1)
        ranked[share.cumsum(-1) - share >= params.top_p] = -torch.inf
        scores = torch.empty_like(scores).scatter(-1, order, ranked)
    return scores.log_softmax(dim=-1)


def _load(folder: str) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


class LLM:
    """``vllm.LLM``; ``llm_engine`` is the object itself."""

    made: list[LLM] = []
    """All instances of this process, for tests."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = bind("LLM.__init__", *args, **kwargs)
        only("EngineArgs", given.pop("kwargs", {}))
        self.given = kwargs
        self.environment = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
        self.engine = Engine(kwargs["model"], **kwargs["mm_processor_kwargs"])
        self.asleep: set[str] = set()
        self.slept: list[int] = []
        self.requests: list[Any] = []
        LLM.made.append(self)

    @property
    def llm_engine(self) -> LLM:
        return self

    def collective_rpc(self, *args: Any, **kwargs: Any) -> list[Any]:
        given = bind("LLM.collective_rpc", *args, **kwargs)
        assert "weights" not in self.asleep
        if given["method"] == "pack_heads":  # nothing is packed here
            assert self.given["worker_extension_cls"].rpartition(".")[2] == "PackedHeads"
            return [None]
        assert given["method"] == "reload_weights"
        return [self.engine.reload_weights(*given["args"], **(given["kwargs"] or {}))]

    def add_lora(self, *args: Any, **kwargs: Any) -> bool:
        request = bind("LLMEngine.add_lora", *args, **kwargs)["lora_request"]
        assert self.given.get("enable_lora") and "weights" not in self.asleep
        self.engine.add_lora(request.lora_name, request.lora_path, load_inplace=request.load_inplace)
        return True

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        bind("LLM.reset_prefix_cache", *args, **kwargs)
        return self.engine.reset_prefix_cache()

    def reset_mm_cache(self, *args: Any, **kwargs: Any) -> None:
        bind("LLM.reset_mm_cache", *args, **kwargs)
        self.engine.reset_mm_cache()

    def reset_encoder_cache(self, *args: Any, **kwargs: Any) -> None:
        bind("LLMEngine.reset_encoder_cache", *args, **kwargs)
        self.engine.reset_encoder_cache()

    def sleep(self, *args: Any, **kwargs: Any) -> None:
        level = bind("LLM.sleep", *args, **kwargs)["level"]
        assert self.given["enable_sleep_mode"] and not self.asleep
        self.slept.append(level)
        self.asleep = {"weights", "kv_cache"}
        self.engine.prefixes.clear()
        if level == 2:  # the weights are gone for good
            for parameter in self.engine.model.parameters():
                parameter.data.fill_(torch.nan)

    def wake_up(self, *args: Any, **kwargs: Any) -> bool:
        tags = bind("LLM.wake_up", *args, **kwargs)["tags"]
        self.asleep -= {"weights", "kv_cache"} if tags is None else set(tags)
        return not self.asleep

    def generate(self, *args: Any, **kwargs: Any) -> list[SimpleNamespace]:
        given = bind("LLM.generate", *args, **kwargs)
        assert not self.asleep, "generation while asleep"
        assert self.given["enable_mm_embeds"] and self.given["logprobs_mode"] == "processed_logprobs"
        self.requests += zip(given["prompts"], given["sampling_params"], strict=True)
        adapter = None if given["lora_request"] is None else given["lora_request"].lora_name
        outputs = []
        for prompt, params in zip(given["prompts"], given["sampling_params"], strict=True):
            images = self._images((prompt.get("multi_modal_data") or {}).get("image"))
            ids, completions = self.engine.complete(prompt["prompt_token_ids"], images, params, adapter)
            if len(ids) > self.given.get("max_model_len", len(ids)):
                raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length.")
            rest = {"request_id": "0", "prompt": None, "prompt_logprobs": None, "finished": True}
            outputs.append(
                SimpleNamespace(**bind("RequestOutput.__init__", prompt_token_ids=ids, outputs=completions, **rest))
            )
        return outputs

    def _images(self, data: Any) -> list[tuple[Tensor, Tensor]]:
        """Features of each image with its grid, checked as in multimodal/parse.py."""
        if data is None:
            return []
        assert data.keys() == {"image_embeds", "image_grid_thw"}, data.keys()
        embeds, grids = data["image_embeds"], data["image_grid_thw"]
        assert embeds.device.type == "cpu" and not embeds.requires_grad
        assert embeds.ndim == 2 and embeds.shape[1] == self.engine.inner.config.text_config.hidden_size
        sizes = (grids.prod(-1) // self.engine.processor.merge_size**2).tolist()
        return list(zip(embeds.split(sizes), grids.split(1)))


def from_url(url: str) -> Image.Image:
    """Decode an image from a ``data:`` URL."""
    import base64

    kind, _, content = url.partition(",")
    assert kind == "data:image/png;base64", kind
    return Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")
