"""The scoring rules of lmms-eval. Imports no torch.

Source: https://github.com/EvolvingLMMs-Lab/lmms-eval. Read, not run: ``lmms_eval/tasks/slake/utils.py`` at
65ef07dfd5aae0f3bda3106bb672364a1ca00d0a and ``lmms_eval/tasks/mmmu/utils.py`` at
02bc1c056e173018e36803b70ae900ad69180ac5. It has no tasks for VQA-RAD, PathVQA, PMC-VQA, OmniMedVQA and VQA-Med; forks
have some.
"""

from __future__ import annotations

import re
import string

from medvqa_rl.evaluation.measures import mmmu
from medvqa_rl.evaluation.measures.harness_texts import Verdict, compared
from medvqa_rl.evaluation.records import EvalRecord

SOURCES = (
    "EvolvingLMMs-Lab/lmms-eval@65ef07dfd5aae0f3bda3106bb672364a1ca00d0a",
    "EvolvingLMMs-Lab/lmms-eval@02bc1c056e173018e36803b70ae900ad69180ac5",
)
_YES = {"yes", "yeah", "yep", "true", "是", "是的", "有", "包含", "可以", "能", "会", "正常"}
_NO = {"no", "nope", "false", "否", "不是", "没有", "无", "不包含", "不能", "不会", "不可以", "不正常", "异常"}
_WIDE = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～、《》【】"
_BLANKS = str.maketrans(dict.fromkeys(string.punctuation + _WIDE, " "))
_WITH_TASKS = ("slake_en", "slake_zh", "mmmu_medical", "own", "phantom")


def score(record: EvalRecord, dataset: str) -> Verdict:
    """Score an answer by the rule for its data set, ``data.name``; own and generated questions by their kind.

    Of these, choices are scored as in MMMU, others as in SLAKE. The rules know no tags, so they see the parsed answer
    if there is one, else the output.
    """
    if dataset not in _WITH_TASKS:
        return Verdict(None, f"lmms-eval has no task for {dataset}.")
    response = record.output if record.answer is None else record.answer
    if record.answer_type == "choice":
        return mmmu.choice(response, record.options, record.gold, letters="ends")
    if dataset == "mmmu_medical":
        return mmmu.open_answer(response, (record.gold, *record.alternatives))
    return compared(normalised(response), normalised(record.gold))


def normalised(text: str) -> str:
    """A text as the task SLAKE compares it: in lower case, without what stands in parentheses, punctuation as blanks;
    "x ray" is "xray", and words for yes and no are these, the Chinese ones for "normal" and "abnormal" among them."""
    text = re.sub(r"\([^)]*\)|（[^）]*）", " ", text.strip().lower())
    text = " ".join(text.translate(_BLANKS).split())
    text = "xray" if text == "x ray" else text
    return "yes" if text in _YES else "no" if text in _NO else text
