"""Rollouts through the generation of transformers."""
