"""A causal language model on this machine as grader: it writes its verdict as JSON, greedily.

The model's turn is begun for it with ``{"score":``, so that small models write no preface; the rest must make a
verdict (:func:`medvqa_rl.rewards.judges.rubric.parse_grade`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from transformers import GenerationConfig

from medvqa_rl.rewards.judges.local import LocalJudge
from medvqa_rl.rewards.judges.protocol import JudgeIdentity
from medvqa_rl.rewards.judges.rubric import MAX_TOKENS, PROBES, Grade, GradeRequest, Rubric, defused, parse_grade

BEGINNING = '{"score":'


class LocalGrader:
    """Grades on a rubric with the model of a judge."""

    def __init__(self, judge: LocalJudge, rubric: Rubric) -> None:
        """
        Args:
            judge: its model is used, and its prompt's form.
            rubric: what to grade.

        Raises:
            ValueError: the judge's prompt has no form for instructions.
        """
        if judge.prompt.wrap is None:
            raise ValueError(
                f"The judge {judge.identity.name!r} continues text (prompt {judge.prompt.name!r}) and follows no "
                "instructions, so it cannot grade on a rubric: set judge.model to a chat or instruct model, or to an "
                "endpoint's."
            )
        self._judge, self._rubric, self._wrap = judge, rubric, judge.prompt.wrap
        self.identity = JudgeIdentity(judge.identity.name, judge.identity.fingerprint, rubric.hash, 0.0)
        self._counts: Counter[str] = Counter()
        model, tokenizer = judge.model, judge.tokenizer
        ends = model.generation_config.eos_token_id
        self._generation = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # some models' own settings punish the braces and quotes of JSON
            no_repeat_ngram_size=0,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )

    @property
    def counters(self) -> Mapping[str, float]:
        return dict(self._counts)

    def check(self) -> None:
        """Grade once, to know before training that the model writes verdicts.

        Raises:
            ValueError: it does not; the message says what it wrote.
        """
        grade = self.grade([PROBES[0]])[0]
        if math.isnan(grade.score):
            raise ValueError(
                f"The judge {self.identity.name!r} does not grade on the rubric {self._rubric.name!r} "
                f"({grade.reason}): set judge.model to a model that follows instructions."
            )

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """One grade per request; what has nothing to be graded gets 0, a prompt beyond the model's length fails."""
        grades = [self._rubric.without_asking(request) for request in requests]
        prompts: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            if grades[index] is not None:
                continue
            tokens = self._encode(request)
            if len(tokens) + MAX_TOKENS > self._judge.limit:
                grades[index] = Grade.failed(
                    f"the prompt has {len(tokens)} tokens and the verdict up to {MAX_TOKENS}, the judge reads "
                    f"{self._judge.limit}"
                )
            else:
                prompts[index] = tokens
        order = sorted(prompts, key=lambda index: len(prompts[index]))
        for first in range(0, len(order), self._judge.batch_size):
            some = order[first : first + self._judge.batch_size]
            for index, text in zip(some, self._write([prompts[index] for index in some])):
                grades[index] = parse_grade(BEGINNING + text)
        done = [grade for grade in grades if grade is not None]
        assert len(done) == len(requests), "every request has its grade"
        self._counts.update(asked=len(requests), failed=sum(math.isnan(grade.score) for grade in done))
        return done

    def _encode(self, request: GradeRequest) -> list[int]:
        text = self._wrap(self._rubric.render(defused(request, self._judge.special))) + BEGINNING
        adds = self._judge.prompt.adds_special_tokens
        ids: list[int] = self._judge.tokenizer(text, add_special_tokens=adds)["input_ids"]
        ends = {self._judge.tokenizer.eos_token_id, self._judge.tokenizer.sep_token_id}
        while ids and ids[-1] in ends:  # what some tokenizers put behind every text
            ids = ids[:-1]
        return ids

    @torch.no_grad()
    def _write(self, prompts: Sequence[list[int]]) -> list[str]:
        """What the model writes behind each prompt; padded on the left."""
        model, width = self._judge.model, max(map(len, prompts))
        ids = torch.full((len(prompts), width), int(self._generation.pad_token_id or 0))
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(prompts):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        written = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=self._generation
        )
        texts: list[str] = self._judge.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        return texts
