"""A language model asked whether reasoning makes sense: requests, verdicts, prompts and back-ends.

Imports torch only where a judge on this machine is loaded.
"""

from medvqa_rl.rewards.judges.protocol import Judge, JudgeIdentity, JudgeRequest, Verdict
from medvqa_rl.rewards.judges.rubric import Grade, Grader, GradeRequest

__all__ = ["Grade", "GradeRequest", "Grader", "Judge", "JudgeIdentity", "JudgeRequest", "Verdict"]
