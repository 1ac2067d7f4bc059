"""The batch being decoded: its KV cache and per-sequence state, in statically allocated buffers.

A sequence is one completion being decoded. The keys and values of a prompt are stored once, in a slot of the prefix
cache, and read by all its sequences; a row of the completion cache holds only what its own sequence wrote:

    prefix cache (m, K, S, D)                completion cache (n, K, L, D)
    slot 0  [p p p p p p p p]  <--+--------  row 0  [c c c c c . . .]
                                  +--------  row 1  [c c c c c . . .]
    slot 1  [p p p p p - - -]  <-----------  row 2  [c c . . . . . .]  joined the batch three steps later
    slot 2  [free           ]                row 3  [free           ]

    p prompt token   - padding   c completion token   . not written yet

Attention over the prefix batches the queries of each slot. Row r is at ``cell_of_row[r]`` of this grid, and
``row_of_cell`` is the inverse, with any row where a cell is empty:

              column 0   column 1
    slot 0    row 0      row 1
    slot 1    row 2      empty

Rows in use are always the first n and slots the first m: when a sequence finishes, the last one moves into the gap.

Legend: n rows, m slots, w columns of the grid (sequences per prompt), S prompt tokens, L completion tokens,
K key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medvqa_rl.models.families import shared_family_of
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.families.shared import FULL
from medvqa_rl.models.prefix.prefill import Prefilled


class Owner(NamedTuple):
    """Whose completion a sequence is."""

    prompt: int
    """Index of the prompt, in the order of the requests."""
    completion: int
    """Index among the prompt's completions, in [0, G)."""


class Capacity(NamedTuple):
    """Sizes that a batch is allocated for."""

    slots: int
    """Prompts at a time."""
    rows_per_slot: int
    """Sequences per prompt, w."""
    rows: int
    """Sequences at a time."""
    prompt_length: int
    """S, tokens of the longest prompt."""
    completion_length: int
    """L."""


class Shape(NamedTuple):
    """Sizes of a decoding step, and which work it can skip. A CUDA graph is captured for one shape."""

    rows: int
    """n."""
    slots: int
    """m."""
    rows_per_slot: int
    """w; n <= m * w."""
    prompt_length: int
    """Prefix tokens to attend to."""
    completion_length: int
    """Completion tokens to attend to, the one that this step reads included."""
    is_aligned: bool
    """All sequences have the same length, so none has unwritten tokens to mask."""
    is_padded: bool
    """Some prompt is shorter than ``prompt_length``."""
    is_grid: bool
    """Rows are already in grid order and fill it, so no gather is needed."""
    is_windowed: bool
    """Some sequence may be longer than the sliding window."""


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    prompt_keys: Tensor
    """(slots, K, S, D)."""
    prompt_values: Tensor
    own_keys: Tensor
    """(rows, K, L, D)."""
    own_values: Tensor


class _Row(NamedTuple):
    """What the host knows of a sequence."""

    owner: Owner
    slot: int
    first_step: int
    """Steps that the batch had taken when the sequence joined."""


class DecodeState:
    """KV cache and state of a batch of sequences."""

    def __init__(
        self, model: nn.Module, capacity: Capacity, device: torch.device | str, *, is_static: bool = False
    ) -> None:
        """
        Args:
            model: whose keys and values are cached.
            capacity: of the buffers; :meth:`admit` reallocates those of the prompts when a longer one arrives.
            device: of the model.
            is_static: the grid always has the capacity's columns, and steps may cover more rows, slots and tokens than
                are in use, as CUDA graphs of rounded shapes do.
        """
        slots, rows_per_slot, rows, prompt_length, length = self.capacity = capacity
        self.device = device
        self.version = 0
        """Incremented when :meth:`admit` reallocates buffers, which invalidates captured graphs."""
        self._model = model
        self._is_static = is_static

        family = shared_family_of(model)
        self.layer_types = family.layer_types(model)
        self.window = family.window(model)
        cached: Any = {"dtype": causal_model(model).dtype, "device": device}
        self.layers = []
        for layer in family.text(model).layers:
            heads, size = layer.self_attn.config.num_key_value_heads, layer.self_attn.head_dim
            prompt, own = (slots, heads, prompt_length, size), (rows, heads, length, size)
            self.layers.append(LayerCache(*(torch.zeros(sizes, **cached) for sizes in (prompt, prompt, own, own))))
        integers: Any = {"dtype": torch.long, "device": device}
        self.is_padding = torch.zeros(slots, prompt_length, dtype=torch.bool, device=device)
        """(slots, S) True at the padding of the prompts."""
        self.rotary = self._rotary_tables()
        """By layer type."""
        self.tokens = torch.zeros(rows, length, **integers)
        self.last_token = torch.zeros(rows, **integers)
        """(rows,) the newest token, which the next step reads."""
        self.token_index = torch.zeros(rows, **integers)
        """(rows,) index of the newest token in its completion, where the next step writes its keys and values."""
        self.first_position = torch.zeros(rows, **integers)
        """(rows,) the position of the completion's first token."""
        self.logps = torch.zeros(rows, length, device=device)
        """(rows, L) log-probabilities of the tokens; written by greedy decoding only."""
        self.is_done = torch.ones(rows, dtype=torch.bool, device=device)
        self.is_stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        """(rows,) True where a stop token ended the completion."""
        self.uniforms = torch.zeros(rows, length, dtype=torch.float64, device=device)
        """(rows, L) the uniforms that pick the tokens."""
        self.is_finite = torch.ones((), dtype=torch.bool, device=device)
        """False once any logits were not finite."""
        self.cell_of_row = torch.zeros(rows, **integers)
        """(rows,) slot * w + column."""
        self.row_of_cell = torch.zeros(slots * rows_per_slot, **integers)
        """(m * w,) the row in each cell of the grid; any row where the cell is empty."""
        self.length_range = torch.arange(length, device=device)
        self.prompt_range = torch.arange(prompt_length, device=device)
        self.row_range = torch.arange(rows, device=device)

        # The host's view of the batch, so that a step does not wait for the device.
        self._rows: list[_Row] = []
        self._prompt_lengths: list[int] = []
        """By slot."""
        self._num_steps = 0
        self._update_shape()

    @property
    def owners(self) -> list[Owner]:
        """Of each row in use."""
        return [row.owner for row in self._rows]

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def num_slots(self) -> int:
        return len(self._prompt_lengths)

    @property
    def free_rows(self) -> int:
        return self.capacity.rows - self.num_rows

    @property
    def free_slots(self) -> int:
        return self.capacity.slots - self.num_slots

    @property
    def longest(self) -> int:
        """Tokens of the longest completion, the one that the next step reads included; 0 for an empty batch."""
        return self._num_steps - self._oldest_step + 1 if self._rows else 0

    def shape(self) -> Shape:
        """The smallest shape for the next step."""
        is_windowed = needs_window(self.window, self._shape.prompt_length, self.longest)
        return self._shape._replace(completion_length=self.longest, is_windowed=is_windowed)

    def clear(self) -> None:
        """Remove all sequences and prompts, and reset :attr:`is_finite`."""
        for layer in self.layers:
            for states in layer:
                states.zero_()
        self.is_done.fill_(True)
        self.is_finite.fill_(True)
        self._rows.clear()
        self._prompt_lengths.clear()
        self._update_shape()

    def count_step(self) -> None:
        """Note that a step was taken."""
        self._num_steps += 1

    def admit(self, prefilled: Prefilled, owners: Sequence[Sequence[Owner]], uniforms: Tensor | None) -> slice:
        """Add prompts and their sequences to the batch; the first tokens are still to be picked.

        Args:
            prefilled: the prompts.
            owners: per prompt, the owners of its sequences.
            uniforms: (new rows, L); None for greedy decoding.

        Returns:
            The new rows.
        """
        length = prefilled.keys[0].shape[2]
        if length > self.capacity.prompt_length:
            self._reallocate(length)
        first_slot = self.num_slots
        new = [
            _Row(owner, first_slot + index, self._num_steps) for index, group in enumerate(owners) for owner in group
        ]
        slots, rows = slice(first_slot, first_slot + len(owners)), slice(self.num_rows, self.num_rows + len(new))
        assert slots.stop <= self.capacity.slots and rows.stop <= self.capacity.rows, "the batch is full"
        for layer, keys, values in zip(self.layers, prefilled.keys, prefilled.values):
            layer.prompt_keys[slots, :, :length] = keys
            layer.prompt_values[slots, :, :length] = values
            # Masked tokens are multiplied by zero, not skipped, so what an earlier sequence left must be finite.
            layer.own_keys[rows, :, : max(self.longest, 1)] = 0
            layer.own_values[rows, :, : max(self.longest, 1)] = 0
        lengths = torch.tensor(prefilled.lengths, device=self.device)
        self.is_padding[slots] = torch.arange(self.capacity.prompt_length, device=self.device) >= lengths[:, None]
        repeats = torch.tensor([len(group) for group in owners], device=self.device)
        self.first_position[rows] = prefilled.next_positions.repeat_interleave(repeats)
        self.token_index[rows] = -1
        self.is_done[rows] = False
        self.is_stopped[rows] = False
        if uniforms is not None:
            self.uniforms[rows] = uniforms
        self._rows += new
        self._prompt_lengths += prefilled.lengths
        self._update_shape()
        return rows

    def remove(self, is_done: Sequence[bool]) -> None:
        """Remove the sequences that are done, and the prompts that no sequence reads any more.

        Args:
            is_done: by row in use.
        """
        moves, count = _moves([row for row, done in enumerate(is_done) if not done])
        longest = self.longest
        for layer in self.layers:
            self._move(moves, layer.own_keys[:, :, :longest], layer.own_values[:, :, :longest])
        self._move(
            moves, self.tokens, self.last_token, self.token_index, self.first_position, self.uniforms, self.logps
        )
        self._move(moves, self.is_done, self.is_stopped)
        for target, source in moves.items():
            self._rows[target] = self._rows[source]
        del self._rows[count:]
        self.is_done[count:] = True

        moves, count = _moves(sorted({row.slot for row in self._rows}))
        for layer in self.layers:
            self._move(moves, layer.prompt_keys, layer.prompt_values)
        self._move(moves, self.is_padding)
        for target, source in moves.items():
            self._prompt_lengths[target] = self._prompt_lengths[source]
        del self._prompt_lengths[count:]
        new_slots = {source: target for target, source in moves.items()}
        self._rows = [row._replace(slot=new_slots.get(row.slot, row.slot)) for row in self._rows]
        self._update_shape()

    def _move(self, moves: dict[int, int], *buffers: Tensor) -> None:
        """Copy rows or slots of some buffers, target <- source."""
        if moves:
            target, source = (torch.tensor([*indices], device=self.device) for indices in (moves, moves.values()))
            for buffer in buffers:
                buffer.index_copy_(0, target, buffer.index_select(0, source))

    def _update_shape(self) -> None:
        """Work out the shape of the next steps, all but its completion length, and the order of rows in the grid."""
        columns, used = [], [0] * self.num_slots
        for row in self._rows:
            columns.append(used[row.slot])
            used[row.slot] += 1
        width = self.capacity.rows_per_slot if self._is_static else max(used, default=0)
        cells = [row.slot * width + column for row, column in zip(self._rows, columns)]
        first_steps = [row.first_step for row in self._rows]
        self._oldest_step = min(first_steps, default=0)
        longest_prompt = max(self._prompt_lengths, default=0)
        self._shape = Shape(
            rows=self.num_rows,
            slots=self.num_slots,
            rows_per_slot=width,
            prompt_length=longest_prompt,
            completion_length=0,
            is_aligned=self._oldest_step == max(first_steps, default=0),
            is_padded=min(self._prompt_lengths, default=0) < longest_prompt,
            is_grid=cells == list(range(self.num_slots * width)),
            is_windowed=False,
        )
        if self._is_static:
            self.cell_of_row.zero_()
            self.row_of_cell.zero_()
        elif self._shape.is_grid:
            return
        rows = [0] * (self.num_slots * width)
        for row_index, cell in enumerate(cells):
            rows[cell] = row_index
        self.cell_of_row[: len(cells)] = torch.tensor(cells, device=self.device)
        self.row_of_cell[: len(rows)] = torch.tensor(rows, device=self.device)

    def _reallocate(self, prompt_length: int) -> None:
        """Allocate the prefix cache for longer prompts and copy what is in use."""
        length = -(-prompt_length // 64) * 64 if self._is_static else prompt_length
        old = self.capacity.prompt_length

        def longer(states: Tensor) -> Tensor:
            new = states.new_zeros(*states.shape[:2], length, states.shape[3])
            new[: self.num_slots, :, :old] = states[: self.num_slots]
            return new

        self.layers = [
            layer._replace(prompt_keys=longer(layer.prompt_keys), prompt_values=longer(layer.prompt_values))
            for layer in self.layers
        ]
        is_padding = self.is_padding.new_ones(len(self.is_padding), length)
        is_padding[:, :old] = self.is_padding
        self.is_padding = is_padding
        self.capacity = self.capacity._replace(prompt_length=length)
        self.rotary = self._rotary_tables()
        self.prompt_range = torch.arange(length, device=self.device)
        self.version += 1

    def _rotary_tables(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The rotations of all positions that fit the capacity, by layer type."""
        count = self.capacity.prompt_length + self.capacity.completion_length
        return {kind: rotary_table(self._model, count, self.device, kind) for kind in sorted(set(self.layer_types))}


def needs_window(window: int | None, prompt_length: int, completion_length: int) -> bool:
    """Whether a sliding window hides any token from a sequence of this length."""
    return window is not None and prompt_length + completion_length > window


def rotary_table(
    model: nn.Module, count: int, device: torch.device | str, layer_type: str = FULL
) -> tuple[Tensor, Tensor]:
    """(count, D) cosines and sines of the text positions 0, 1 ... in layers of a type.

    The first half of the sines is negated, so that x * cos + roll(x, D / 2) * sin rotates x.
    """
    cosines, sines = shared_family_of(model).rotary(model, count, device, layer_type)
    sines = sines.clone()
    sines[:, : sines.shape[-1] // 2] *= -1
    return cosines.clone(), sines


def _moves(kept: Sequence[int]) -> tuple[dict[int, int], int]:
    """Moves target <- source that bring the kept indices (ascending) to the first places, and how many are kept."""
    count, in_place = len(kept), set(kept)
    gaps = [index for index in range(count) if index not in in_place]
    return dict(zip(gaps, [index for index in kept if index >= count], strict=True)), count
