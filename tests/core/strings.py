"""Strings for property tests."""

from hypothesis import strategies as st

from medvqa_rl.core.prompts import TAGS

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
PIECES = st.lists(
    st.one_of(st.sampled_from([*TAGS, "<|image_pad|>", "<", ">", "/", "|", "THINK", " ", "\n", "A", "a the"]), TEXTS),
    max_size=12,
).map("".join)
"""Strings that mix tags, parts of tags and other text."""
