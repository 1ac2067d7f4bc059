"""Token sampling, against distributions computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvqa_rl.core.randomness import address, uniforms
from medvqa_rl.rollout import sampling
from medvqa_rl.rollout.sampling import pick_greedy, pick_tokens, uniform_table

ALMOST_ONE = 1.0 - 2.0**-53


def pick(probabilities, u, **settings):
    """The token that u picks from a distribution given by its probabilities."""
    logits = torch.tensor([probabilities], dtype=torch.float64).log()
    return int(pick_tokens(logits, torch.tensor([u], dtype=torch.float64), **settings))


@pytest.mark.parametrize(
    ("u", "token"),
    [(0.0, 0), (0.09, 0), (0.11, 1), (0.29, 1), (0.31, 2), (0.69, 2), (0.71, 3), (ALMOST_ONE, 3)],
)
def test_inverse_of_the_cumulative_distribution(u, token):
    assert pick([0.1, 0.2, 0.4, 0.3], u) == token


@pytest.mark.parametrize(
    ("temperature", "shares"),
    [
        (1.0, [0.1, 0.2, 0.4, 0.3]),
        (0.5, [0.01 / 0.3, 0.04 / 0.3, 0.16 / 0.3, 0.09 / 0.3]),  # squares, normalised
        (2.0, [math.sqrt(p) / sum(map(math.sqrt, (0.1, 0.2, 0.4, 0.3))) for p in (0.1, 0.2, 0.4, 0.3)]),
    ],
)
def test_temperature(temperature, shares):
    edges = np.cumsum(shares)
    for token, edge in enumerate(edges[:-1]):
        assert pick([0.1, 0.2, 0.4, 0.3], edge - 1e-9, temperature=temperature) == token
        assert pick([0.1, 0.2, 0.4, 0.3], edge + 1e-9, temperature=temperature) == token + 1


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, [2]),
        ({"top_k": 2}, [2, 3]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 0.01}, [2]),
        ({"top_p": 0.39}, [2]),
        ({"top_p": 0.41}, [2, 3]),
        ({"top_p": 0.69}, [2, 3]),
        ({"top_p": 0.71}, [1, 2, 3]),
        ({"top_p": 0.95}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.5}, [2]),  # of the two kept, the first has 4/7
        ({"top_k": 2, "top_p": 0.6}, [2, 3]),
        ({"temperature": 0.5, "top_p": 0.5}, [2]),  # temperature comes first: token 2 has 16/30
        ({"top_p": 0.5, "suppressed": torch.tensor([2])}, [3]),  # so does suppression: token 3 has 1/2
        ({"top_k": 2, "suppressed": torch.tensor([2])}, [1, 3]),
    ],
)
def test_top_k_and_top_p(settings, kept):
    weights = np.array([0.1, 0.2, 0.4, 0.3]) ** (1 / settings.get("temperature", 1.0))
    grid = (np.arange(2000) + 0.5) / 2000
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.3]], dtype=torch.float64).log().expand(2000, -1)
    picked = pick_tokens(logits, torch.from_numpy(grid), **settings).numpy()
    shares = np.bincount(picked, minlength=4) / 2000
    expected = np.where(np.isin(np.arange(4), kept), weights, 0)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=1 / 2000)
    assert (np.diff(picked) >= 0).all()  # by token id


def test_ties_keep_the_lower_ids():
    logits = torch.zeros(100, 5)
    u = torch.linspace(0, ALMOST_ONE, 100, dtype=torch.float64)
    assert set(pick_tokens(logits, u, top_k=2).tolist()) == {0, 1}
    assert set(pick_tokens(logits, u, top_p=0.5).tolist()) == {0, 1, 2}


def test_extreme_uniforms_never_pick_a_token_of_zero_mass():
    # Far below the maximum the mass is 0 in float64: neither u = 0 nor u close to 1 may land there.
    logits = torch.tensor([[-1e4, -1e4, 0.0, -1e4, 0.0, -1e4]])
    for u, token in [(0.0, 2), (0.5, 4), (ALMOST_ONE, 4)]:
        assert int(pick_tokens(logits, torch.tensor([u], dtype=torch.float64))) == token


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=40),
    u=st.one_of(st.sampled_from([0.0, ALMOST_ONE]), st.floats(0, ALMOST_ONE)),
    top_k=st.integers(0, 6),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    data=st.data(),
)
def test_picked_tokens_are_always_allowed(logits, u, top_k, top_p, temperature, data):
    suppressed = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=len(logits) - 1, unique=True))
    picked = int(
        pick_tokens(
            torch.tensor([logits]),
            torch.tensor([u], dtype=torch.float64),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            suppressed=torch.tensor(suppressed, dtype=torch.long),
        )
    )
    allowed = [(logit, id) for id, logit in enumerate(logits) if id not in suppressed]
    assert picked not in suppressed
    rank = sorted(allowed, key=lambda item: (-item[0], item[1])).index((logits[picked], picked))
    assert rank < (top_k or len(logits))
    assert math.exp((logits[picked] - max(allowed)[0]) / temperature) > 0


def test_frequencies_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    u = torch.from_numpy(uniforms(address("frequencies"), 40_000))
    picked = pick_tokens(probabilities.log().expand(40_000, -1), u)
    shares = torch.bincount(picked, minlength=4) / 40_000
    torch.testing.assert_close(shares, probabilities, atol=0.01, rtol=0)


def test_rows_are_independent():
    logits = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    u = torch.from_numpy(uniforms(3, 7))
    whole = pick_tokens(logits, u, top_k=9, top_p=0.8)
    assert whole.tolist() == [int(pick_tokens(logits[i : i + 1], u[i : i + 1], top_k=9, top_p=0.8)) for i in range(7)]


def test_arguments_are_not_modified():
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).double()
    before = logits.clone()
    pick_tokens(logits.clone(), torch.zeros(2, dtype=torch.float64), suppressed=torch.tensor([1]))
    pick_greedy(logits, suppressed=torch.tensor([1]))
    assert torch.equal(logits, before)
    pick_tokens(logits, torch.zeros(2, dtype=torch.float64), suppressed=torch.tensor([1]))
    assert torch.equal(logits, before)


def test_greedy_skips_suppressed_tokens_and_breaks_ties_by_id():
    logits = torch.tensor([[1.0, 9.0, 5.0, 5.0]])
    assert pick_greedy(logits)[0].tolist() == [1]
    assert pick_greedy(logits, suppressed=torch.tensor([1]))[0].tolist() == [2]


def test_uniform_table_is_addressed():
    table = uniform_table(7, "train", 3, ["a", "b"], [0, 1], 2, 5)
    assert table.shape == (4, 5)
    assert np.array_equal(table[3], uniforms(address(7, "train", 3, "b", 1, 1), 5))
    alone = uniform_table(7, "train", 3, ["b"], [1], 2, 9)
    assert np.array_equal(alone[:, :5], table[2:])
    others = [
        uniform_table(8, "train", 3, ["a"], [0], 1, 5),
        uniform_table(7, "eval", 3, ["a"], [0], 1, 5),
        uniform_table(7, "train", 4, ["a"], [0], 1, 5),
        uniform_table(7, "train", 3, ["a"], [1], 1, 5),
    ]
    assert not any(np.isclose(table[:1], other).any() for other in others)
    assert uniform_table(7, "train", 3, [], [], 2, 5).shape == (0, 5)


def test_both_inversions_agree():
    """Binary search in sequential sums, and the search that tolerates parallel sums."""
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(500, 40, generator=generator, dtype=torch.float64)
    mass[torch.rand(500, 40, generator=generator) < 0.7] = 0
    mass[:, 7] += 1e-12
    u = torch.from_numpy(uniforms(1, 500))
    u[:3], u[3:6] = 0.0, ALMOST_ONE
    expected = [int(np.flatnonzero(row.cumsum(0) > draw * row.sum())[0]) for row, draw in zip(mass[6:], u[6:])]
    found = sampling._invert_in_order(mass, u)
    assert found[6:].tolist() == expected
    assert torch.equal(found, sampling._invert(mass, u))
    assert (mass.gather(1, found[:, None]) > 0).all()
