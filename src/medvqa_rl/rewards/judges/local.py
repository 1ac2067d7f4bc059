"""A causal language model on this machine as judge: Yes if log P("Yes") > log P("No"), else No.

Both answers are scored as whole token sequences behind the same prompt. Prompts are batched by length, the tokens
that all of them begin with are computed once and kept.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from medvqa_rl.config import JudgeConfig, is_hub_id
from medvqa_rl.config.problems.judge import EMBEDDED_JUDGES
from medvqa_rl.core.embedded import ASSETS
from medvqa_rl.models.dtype import uses_bfloat16
from medvqa_rl.models.fingerprint import weights_fingerprint
from medvqa_rl.rewards.judges.prompts import BIOGPT, BIOMISTRAL, PHANTOM, PROBES, JudgePrompt, chat_prompt, defused
from medvqa_rl.rewards.judges.protocol import NO_REASONING, JudgeIdentity, JudgeRequest, Verdict

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "pytorch_model*.bin"]


class _Case(NamedTuple):
    """A prompt with its two answers as tokens: the answers begin where the sequences differ."""

    yes: tuple[int, ...]
    no: tuple[int, ...]
    start: int


class _Piece(NamedTuple):
    """What the model must read to score an answer; the answer's last token needs no reading."""

    tokens: tuple[int, ...]
    start: int
    """Where the answer begins. Answers of one token share the piece."""


class LocalJudge:
    """A Hugging Face causal language model with a prompt.

    Attributes:
        model, tokenizer, prompt, batch_size: as given.
        special: strings that must not stand in a text, the longest first.
        limit: tokens that the model reads.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt: JudgePrompt,
        *,
        name: str,
        strictness: float = 0.0,
        batch_size: int = 32,
    ) -> None:
        """
        Args:
            model: a ``PreTrainedModel`` with a language-model head, on its device.
            tokenizer: the model's.
            name: as in the settings.
            strictness: nats by which log P("Yes") must exceed log P("No").
            batch_size: prompts read together.

        Raises:
            ValueError: the vocabulary cannot write Yes and No.
        """
        self.model, self.tokenizer, self.prompt = model.eval(), tokenizer, prompt
        self.batch_size, self._strictness = batch_size, strictness
        self.special = sorted({*tokenizer.all_special_tokens, *_instruction_marks(prompt)}, key=len, reverse=True)
        self.limit = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
        self._prefix_cache: Any = None
        self._counts: Counter[str] = Counter()
        self._check_answers(name)
        cases = [self._encode(request) for request in PROBES]
        self._prefix = _common_prefix([case.yes[: case.start] for case in cases])
        self.identity = JudgeIdentity(name, weights_fingerprint(model), prompt.hash, strictness)

    @property
    def counters(self) -> Mapping[str, float]:
        return dict(self._counts)

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """One verdict per request; reasoning without text is No, a prompt beyond the model's length failed."""
        verdicts: list[Verdict | None] = [None] * len(requests)
        cases: dict[int, _Case] = {}
        for index, request in enumerate(requests):
            if not request.reasoning.strip():
                verdicts[index] = NO_REASONING
                continue
            case = self._encode(request)
            longest = max(len(case.yes), len(case.no)) - 1
            if longest > self.limit:
                verdicts[index] = Verdict.failed(f"the prompt has {longest} tokens, the judge reads {self.limit}")
            else:
                cases[index] = case
        margins = self._margins(list(cases.values()))
        for index, margin in zip(cases, margins):
            if math.isfinite(margin):
                verdicts[index] = Verdict(float(margin > self._strictness), margin)
            else:
                verdicts[index] = Verdict.failed("the judge gives probabilities that are no finite numbers")
        done = [verdict for verdict in verdicts if verdict is not None]
        assert len(done) == len(requests), "every request has its verdict"
        self._counts["asked"] += len(requests)
        self._counts["failed"] += sum(math.isnan(verdict.value) for verdict in done)
        return done

    def _encode(self, request: JudgeRequest) -> _Case:
        text = self.prompt.render(defused(request, self.special))
        ends = {self.tokenizer.eos_token_id, self.tokenizer.sep_token_id}
        sequences = []
        for answer in (self.prompt.yes, self.prompt.no):
            ids = self.tokenizer(text + answer, add_special_tokens=self.prompt.adds_special_tokens)["input_ids"]
            while ids and ids[-1] in ends:  # what some tokenizers put behind every text
                ids = ids[:-1]
            sequences.append(tuple(ids))
        yes, no = sequences
        return _Case(yes, no, len(_common_prefix([yes, no])))

    def _check_answers(self, name: str) -> None:
        size = self.model.get_output_embeddings().weight.shape[0]
        for request in PROBES:
            case = self._encode(request)
            tails = (case.yes[case.start :], case.no[case.start :])
            for answer, tail in zip(("Yes", "No"), tails):
                is_known = all(token < size and token != self.tokenizer.unk_token_id for token in tail)
                if not (tail and case.start and is_known):
                    raise ValueError(
                        f"The judge {name!r} cannot answer {answer!r}: its vocabulary does not write Yes and No "
                        f"behind the prompt {self.prompt.name!r}, so choose another judge.model or judge.template."
                    )

    @torch.no_grad()
    def _margins(self, cases: Sequence[_Case]) -> list[float]:
        """log P("Yes") - log P("No") of each case.

        Prompts that begin with the kept tokens are read from there on; shared pieces are read once.
        """
        pieces = dict.fromkeys(_Piece(answer[:-1], case.start) for case in cases for answer in (case.yes, case.no))
        scores: dict[_Piece, Tensor] = {}
        size = len(self._prefix)
        kept: list[_Piece] = []
        others: list[_Piece] = []
        for piece in sorted(pieces, key=lambda piece: len(piece.tokens)):
            is_kept = 0 < size < piece.start and piece.tokens[:size] == self._prefix
            (kept if is_kept else others).append(piece)
        for some, skipped in ((kept, size), (others, 0)):
            for first in range(0, len(some), self.batch_size):
                batch = some[first : first + self.batch_size]
                scores.update(zip(batch, self._read(batch, skipped)))

        def log_prob(answer: tuple[int, ...], start: int) -> float:
            """The sum over the answer's tokens."""
            tail = torch.tensor(answer[start:])
            return float(scores[_Piece(answer[:-1], start)].gather(1, tail[:, None]).sum())

        return [log_prob(case.yes, case.start) - log_prob(case.no, case.start) for case in cases]

    def _read(self, pieces: Sequence[_Piece], skipped: int) -> list[Tensor]:
        """(answer tokens, V) log-probabilities in float64 of what follows each piece from its start on.

        Padded on the right: causal attention never looks ahead, so what is real does not see it.

        Args:
            skipped: tokens at the beginning that are in the kept cache.
        """
        device = self.model.device
        width, first = max(len(piece.tokens) for piece in pieces), min(piece.start for piece in pieces) - 1
        ids = torch.zeros(len(pieces), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, piece in enumerate(pieces):
            ids[row, : len(piece.tokens)] = torch.tensor(piece.tokens)
            mask[row, : len(piece.tokens)] = 1
        cache = self._forked_prefix(len(pieces)) if skipped else None
        logits = self.model(
            input_ids=ids[:, skipped:].to(device),
            attention_mask=mask.to(device),
            position_ids=torch.arange(skipped, width, device=device)[None],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=torch.arange(first - skipped, width - skipped, device=device),
        ).logits
        return [
            logits[row, piece.start - 1 - first : len(piece.tokens) - first].double().log_softmax(-1).cpu()
            for row, piece in enumerate(pieces)
        ]

    def _forked_prefix(self, count: int) -> Any:
        """The cache of the kept tokens, once for each of ``count`` rows."""
        if self._prefix_cache is None:
            ids = torch.tensor([self._prefix], device=self.model.device)
            cache = DynamicCache(config=self.model.config)
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            self._prefix_cache = cache
        forked = copy.deepcopy(self._prefix_cache)
        forked.batch_repeat_interleave(count)
        return forked


def _instruction_marks(prompt: JudgePrompt) -> tuple[str, ...]:
    """Strings that end the prompt's turn without being special tokens."""
    return ("[INST]", "[/INST]") if prompt is BIOMISTRAL else ()


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all sequences begin with."""
    length = 0
    for tokens in zip(*sequences):
        if len(set(tokens)) > 1:
            break
        length += 1
    return sequences[0][:length]


def load_local_judge(config: JudgeConfig) -> LocalJudge:
    """Load a judge from a folder, the Hub, or the package.

    Raises:
        ValueError: it is not there, is no causal language model, has no fitting prompt, or cannot write Yes and No.
    """
    device = _device(config.device)
    folder = _folder(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16 if uses_bfloat16(config.dtype, device.type) else torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
        )
    except ImportError as error:
        raise ValueError(
            f"The judge {config.model!r} needs a package that is missing ({str(error).strip().splitlines()[0]}): "
            "install the extra with `pip install 'medvqa-rl[judge]'`."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"The judge {config.model!r} cannot be loaded as a causal language model: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    prompt = _prompt(config, model, tokenizer)
    return LocalJudge(
        model.to(device),
        tokenizer,
        prompt,
        name=config.model,
        strictness=config.strictness,
        batch_size=config.batch_size,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"judge.device is {name}, but this torch sees {torch.cuda.device_count()} CUDA devices: set judge.device "
            "to cpu or auto, or to one of them."
        )
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def _folder(config: JudgeConfig) -> Path:
    """Where the judge's files lie."""
    if config.model.startswith("phantom:"):
        folder = ASSETS / config.model.removeprefix("phantom:")
        if config.model not in EMBEDDED_JUDGES or not (folder / "model.safetensors").is_file():
            raise ValueError(
                f"There is no embedded judge {config.model!r}: use {' or '.join(EMBEDDED_JUDGES)}, which "
                "`medvqa-rl phantom build-judges` makes."
            )
        return folder
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(config.model):
        raise ValueError(
            f"judge.model is {config.model!r}, but there is no such folder: give the folder of a causal language "
            f"model, a Hugging Face Hub id such as microsoft/biogpt, or {' or '.join(EMBEDDED_JUDGES)}."
        )
    try:
        return Path(snapshot_download(config.model, revision=config.revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"judge.model is {config.model!r}, which is no folder here, and the Hugging Face Hub did not deliver it "
            f"({type(error).__name__}): check the spelling and the connection, or download it elsewhere and give its "
            "folder."
        ) from error


def _prompt(config: JudgeConfig, model: Any, tokenizer: Any) -> JudgePrompt:
    """The prompt that the settings name, or that fits the model."""
    name = config.template
    if name == "auto" and config.model.startswith("phantom:"):
        name = "phantom"
    elif name == "auto" and model.config.model_type == "biogpt":
        name = "biogpt"
    elif name == "auto" and tokenizer.chat_template:
        name = "chat"
    elif name == "auto" and model.config.model_type == "mistral":
        name = "biomistral"
    if name == "auto" or (name == "chat" and not tokenizer.chat_template):
        raise ValueError(
            f"The judge {config.model!r} ({model.config.model_type}) has no chat template: set judge.template to "
            "biogpt (the model continues a text) or biomistral (Mistral's instruction format)."
        )
    if name == "chat":
        # Templates that write today's date or open a thinking section would ask another question each day, or none.
        return chat_prompt(
            lambda text: tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                date_string="1 January 2026",
                enable_thinking=False,
            )
        )
    return {"biogpt": BIOGPT, "biomistral": BIOMISTRAL, "phantom": PHANTOM}[name]
