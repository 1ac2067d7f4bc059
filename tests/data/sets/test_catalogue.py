"""Run: pytest tests/data/sets/test_catalogue.py"""

from typing import get_args

from medvqa_rl.config import DataConfig
from medvqa_rl.data.sets.catalogue import ENTRIES


def test_every_data_set_has_an_entry() -> None:
    assert [entry.name for entry in ENTRIES] == list(get_args(DataConfig.model_fields["name"].annotation))
    for entry in ENTRIES:
        assert all((entry.what, entry.splits, entry.columns, entry.terms, entry.source))
