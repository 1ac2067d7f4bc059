"""Reinforcement-learning fine-tuning of vision-language models for medical visual question answering."""

__version__ = "0.1.0"
