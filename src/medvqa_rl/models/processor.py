"""Prompts as token ids and pixels, and token ids as text: the tokenizer, chat template and images of a checkpoint.

The stock processors need torchvision, which cannot be imported with a CPU-only torch, so prompts are built here from
the tokenizer and the Pillow image processor. Saved checkpoints load with the stock processor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from medvqa_rl.core.prompts import render_prompt
from medvqa_rl.core.text import number_of, printable, shown
from medvqa_rl.core.types import DEFAULT_WORDING, EncodedPrompt, Sample, Template, Wording
from medvqa_rl.models.families.family import Family
from medvqa_rl.models.families.parts import Readers, adds_special_tokens
from medvqa_rl.models.untrusted import FILE_ERRORS, check_effort, check_image_size, load_tokenizer

WORDING_FILE = "prompt.json"
"""In the folder of a checkpoint that was trained with the user's own words or tags."""
_PROBE = "Is there an effusion?"
"""A question that the chat template must contain."""


class PaddedPrompts(NamedTuple):
    """A padded batch of prompts."""

    input_ids: Tensor
    """(P, T) token ids, ``pad_id`` at padding."""
    mask: Tensor
    """(P, T) bool, True at tokens of the prompt."""
    position_ids: Tensor
    """(axes, P, T) positions, 0 at padding."""
    next_positions: Tensor
    """(P,) the position of the first completion token, equal in all axes."""
    blocks: Tensor | None
    """(P, T) from :meth:`Family.blocks`, -1 at padding; None if all tokens of all prompts attend causally."""


class Processor:
    """Encodes samples as prompts and decodes token ids; thread-safe."""

    def __init__(self, family: Family, tokenizer: Any, image_processor: Any, *, stop_ids: Iterable[int] = ()) -> None:
        """
        Args:
            family: of the model.
            tokenizer: a Hugging Face tokenizer with the family's special tokens and a chat template.
            image_processor: the family's Pillow image processor.
            stop_ids: tokens that end a completion, in addition to the tokenizer's end-of-sequence token.

        Raises:
            ValueError: the tokenizer lacks the image token, an end-of-sequence token or a chat template, or the chat
                template does not place the images.
        """
        self.family = family
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        image_token, placeholder = family.image_tokens(image_processor)
        for token in (image_token, placeholder, family.end_of_turn):
            if token is not None and token not in tokenizer.get_added_vocab():
                raise ValueError(
                    f"The tokenizer has no {token} token, so it does not belong to a {family.title} model: use the "
                    "tokenizer files of the checkpoint."
                )
        if tokenizer.eos_token_id is None or tokenizer.chat_template is None:
            raise ValueError(
                "The tokenizer has no end-of-sequence token or no chat template: copy tokenizer_config.json and "
                f"chat_template.json or chat_template.jinja from a {family.title} checkpoint into its folder."
            )
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
        self.readers = Readers(tokenizer, image_processor, self.image_token_id)
        self._placeholder = placeholder
        self._placeholder_id: int = tokenizer.convert_tokens_to_ids(placeholder)
        self.eos_id: int = tokenizer.convert_tokens_to_ids(family.end_of_turn or tokenizer.eos_token)
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.stop_ids: tuple[int, ...] = (self.eos_id, *sorted({tokenizer.eos_token_id, *stop_ids} - {self.eos_id}))
        control = {
            id
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content.startswith("<|") and token.content.endswith("|>"))
        }
        control |= {self.image_token_id, self._placeholder_id}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._controls = tuple(sorted(token for token in special if token.startswith("<") and token.endswith(">")))
        """Special tokens that the data must not contain."""
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
                text = self.render(messages)
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
        cls,
        path: str | Path,
        family: Family,
        *,
        adapter: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Processor:
        """Load the tokenizer, chat template and image settings of a checkpoint folder; opens no connection.

        Args:
            path: the folder.
            family: of its model.
            adapter: folder of an adapter, saved with the image sizes of its training.
            min_pixels: ``model.min_pixels``.
            max_pixels: ``model.max_pixels``.

        Raises:
            ValueError: files are missing or not from a checkpoint of the family.
        """
        folder = Path(path)
        try:
            tokenizer = load_tokenizer(folder)
            trained = Path(adapter or folder).expanduser()
            has_sizes = (trained / "preprocessor_config.json").is_file() and family.pixels_per_token is not None
            image_processor = family.load_image_processor(trained if has_sizes else folder)
            check_image_size(getattr(image_processor, "size", None))
            family.preprocess(image_processor, [Image.new("RGB", (64, 64))])
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
                f"preprocessor_config.json and a chat template of a {family.title} checkpoint."
            ) from error
        check_effort(tokenizer)
        family.limit_pixels(image_processor, min_pixels, max_pixels)
        stop_ids = [stop] if isinstance(stop, int) else stop or []
        if not all(type(id) is int for id in stop_ids):
            raise ValueError(
                f"{generation} has eos_token_id {shown(stop)}, but a token id or a list of ids is needed."
            )
        return cls(family, tokenizer, image_processor, stop_ids=stop_ids)

    def render(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        """Render messages with the chat template, up to where the assistant speaks.

        Args:
            arguments: of the template.
        """
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **arguments
        )
        return text

    def tokenize(self, text: str) -> NDArray[np.int64]:
        """Tokenize a rendered prompt; an image is a single token."""
        ids = self.tokenizer(text, add_special_tokens=adds_special_tokens(self.tokenizer, text))["input_ids"]
        return np.asarray(ids, dtype=np.int64)

    def _check_chat_template(self) -> None:
        """Check that the chat template places the question and every image, before any image is decoded.

        Raises:
            ValueError: it does not.
        """
        remedy = "use the chat template that came with the checkpoint"
        for count in range(3):
            content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": _PROBE}]
            try:
                text = self.render([{"role": "user", "content": content}])
                ids = self.tokenize(text)
            except FILE_ERRORS as error:
                raise ValueError(
                    f"The chat template fails on a question with images ({printable(str(error), 400)}): {remedy}."
                ) from error
            found = int((ids == self._placeholder_id).sum())
            if found != count:
                raise ValueError(
                    f"The chat template makes {number_of(found, 'placeholder')} for "
                    f"{number_of(count, 'image')}: {remedy}, which writes {self._placeholder} once for each."
                )
            if _PROBE not in text:
                raise ValueError(f"The chat template leaves out the question: {remedy}.")

    def encode(self, sample: Sample, template: Template = "think_answer") -> EncodedPrompt:
        """Render the prompt, preprocess the images and expand each placeholder to the image's tokens.

        Each image is loaded once.

        Raises:
            ValueError: an image cannot be loaded or used; the message names the sample.
        """
        rendered = render_prompt(sample, template, self.wording, controls=self._controls)
        text = self.render(rendered.messages)
        try:
            prompt = self.encode_text(text, [source.load() for source in sample.images])
        except ValueError as error:
            raise ValueError(f"An image of sample {shown(sample.id)} cannot be used: {error}") from error
        return replace(prompt, neutralised=rendered.neutralised, template=template, wording=self.wording)

    def encode_text(self, text: str, images: Sequence[Image.Image]) -> EncodedPrompt:
        """Tokenize a rendered prompt, preprocess its images and expand each placeholder to the image's tokens.

        Args:
            text: with one placeholder per image, and no other special token that the data wrote.
            images: of the prompt.

        Raises:
            ValueError: an image cannot be used.
        """
        ids = self.tokenize(text)
        assert int((ids == self._placeholder_id).sum()) == len(images), (
            "the chat template places images, and texts are neutralised"
        )
        inputs: dict[str, NDArray[Any]] = {}
        if images:
            ids, inputs = self.family.encode_images(ids, text, images, self.readers)
        return EncodedPrompt(ids, inputs, text)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]) -> EncodedPrompt:
        """Encode a conversation for the model's next turn: the chat template with the messages as they are.

        Args:
            messages: as Hugging Face processors take them; an image is a part ``{"type": "image"}``.
            images: RGB, in the order of their parts.

        Raises:
            ValueError: a text holds a control token, the chat template refuses the messages, or an image cannot be
                used.
        """
        contents = [message["content"] for message in messages]
        parts = [part for content in contents if not isinstance(content, str) for part in content]
        texts = [content for content in contents if isinstance(content, str)]
        for text in [*texts, *(part["text"] for part in parts if part["type"] == "text")]:
            for token in {*self._controls, self._placeholder}:
                if token in text:
                    raise ValueError(
                        f"a message holds {token}, which is a control token of this model: write it in another way"
                    )
        try:
            text = self.render(messages)
            ids = self.tokenize(text)
        except FILE_ERRORS as error:
            raise ValueError(
                f"the chat template of this model refuses these messages ({printable(str(error), 400)})"
            ) from error
        found = int((ids == self._placeholder_id).sum())
        if found != len(images):
            raise ValueError(
                f"the chat template of this model makes {number_of(found, 'placeholder')} for "
                f"{number_of(len(images), 'image')}: put the images into messages of the user"
            )
        inputs: dict[str, NDArray[Any]] = {}
        if images:
            try:
                ids, inputs = self.family.encode_images(ids, text, images, self.readers)
            except ValueError as error:
                raise ValueError(f"an image cannot be used: {error}") from error
        return EncodedPrompt(ids, inputs, text)

    def encoding_bytes(self, sample: Sample) -> int:
        """Upper bound of the memory that :meth:`encode` needs for a sample, from the headers of its images."""
        return self.family.encoding_bytes(sample, self.readers)

    def expected_tokens(self, sample: Sample) -> float:
        """Estimate the length of a sample's prompt without decoding: a token per four characters, and the tokens of
        each image from its header (the maximum if the header has no size)."""
        tokens = (len(sample.question) + sum(map(len, sample.options))) / 4
        return tokens + self.family.expected_tokens(sample, self.readers)

    def positions(self, prompt: EncodedPrompt) -> NDArray[np.int64]:
        """(axes, T) positions of a prompt's tokens. Completions continue at the maximum + 1, equal in all axes."""
        return self.family.positions(prompt, self.readers)

    def blocks(self, prompt: EncodedPrompt) -> NDArray[np.int64] | None:
        """(T,) the tokens of a prompt that attend in both directions, from :meth:`Family.blocks`."""
        return self.family.blocks(prompt, self.readers)

    def pad(self, prompts: Sequence[EncodedPrompt], device: torch.device | str) -> PaddedPrompts:
        """Pad prompts on the right to a batch with explicit positions."""
        width = max(len(prompt.input_ids) for prompt in prompts)
        ids = np.full((len(prompts), width), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(prompts), width), dtype=bool)
        positions = np.zeros((self.family.num_axes, len(prompts), width), dtype=np.int64)
        following = np.zeros(len(prompts), dtype=np.int64)
        blocks = np.full((len(prompts), width), -1, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            length = len(prompt.input_ids)
            ids[row, :length] = prompt.input_ids
            mask[row, :length] = True
            own = self.positions(prompt)
            positions[:, row, :length] = own
            following[row] = own.max() + 1
            block = self.blocks(prompt)
            if block is not None:
                blocks[row, :length] = block
        arrays = (ids, mask, positions, following, blocks)
        padded = PaddedPrompts(*(torch.from_numpy(array).to(device) for array in arrays))
        return padded if (blocks >= 0).any() else padded._replace(blocks=None)

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
        self.family.save_image_processor(self.image_processor, folder)
        if self.wording != DEFAULT_WORDING:
            words = json.dumps(asdict(self.wording), indent=2, ensure_ascii=False)
            (folder / WORDING_FILE).write_text(words + "\n", encoding="utf-8")


def trained_wording(*folders: str | Path | None) -> Wording:
    """The words and tags that a checkpoint was trained with: of the first folder that records them, else the default.

    Raises:
        ValueError: the file that records them is damaged.
    """
    for folder in folders:
        file = Path(folder or "") / WORDING_FILE
        if folder is not None and file.is_file():
            try:
                return TypeAdapter(Wording).validate_json(file.read_bytes())
            except ValidationError as error:
                raise ValueError(
                    f"{file}, which records the prompt that this model was trained with, is damaged: restore it, or "
                    "remove it and set prompt.system, prompt.instruction and prompt.tags."
                ) from error
    return DEFAULT_WORDING
