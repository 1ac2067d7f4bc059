"""Similarity between outputs and reference answers: TF-IDF (offline) or sentence embeddings. Imports no torch until an
embedding model is loaded."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from medvqa_rl.config import is_hub_id
from medvqa_rl.core.answers import read_choice
from medvqa_rl.core.network import unusable_proxy
from medvqa_rl.core.text import printable
from medvqa_rl.core.types import LETTERS
from medvqa_rl.evaluation.records import EvalRecord

TFIDF = "tfidf"

_WORD = re.compile(r"\w+")


class Similarity(Protocol):
    """Compares texts with references, pair by pair."""

    @property
    def name(self) -> str: ...

    def compare(self, texts: Sequence[str], references: Sequence[str]) -> list[float]: ...


def candidate_text(record: EvalRecord) -> str:
    """Return reasoning and answer as text, with an option's letter replaced by its text. An output without a parsable
    answer is returned whole, without its tags."""
    if record.answer is None:
        return record.text
    answer = record.answer
    if record.answer_type == "choice":
        letter = read_choice(answer, record.options)
        answer = answer if letter is None else record.options[LETTERS.index(letter)]
    return f"{record.think or ''} {answer}".strip()


def words(text: str) -> Counter[str]:
    """Count the words in lower case."""
    return Counter(_WORD.findall(text.lower()))


def inverse_frequencies(references: Sequence[str]) -> dict[str, float]:
    """Smoothed inverse document frequency of each word: ln((1 + N) / (1 + n)) + 1 for n of N distinct references, as
    in scikit-learn."""
    documents = sorted(set(references))
    counts = Counter(word for document in documents for word in words(document))
    return {word: math.log((1 + len(documents)) / (1 + count)) + 1 for word, count in counts.items()}


def tfidf_cosine(text: str, reference: str, weights: Mapping[str, float], unseen: float) -> float:
    """Cosine of the weighted word counts of two texts, in [0, 1]; 0 if either has no words."""
    one, other = words(text), words(reference)

    def length(counts: Mapping[str, int]) -> float:
        return math.sqrt(sum((count * weights.get(word, unseen)) ** 2 for word, count in counts.items()))

    product = sum(one[word] * other[word] * weights.get(word, unseen) ** 2 for word in one.keys() & other.keys())
    size = length(one) * length(other)
    return product / size if size else 0.0


class TfidfSimilarity:
    """Cosine of TF-IDF vectors. The weights come from the distinct references only, so they do not depend on a model's
    outputs; a word in no reference gets the weight of one that occurs in none of them."""

    name = TFIDF

    def compare(self, texts: Sequence[str], references: Sequence[str]) -> list[float]:
        """Similarity of each text to its reference."""
        weights = inverse_frequencies(references)
        unseen = math.log(1 + len(set(references))) + 1
        return [tfidf_cosine(text, reference, weights, unseen) for text, reference in zip(texts, references)]


class EmbeddingSimilarity:
    """Cosine of sentence embeddings."""

    def __init__(self, name: str, model: Any) -> None:
        """
        Args:
            name: as reported in results.
            model: a ``SentenceTransformer``.
        """
        self.name = name
        self._model = model

    def compare(self, texts: Sequence[str], references: Sequence[str]) -> list[float]:
        """Similarity of each text to its reference, in [-1, 1]; each distinct text is embedded once."""
        distinct = sorted({*texts, *references})
        if not distinct:
            return []
        vectors = np.asarray(
            self._model.encode(distinct, convert_to_numpy=True, show_progress_bar=False), dtype=np.float64
        )
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        row = {text: index for index, text in enumerate(distinct)}
        unit = vectors / np.where(norms == 0, 1.0, norms)
        return [float(unit[row[text]] @ unit[row[reference]]) for text, reference in zip(texts, references)]


def load_similarity(name: str, device: str, setting: str = "eval.similarity") -> Similarity:
    """Load a similarity measure: ``tfidf``, or a sentence-transformers model by folder or Hub id.

    Args:
        name: value of the setting.
        device: of the model.
        setting: its name in error messages.

    Raises:
        ValueError: sentence-transformers is not installed, or the model cannot be loaded.
    """
    if name == TFIDF:
        return TfidfSimilarity()
    if not Path(name).is_dir() and not is_hub_id(name):
        raise ValueError(
            f"{setting} is {name}, which is neither a folder nor a Hub id: give tfidf, the folder of a "
            "sentence-transformers model, or its id, such as sentence-transformers/all-MiniLM-L6-v2."
        )
    try:
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(
            f"{setting} is {name}, but sentence-transformers is not installed: run `pip install "
            f"'medvqa-rl[similarity]'`, or set {setting}=tfidf."
        ) from error
    try:
        model = SentenceTransformer(
            name, device=device, trust_remote_code=False, local_files_only=unusable_proxy() is not None
        )
    except (OSError, ValueError, KeyError, HTTPError) as error:
        raise ValueError(
            f"The sentence-transformers model {name} ({setting}) cannot be loaded: {printable(str(error), 400)}"
        ) from error
    return EmbeddingSimilarity(name, model)
