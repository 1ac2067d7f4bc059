"""A language model asked whether reasoning makes sense: requests, verdicts, prompts and back-ends.

Imports torch only where a judge on this machine is loaded.
"""

from medvqa_rl.judges.protocol import Judge, JudgeIdentity, JudgeRequest, Verdict

__all__ = ["Judge", "JudgeIdentity", "JudgeRequest", "Verdict"]
