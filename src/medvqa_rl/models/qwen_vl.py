"""Everything specific to Qwen2-VL and Qwen2.5-VL: images, prompts and positions.

The stock processor needs torchvision, which cannot be imported with a CPU-only torch, so prompts are built here from
the tokenizer and the Pillow image processor. Saved checkpoints load with the stock processor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from medvqa_rl.core.prompts import render_prompt
from medvqa_rl.core.text import number_of, printable, shown
from medvqa_rl.core.types import DEFAULT_WORDING, EncodedPrompt, Sample, Template, Wording
from medvqa_rl.models.untrusted import FILE_ERRORS, check_effort, load_tokenizer

ARCHITECTURES = ("qwen2_vl", "qwen2_5_vl")
IMAGE_TOKEN = "<|image_pad|>"
WORDING_FILE = "prompt.json"
"""In the folder of a checkpoint that was trained with the user's own words or tags."""
_PROBE = "Is there an effusion?"
"""A question that the chat template must contain."""
Side = Literal["left", "right"]


class Processor:
    """Encodes samples as prompts and decodes token ids; thread-safe."""

    def __init__(self, tokenizer: Any, image_processor: Any, *, stop_ids: Iterable[int] = ()) -> None:
        """
        Args:
            tokenizer: a Hugging Face tokenizer with Qwen2-VL's special tokens and a chat template.
            image_processor: a ``Qwen2VLImageProcessorPil``.
            stop_ids: tokens that end a completion, in addition to the tokenizer's end-of-sequence token.

        Raises:
            ValueError: the tokenizer lacks the image token, an end-of-sequence token or a chat template, or the chat
                template does not place the images.
        """
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        if IMAGE_TOKEN not in tokenizer.get_added_vocab():
            raise ValueError(
                f"The tokenizer has no {IMAGE_TOKEN} token, so it does not belong to a Qwen2-VL or Qwen2.5-VL model: "
                "use the tokenizer files of the checkpoint."
            )
        if tokenizer.eos_token_id is None or tokenizer.chat_template is None:
            raise ValueError(
                "The tokenizer has no end-of-sequence token or no chat template: copy tokenizer_config.json and "
                "chat_template.json or chat_template.jinja from a Qwen2-VL checkpoint into its folder."
            )
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.stop_ids: tuple[int, ...] = (self.eos_id, *sorted(set(stop_ids) - {self.eos_id}))
        control = {
            id
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content.startswith("<|") and token.content.endswith("|>"))
        }
        self.suppressed_ids: tuple[int, ...] = tuple(sorted(control - set(self.stop_ids)))
        """Control tokens except stop tokens; they are never sampled. The rollout engine also suppresses the rows that
        pad the output layer beyond the tokenizer."""
        self.wording = DEFAULT_WORDING
        """The words and tags of prompts; see :meth:`use`."""
        self._check_chat_template()

    def use(self, wording: Wording) -> None:
        """Render the prompts from now on in these words, and with these tags.

        Raises:
            ValueError: the tokenizer does not keep a tag, or the chat template refuses system prompts.
        """
        for tag in wording.tags if wording.tags != DEFAULT_WORDING.tags else ():
            ids = self.tokenizer(f"a{tag}b", add_special_tokens=False)["input_ids"]
            if tag not in self.decode(ids) or not set(ids).isdisjoint(self.suppressed_ids):
                raise ValueError(
                    f"prompt.tags has {tag!r}, but the tokenizer of this model cannot write it (it reads "
                    f"{self.decode(ids)!r} for {f'a{tag}b'!r}): choose other tags."
                )
        if wording.system:
            messages = [{"role": "system", "content": wording.system}, {"role": "user", "content": _PROBE}]
            try:
                text, _ = self._tokenize(messages)
            except FILE_ERRORS as error:
                text = f"({error})"
            if wording.system.strip() not in text:
                raise ValueError(
                    "prompt.system is set, but the chat template of this model leaves it out: write it into "
                    "prompt.instruction."
                )
        self.wording = wording

    @classmethod
    def from_folder(
        cls, path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> Processor:
        """Load the tokenizer, chat template and image settings of a checkpoint folder; opens no connection.

        Raises:
            ValueError: files are missing or not from a Qwen2-VL or Qwen2.5-VL checkpoint.
        """
        folder = Path(path)
        try:
            tokenizer = load_tokenizer(folder)
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
            image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="np")
            template = folder / "chat_template.json"
            if tokenizer.chat_template is None and template.exists():
                tokenizer.chat_template = json.loads(template.read_text(encoding="utf-8"))["chat_template"]
            generation = folder / "generation_config.json"
            settings = json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else {}
            stop = settings.get("eos_token_id")
        except FILE_ERRORS as error:
            raise ValueError(
                f"The tokenizer or the image settings in {folder} cannot be read "
                f"({printable(str(error), 400)}): the folder needs tokenizer.json, tokenizer_config.json, "
                "preprocessor_config.json and a chat template of a Qwen2-VL checkpoint."
            ) from error
        check_effort(tokenizer)
        size = {
            "shortest_edge": min_pixels or image_processor.size["shortest_edge"],
            "longest_edge": max_pixels or image_processor.size["longest_edge"],
        }
        if size["shortest_edge"] > size["longest_edge"]:
            raise ValueError(
                f"Images must have at least {size['shortest_edge']} and at most {size['longest_edge']} pixels: set "
                "model.min_pixels below model.max_pixels (they default to the checkpoint's own values)."
            )
        image_processor.size = size
        stop_ids = [stop] if isinstance(stop, int) else stop or []
        if not all(type(id) is int for id in stop_ids):
            raise ValueError(
                f"{generation} has eos_token_id {shown(stop)}, but a token id or a list of ids is needed."
            )
        return cls(tokenizer, image_processor, stop_ids=stop_ids)

    def _tokenize(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, NDArray[np.int64]]:
        """Render messages with the chat template and tokenize them; an image is a single token."""
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text, np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

    def _check_chat_template(self) -> None:
        """Check that the chat template places the question and every image, before any image is decoded.

        Raises:
            ValueError: it does not.
        """
        remedy = "use the chat template that came with the checkpoint"
        for count in range(3):
            content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": _PROBE}]
            try:
                text, ids = self._tokenize([{"role": "user", "content": content}])
            except FILE_ERRORS as error:
                raise ValueError(
                    f"The chat template fails on a question with images ({printable(str(error), 400)}): {remedy}."
                ) from error
            found = int((ids == self.image_token_id).sum())
            if found != count:
                raise ValueError(
                    f"The chat template makes {number_of(found, 'placeholder')} for "
                    f"{number_of(count, 'image')}: {remedy}, which writes {IMAGE_TOKEN} once for each."
                )
            if _PROBE not in text:
                raise ValueError(f"The chat template leaves out the question: {remedy}.")

    def encode(self, sample: Sample, template: Template = "think_answer") -> EncodedPrompt:
        """Render the prompt, preprocess the images and expand each placeholder to the image's tokens.

        Each image is loaded once. An image of h x w patches takes h * w / merge_size**2 tokens.

        Raises:
            ValueError: an image cannot be loaded or used; the message names the sample.
        """
        rendered = render_prompt(sample, template, self.wording)
        text, ids = self._tokenize(rendered.messages)
        is_image = ids == self.image_token_id
        assert int(is_image.sum()) == len(sample.images), "the chat template places images, and texts are neutralised"
        if not sample.images:
            return EncodedPrompt(ids, None, None, text, rendered.neutralised, template, self.wording)
        try:
            images = [source.load() for source in sample.images]
            features = self.image_processor(images=images, return_tensors="np")
        except ValueError as error:
            raise ValueError(f"An image of sample {shown(sample.id)} cannot be used: {error}") from error
        grid = np.asarray(features["image_grid_thw"], dtype=np.int64)
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[is_image] = grid.prod(axis=-1) // self.image_processor.merge_size**2
        pixels = np.ascontiguousarray(features["pixel_values"], dtype=np.float32)
        return EncodedPrompt(np.repeat(ids, repeats), pixels, grid, text, rendered.neutralised, template, self.wording)

    def encoding_bytes(self, sample: Sample) -> int:
        """Upper bound of the memory that :meth:`encode` needs for a sample, from the headers of its images.

        12 bytes per pixel of the stored image (Pillow's four, a copy, the array) and 72 per pixel of the resized one:
        3 channels of 4 bytes, doubled by ``temporal_patch_size``, for the patches, the array that they are cut from
        and the copy that joins images. Images without a size in their header (DICOM, NIfTI, drawn ones) count as 0.
        """
        limits = self.image_processor.size
        total = 0
        for source in sample.images:
            stored = source.header_pixels() or 0
            seen = min(max(stored, limits["shortest_edge"]), limits["longest_edge"]) if stored else 0
            total += 12 * stored + 72 * seen
        return total

    def expected_tokens(self, sample: Sample) -> float:
        """Estimate the length of a sample's prompt without decoding: a token per four characters, and the tokens of
        each image from its header (the maximum if the header has no size)."""
        limits = self.image_processor.size
        per_token = (self.image_processor.patch_size * self.image_processor.merge_size) ** 2
        tokens = (len(sample.question) + sum(map(len, sample.options))) / 4
        for source in sample.images:
            stored = source.header_pixels()
            pixels = min(max(stored or limits["longest_edge"], limits["shortest_edge"]), limits["longest_edge"])
            tokens += pixels / per_token
        return tokens

    def encode_completion(self, text: str) -> tuple[int, ...]:
        """Token ids of an SFT target, including the end-of-sequence token."""
        return (*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.eos_id)

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text, without special tokens."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Iterable[int]) -> str:
        """Decode token ids, skipping special tokens."""
        text: str = self.tokenizer.decode(
            [int(id) for id in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def save(self, folder: str | Path) -> None:
        """Save tokenizer, chat template and image settings in the standard format."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        # Without the class name AutoProcessor silently returns only a tokenizer for a folder with no config.json.
        path = folder / "preprocessor_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) | {"processor_class": "Qwen2VLProcessor"}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if self.wording != DEFAULT_WORDING:
            words = json.dumps(asdict(self.wording), indent=2, ensure_ascii=False)
            (folder / WORDING_FILE).write_text(words + "\n", encoding="utf-8")


def causal_model(model: nn.Module) -> Any:
    """The ``...ForConditionalGeneration`` of a plain or PEFT model; it has ``model`` and ``lm_head``."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone(model: nn.Module) -> Any:
    """The ``Qwen2VLModel`` or ``Qwen2_5_VLModel`` of a model; it has ``visual`` and ``language_model``."""
    return causal_model(model).model


def vision_is_frozen(model: nn.Module) -> bool:
    """True if neither the vision tower nor the merger is trained, so that image features can be cached."""
    return not any(parameter.requires_grad for parameter in backbone(model).visual.parameters())


def image_features(
    model: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device | str
) -> list[Tensor | None]:
    """Encode the images of all prompts in one pass of the vision tower.

    Runs under ``no_grad`` if tower and merger are frozen: LoRA with gradient checkpointing makes even frozen features
    require gradients, and the backward pass would go through the tower for nothing.

    Returns:
        Per prompt (image tokens, hidden) in the order of its placeholders, or None for a prompt without images.
    """
    pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    grids = [prompt.image_grid_thw for prompt in prompts if prompt.image_grid_thw is not None]
    if not pixels:
        return [None] * len(prompts)
    with torch.no_grad() if vision_is_frozen(model) else nullcontext():
        encoded = backbone(model).get_image_features(
            torch.from_numpy(np.concatenate(pixels)).to(device),
            torch.from_numpy(np.concatenate(grids)).to(device),
            return_dict=True,
        )
    features = iter(encoded.pooler_output)
    return [
        None if prompt.image_grid_thw is None else torch.cat([next(features) for _ in prompt.image_grid_thw])
        for prompt in prompts
    ]


def blank_features(model: nn.Module, device: torch.device | str) -> Tensor:
    """(1, hidden) features of a blank image of the smallest size, computed by the vision tower."""
    vision = backbone(model).config.vision_config
    side = vision.spatial_merge_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.zeros(side * side, patch, device=device)
    encoded = backbone(model).get_image_features(
        pixels, torch.tensor([[1, side, side]], device=device), return_dict=True
    )
    features: Tensor = encoded.pooler_output[0]
    return features


def rope_positions(prompt: EncodedPrompt, *, image_token_id: int, merge_size: int) -> NDArray[np.int64]:
    """(3, T) M-RoPE positions (time, height, width) of a prompt's tokens.

    Text advances all three rows by one. An image of t x h x w merged patches that starts at position p gets
    (p + time, p + row, p + column), and the text after it continues at p + max(h, w) (Qwen2-VL, arXiv 2409.12191,
    section 2.1).
    """
    ids = prompt.input_ids
    grids = [] if prompt.image_grid_thw is None else (prompt.image_grid_thw // (1, merge_size, merge_size)).tolist()
    images = np.flatnonzero(ids == image_token_id)
    assert len(images) == sum(t * h * w for t, h, w in grids), "image tokens and image grids do not match"
    positions = np.empty((3, len(ids)), dtype=np.int64)
    token, start, seen = 0, 0, 0
    for t, h, w in grids:
        first = int(images[seen])
        positions[:, token:first] = np.arange(start, start + first - token)
        start += first - token
        token, seen = first + t * h * w, seen + t * h * w
        positions[:, first:token] = np.indices((t, h, w)).reshape(3, -1) + start
        start += max(h, w)
    positions[:, token:] = np.arange(start, start + len(ids) - token)
    return positions


class PaddedPrompts(NamedTuple):
    """A padded batch of prompts."""

    input_ids: Tensor
    """(P, T) token ids, ``pad_id`` at padding."""
    mask: Tensor
    """(P, T) bool, True at tokens of the prompt."""
    position_ids: Tensor
    """(3, P, T) M-RoPE positions, 0 at padding."""
    next_positions: Tensor
    """(P,) the position of the first completion token, equal in all three rows."""


def pad_prompts(
    model: nn.Module,
    prompts: Sequence[EncodedPrompt],
    *,
    pad_id: int,
    device: torch.device | str,
    side: Side = "left",
) -> PaddedPrompts:
    """Pad prompts to a batch with explicit positions."""
    config = backbone(model).config
    width = max(len(prompt.input_ids) for prompt in prompts)
    ids = np.full((len(prompts), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=bool)
    positions = np.zeros((3, len(prompts), width), dtype=np.int64)
    following = np.zeros(len(prompts), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        length = len(prompt.input_ids)
        columns = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, columns] = prompt.input_ids
        mask[row, columns] = True
        own = rope_positions(
            prompt, image_token_id=config.image_token_id, merge_size=config.vision_config.spatial_merge_size
        )
        positions[:, row, columns] = own
        following[row] = own.max() + 1
    return PaddedPrompts(*(torch.from_numpy(array).to(device) for array in (ids, mask, positions, following)))


def embed_prompts(model: nn.Module, input_ids: Tensor, mask: Tensor, features: Sequence[Tensor | None]) -> Tensor:
    """(P, T, hidden) embeddings of padded prompts with image features at their placeholders.

    Args:
        model: the model.
        input_ids: (P, T) token ids; may continue beyond the prompt with sampled tokens.
        mask: (P, T) bool, True at tokens of the prompt. Image tokens are placeholders only there, so sampled tokens
            cannot shift the features.
        features: per prompt (image tokens, hidden) or None, from :func:`image_features`.
    """
    inner = backbone(model)
    embeds: Tensor = inner.language_model.embed_tokens(input_ids)
    present = [feature for feature in features if feature is not None]
    if not present:
        return embeds
    placeholders = (input_ids == inner.config.image_token_id) & mask
    return embeds.masked_scatter(placeholders.unsqueeze(-1), torch.cat(present).to(embeds.dtype))
