"""Recognise the columns of a table by their names, in five languages. Imports no torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

SYNONYMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "image": (
            *("images", "image_path", "image_paths", "image_file", "image_name", "image_filename", "img", "img_path"),
            *("img_name", "img_file", "file", "filename", "file_path", "path", "picture", "photo"),
            *("figure", "figure_path"),
            *("bild", "bilder", "bilddatei", "bildname", "bildpfad", "datei", "dateiname", "dateipfad"),
            *("fichier", "nom_fichier", "nom_du_fichier", "fichier_image", "chemin"),
            *("imagen", "imágenes", "archivo", "nombre_archivo", "nombre_del_archivo", "fichero", "ruta"),
            *("图像", "图片", "影像", "文件", "文件名", "图像文件", "图片文件", "图像路径", "图片路径"),
        ),
        "question": (
            *("questions", "question_text", "query", "problem", "prompt"),
            *("frage", "fragen", "fragestellung", "fragetext"),
            *("intitulé", "énoncé"),
            *("pregunta", "preguntas"),
            *("问题", "提问", "题目"),
        ),
        "answer": (
            *("answers", "answer_text", "correct_answer", "gold", "gold_answer", "ground_truth", "gt", "gt_answer"),
            *("label", "solution", "response", "answer_label", "answer_idx", "answer_index"),
            *("antwort", "antworten", "richtige_antwort", "lösung"),
            *("réponse", "réponses", "bonne_réponse"),
            *("respuesta", "respuestas", "respuesta_correcta", "solución"),
            *("答案", "回答", "正确答案", "标准答案"),
        ),
        "options": (
            *("option", "choices", "answer_choices", "candidates"),
            *("optionen", "auswahl", "antwortmöglichkeiten", "auswahlmöglichkeiten"),
            *("choix", "propositions"),
            *("opciones", "alternativas"),
            *("选项", "备选答案"),
        ),
        "answer_type": ("antworttyp", "type_de_réponse", "tipo_de_respuesta", "答案类型"),
        "reasoning": ("begründung", "raisonnement", "razonamiento", "推理"),
        "description": ("beschreibung", "befund", "compte_rendu", "descripción", "informe", "描述", "报告"),
        "modality": ("modalität", "modalité", "modalidad", "模态", "检查方式"),
        "organ": ("organe", "órgano", "器官", "部位"),
        "family": ("question_family",),
        "id": (),
        "split": (),
        "patient": (),
    }
)
"""Our names of columns -> other names in English, German, French, Spanish and Chinese. Case, blanks, punctuation and
accents do not count. Patients have names of their own (:mod:`medvqa_rl.data.patients`)."""

REQUIRED = ("image", "question", "answer")


def folded(name: str) -> str:
    """The name of a column without case, accents, blanks and punctuation: "Patient ID" is patientid."""
    decomposed = unicodedata.normalize("NFKD", name.casefold())
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", _without_accents(decomposed))))


def _without_accents(text: str) -> str:
    return "".join(character for character in text if not unicodedata.combining(character))


_STANDARD = {folded(other): name for name, others in SYNONYMS.items() for other in others}
_OWN = {folded(name): name for name in SYNONYMS} | {"images": "image"}


def is_own(column: str) -> bool:
    """Whether a column has one of our names, but for case, accents, blanks and punctuation."""
    return folded(column) in _OWN


class AmbiguousColumns(ValueError):
    """Raised if several columns have the same meaning; ``standard`` is our name of it, ``columns`` are they."""

    def __init__(self, standard: str, columns: list[str]) -> None:
        super().__init__(f"{standard}: {columns}")
        self.standard = standard
        self.columns = columns


@cache
def standard_names(columns: tuple[str, ...], given: tuple[tuple[str, str], ...] = ()) -> Mapping[str, str]:
    """Our name of each column that has one.

    A column that the user names comes first, then one with exactly our name, one with our name but for case, blanks,
    accents and punctuation, and last one with another name of :data:`SYNONYMS`.

    Args:
        columns: the columns of a table.
        given: (our name, column) as the user gives them.

    Raises:
        AmbiguousColumns: several columns have the same meaning, and none comes first.
    """
    found: dict[str, str] = {}
    for name, column in given:
        if column in columns:
            found[column] = name
        elif alike := [other for other in columns if folded(other) == folded(column)]:
            found[alike[0]] = name
    ranks: dict[str, dict[int, list[str]]] = {}
    for column in columns:
        key = folded(column)
        if column in found:
            continue
        if column in SYNONYMS or column == "images":
            ranks.setdefault(_OWN[key], {}).setdefault(0, []).append(column)
        elif key in _OWN:
            ranks.setdefault(_OWN[key], {}).setdefault(1, []).append(column)
        elif key in _STANDARD:
            ranks.setdefault(_STANDARD[key], {}).setdefault(2, []).append(column)
    named = dict(given)
    for name, by_rank in ranks.items():
        best = by_rank[min(by_rank)]
        if name in named:
            continue
        if set(best) == {"image", "images"}:
            continue  # images is read where image is empty
        if len(best) > 1:
            raise AmbiguousColumns(name, best)
        found[best[0]] = name
    return MappingProxyType(found)
