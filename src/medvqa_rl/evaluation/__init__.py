"""Evaluation: greedy answers, metrics and intervals."""
