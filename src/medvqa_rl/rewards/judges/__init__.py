"""Language models that grade reasoning and answers: requests, rubrics, prompts and back-ends.

Imports torch only where a local judge is loaded.
"""

from medvqa_rl.rewards.judges.protocol import Grade, Judge, JudgeIdentity, JudgeRequest

__all__ = ["Grade", "Judge", "JudgeIdentity", "JudgeRequest"]
