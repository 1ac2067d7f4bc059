"""Attention over shared prefixes equals plain attention over copies, whichever sequences have joined and left."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from medvqa_rl.models.prefix.prefill import Prefilled
from medvqa_rl.rollout.state import Capacity, DecodeState, Owner, rotary_table
from medvqa_rl.rollout.step import attend, write

HEADS, KEYS, SIZE, LENGTH = 4, 2, 8, 12  # of the tiny model
SCRIPTS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), max_size=3),  # new prompts: tokens and sequences
        st.integers(0, 3),  # steps
        st.lists(st.booleans(), min_size=12, max_size=12),  # which sequences are then done
    ),
    min_size=1,
    max_size=5,
)


class Shadow:
    """The same sequences, each with its own copy of its prompt's keys and values, in plain lists."""

    def __init__(self) -> None:
        self.rows: dict[Owner, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def attention(self, owner: Owner, query: torch.Tensor) -> torch.Tensor:
        """(HEADS, SIZE) for a query of that shape."""
        keys, values = (torch.cat(states, dim=1).double() for states in self.rows[owner])
        repeated = (states.repeat_interleave(HEADS // KEYS, dim=0) for states in (keys, values))
        return scaled_dot_product_attention(query.double()[:, None], *repeated, scale=1.0)[:, 0].float()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=SCRIPTS, seed=st.integers(0, 99), is_static=st.booleans())
def test_attention_equals_attention_over_copies(tiny_policy, script, seed, is_static):
    model = tiny_policy().model
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *sizes: torch.randn(sizes, generator=generator)  # noqa: E731
    state = DecodeState(model, Capacity(12, 3, 12, 1, LENGTH), "cpu", is_static=is_static)
    shadow, cache_index, number = Shadow(), 1, 0
    for prompts, steps, done in script:
        admitted, rows = [], 0
        for length, count in prompts[: state.free_slots]:
            if rows + count <= state.free_rows:
                admitted.append((length, [Owner(number, index) for index in range(count)]))
                rows, number = rows + count, number + 1
        if admitted:
            width = max(length for length, _ in admitted)
            keys, values = draw(len(admitted), KEYS, width, SIZE), draw(len(admitted), KEYS, width, SIZE)
            for index, (length, _) in enumerate(admitted):
                keys[index, :, length:] = values[index, :, length:] = 1e4  # padding that would show
            zeros = torch.zeros(len(admitted), dtype=torch.long)
            lengths = [length for length, _ in admitted]
            prefilled = Prefilled([keys] * 2, [values] * 2, draw(len(admitted), 5), lengths, zeros)
            new = state.admit(prefilled, [owners for _, owners in admitted], None)
            state.token_index[new] = 0
            for index, (length, owners) in enumerate(admitted):
                for owner in owners:
                    shadow.rows[owner] = ([keys[index, :, :length]], [values[index, :, :length]])
        for _ in range(steps):
            if not state.owners or state.longest >= LENGTH:
                break
            shape, cache = state.shape(), state.layers[cache_index]
            key, value = draw(shape.rows, KEYS, SIZE), draw(shape.rows, KEYS, SIZE)
            query = draw(shape.rows, HEADS, SIZE)
            write(key, value, state, cache, shape)
            found = attend(query.view(shape.rows, KEYS, -1, SIZE), state, cache, shape).reshape(-1, HEADS, SIZE)
            for row, owner in enumerate(state.owners):
                for states, one in zip(shadow.rows[owner], (key, value)):
                    states.append(one[row][:, None])
                torch.testing.assert_close(found[row], shadow.attention(owner, query[row]), atol=1e-5, rtol=1e-5)
            state.token_index[: shape.rows] += 1
            state.count_step()
        if state.owners:
            is_done = [done[row % 12] for row in range(state.num_rows)]
            gone = {owner for owner, ends in zip(state.owners, is_done) if ends}
            state.remove(is_done)
            assert sorted(state.owners) == sorted(shadow.rows.keys() - gone)
            for owner in gone:
                del shadow.rows[owner]


def test_finished_sequences_free_their_rows_and_slots(tiny_policy):
    state = DecodeState(tiny_policy().model, Capacity(2, 2, 4, 3, LENGTH), "cpu")
    keys = [torch.ones(1, KEYS, 3, SIZE)] * 2
    prefilled = Prefilled(keys, keys, torch.zeros(1, 5), [3], torch.zeros(1, dtype=torch.long))
    assert (state.free_rows, state.free_slots) == (4, 2)
    state.admit(prefilled, [[Owner(0, 0), Owner(0, 1)]], None)
    state.admit(prefilled, [[Owner(1, 0), Owner(1, 1)]], None)
    assert (state.free_rows, state.free_slots) == (0, 0)
    state.remove([True, False, False, False])
    assert (state.free_rows, state.free_slots) == (1, 0)
    assert state.owners == [(1, 1), (0, 1), (1, 0)]  # the last one moved into the gap
    state.remove([False, True, False])
    assert state.owners == [(1, 1), (1, 0)]
    assert (state.free_rows, state.free_slots) == (2, 1)
    assert state.shape().slots == 1


@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl"])
def test_rotary_table_equals_the_rotation_of_transformers(arch, tiny_policy):
    model = tiny_policy(arch).model
    cosines, sines = rotary_table(model, 40, "cpu")
    text = model.model.language_model
    x = torch.randn(1, 3, 40, SIZE, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40).expand(3, 1, -1)
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

    expected, _ = apply_rotary_pos_emb(x, x, *text.rotary_emb(x, positions))
    assert torch.equal(x * cosines + x.roll(SIZE // 2, -1) * sines, expected)
