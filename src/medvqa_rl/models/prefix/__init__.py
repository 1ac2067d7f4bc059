"""Prefixes that prompts and completions share, computed once."""
