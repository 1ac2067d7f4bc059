"""The batch being decoded: its cache, its rows and where they stand, in memory whose addresses stay.

Legend: n rows (completions being written), m slots (prompts that they read), w places (rows of one prompt), S width of
the prompts, L limit of the completions, K key-value heads, D size of a head.

The keys and values of a prompt are stored once, in a slot; all its completions read them there. A row holds only what
it wrote itself. Rows in use are always the first n, slots the first m: whatever finishes is overwritten by the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medvqa_rl.models.qwen_vl import backbone, causal_model


class Shape(NamedTuple):
    """All that a decoding step must know before it runs: sizes, and what it may leave out."""

    rows: int
    """n."""
    slots: int
    """m."""
    places: int
    """w: every slot is asked by so many queries at once; n <= m * w."""
    width: int
    """Columns of the prompts to read."""
    extent: int
    """Columns of the completions to read."""
    is_even: bool
    """All rows write column ``extent`` - 1, so none has a column to hide."""
    is_padded: bool
    """Some prompt is shorter than ``width``."""
    is_grid: bool
    """Row s * w + i is the i-th of slot s, so rows need no rearranging."""


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    prompt_keys: Tensor
    """(slots, K, S, D)."""
    prompt_values: Tensor
    own_keys: Tensor
    """(rows, K, L, D)."""
    own_values: Tensor


class Prefilled(NamedTuple):
    """Prompts read by the model, padded on the right."""

    keys: Sequence[Tensor]
    """Per layer (P, K, T, D)."""
    values: Sequence[Tensor]
    logits: Tensor
    """(P, V) for the first token of a completion."""
    lengths: Sequence[int]
    next_positions: Tensor
    """(P,) the position of the first token of a completion."""


class Room(NamedTuple):
    """What a batch shall have room for."""

    slots: int
    """At most so many prompts at a time."""
    places: int
    """At most so many completions of one prompt."""
    rows: int
    """At most so many completions at a time."""
    width: int
    """S, tokens of the longest prompt."""
    length: int
    """L."""


class DecodeState:
    """Room for a number of completions of a number of prompts."""

    def __init__(self, model: nn.Module, room: Room, device: torch.device | str, *, is_static: bool = False) -> None:
        """
        Args:
            model: whose keys and values these are.
            room: for how much; :meth:`admit` makes room for longer prompts.
            device: of the model.
            is_static: steps may be asked for with more rows, slots and columns than are in use, and with all places
                of every slot.
        """
        slots, places, rows, width, length = room
        self.capacity, self.slot_capacity, self.places, self.length = rows, slots, places, length
        self.device = device
        self.width = width
        """S, the tokens that a slot has room for."""
        self.version = 0
        """Changes where :meth:`admit` had to take other memory for longer prompts."""
        self._model = model
        self._is_static = is_static
        attentions = [layer.self_attn for layer in backbone(model).language_model.layers]
        dtype = causal_model(model).dtype

        made: Any = {"dtype": dtype, "device": device}
        self.layers = []
        for attention in attentions:
            heads, size = attention.num_key_value_heads, attention.head_dim
            prompt, own = (slots, heads, width, size), (rows, heads, length, size)
            self.layers.append(LayerCache(*(torch.zeros(sizes, **made) for sizes in (prompt, prompt, own, own))))
        integers: Any = {"dtype": torch.long, "device": device}
        self.hidden = torch.zeros(slots, width, dtype=torch.bool, device=device)
        """(slots, S) True at padding of the prompts."""
        self.cosines, self.sines = rotary_table(model, width + length, device)
        self.tokens = torch.zeros(rows, length, **integers)
        self.last = torch.zeros(rows, **integers)
        """(rows,) the newest token, which the next step reads."""
        self.step = torch.zeros(rows, **integers)
        """(rows,) its place in the completion, and the column that the next step writes."""
        self.start = torch.zeros(rows, **integers)
        """(rows,) the position of the completion's first token."""
        self.is_done = torch.ones(rows, dtype=torch.bool, device=device)
        self.is_stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        """(rows,) True where a stop token ended the completion."""
        self.u = torch.zeros(rows, length, dtype=torch.float64, device=device)
        """(rows, L) the uniforms that pick its tokens."""
        self.is_finite = torch.ones((), dtype=torch.bool, device=device)
        self.cell = torch.zeros(rows, **integers)
        """(rows,) slot * w + place."""
        self.grid = torch.zeros(slots * places, **integers)
        """(m * w,) the row of each cell; of a cell without one, any row."""
        self.columns = torch.arange(length, device=device)
        self.row_numbers = torch.arange(rows, device=device)

        # The rows as the host knows them, by row and by slot.
        self.owners: list[int] = []
        """What the caller calls each row."""
        self._row_slots: list[int] = []
        self._begun: list[int] = []
        self._slot_lengths: list[int] = []
        self._clock = 0
        self._places = 0
        self._is_grid = True

    @property
    def num_rows(self) -> int:
        return len(self.owners)

    @property
    def num_slots(self) -> int:
        return len(self._slot_lengths)

    @property
    def room(self) -> tuple[int, int]:
        """Free rows and free slots."""
        return self.capacity - self.num_rows, self.slot_capacity - self.num_slots

    @property
    def extent(self) -> int:
        """Columns of the completions that are written, or will be by the next step."""
        return self._clock - min(self._begun) + 1 if self._begun else 0

    def shape(self) -> Shape:
        """The next step's, with no row, slot or column too many."""
        width = max(self._slot_lengths)
        return Shape(
            rows=self.num_rows,
            slots=self.num_slots,
            places=self._places,
            width=width,
            extent=self.extent,
            is_even=min(self._begun) == max(self._begun),
            is_padded=min(self._slot_lengths) < width,
            is_grid=self._is_grid,
        )

    def clear(self) -> None:
        """Forget all rows and slots, and anything that was not finite."""
        for layer in self.layers:
            for room in layer:
                room.zero_()
        self.is_done.fill_(True)
        self.is_finite.fill_(True)
        for listed in (self.owners, self._row_slots, self._begun, self._slot_lengths):
            listed.clear()

    def tick(self) -> None:
        """Note that a step was taken."""
        self._clock += 1

    def admit(self, prefilled: Prefilled, owners: Sequence[Sequence[int]], u: Tensor | None) -> slice:
        """Take in prompts and the rows that complete them; their first tokens are yet to be picked.

        Args:
            prefilled: the prompts.
            owners: per prompt, what to call each of its rows.
            u: (new rows, L) uniforms; None where none are needed.

        Returns:
            The new rows.
        """
        count, width = len(owners), prefilled.keys[0].shape[2]
        if width > self.width:
            self._widen(width)
        slots = slice(self.num_slots, self.num_slots + count)
        new = [name for group in owners for name in group]
        rows = slice(self.num_rows, self.num_rows + len(new))
        assert slots.stop <= self.slot_capacity and rows.stop <= self.capacity, "the batch has no room"
        for layer, keys, values in zip(self.layers, prefilled.keys, prefilled.values):
            for room, states in ((layer.prompt_keys, keys), (layer.prompt_values, values)):
                room[slots, :, :width] = states
            # What is read of an earlier row must be finite: hidden columns are multiplied by zero, not skipped.
            for room in (layer.own_keys, layer.own_values):
                room[rows, :, : max(self.extent, 1)] = 0
        lengths = torch.tensor(prefilled.lengths, device=self.device)
        self.hidden[slots] = torch.arange(self.width, device=self.device) >= lengths[:, None]
        repeats = torch.tensor([len(group) for group in owners], device=self.device)
        self.start[rows] = prefilled.next_positions.repeat_interleave(repeats)
        self.step[rows] = -1
        self.is_done[rows] = False
        self.is_stopped[rows] = False
        if u is not None:
            self.u[rows] = u
        self.owners += new
        self._row_slots += [slots.start + index for index, group in enumerate(owners) for _ in group]
        self._begun += [self._clock] * len(new)
        self._slot_lengths += prefilled.lengths
        self._index()
        return rows

    def remove(self, done: Sequence[bool]) -> None:
        """Drop the rows that are done, and the slots that no row reads any more.

        Args:
            done: per row in use.
        """
        kept = [row for row, is_done in enumerate(done) if not is_done]
        holes, movers = _holes(kept)
        if movers:
            source, target = (torch.tensor(rows, device=self.device) for rows in (movers, holes))
            extent = self.extent
            for layer in self.layers:
                for room in (layer.own_keys, layer.own_values):
                    room[:, :, :extent].index_copy_(0, target, room[:, :, :extent].index_select(0, source))
            for values in (self.tokens, self.last, self.step, self.start, self.is_done, self.is_stopped, self.u):
                values.index_copy_(0, target, values.index_select(0, source))
        for listed in (self.owners, self._row_slots, self._begun):
            _move(listed, holes, movers, len(kept))
        self.is_done[len(kept) :] = True

        kept = sorted(set(self._row_slots))
        holes, movers = _holes(kept)
        if movers:
            source, target = (torch.tensor(slots, device=self.device) for slots in (movers, holes))
            for layer in self.layers:
                for room in (layer.prompt_keys, layer.prompt_values):
                    room.index_copy_(0, target, room.index_select(0, source))
            self.hidden.index_copy_(0, target, self.hidden.index_select(0, source))
        _move(self._slot_lengths, holes, movers, len(kept))
        moved = dict(zip(movers, holes))
        self._row_slots[:] = [moved.get(slot, slot) for slot in self._row_slots]
        self._index()

    def _index(self) -> None:
        """Say which row stands where in the grid of slots and places."""
        seen = [0] * self.num_slots
        places = []
        for slot in self._row_slots:
            places.append(seen[slot])
            seen[slot] += 1
        self._places = self.places if self._is_static else max(seen, default=0)
        cells = [slot * self._places + place for slot, place in zip(self._row_slots, places)]
        self._is_grid = cells == list(range(self.num_slots * self._places))
        if self._is_static:
            self.cell.zero_()
            self.grid.zero_()
        elif self._is_grid:
            return
        grid = [0] * (self.num_slots * self._places)
        for row, cell in enumerate(cells):
            grid[cell] = row
        self.cell[: len(cells)] = torch.tensor(cells, device=self.device)
        self.grid[: len(grid)] = torch.tensor(grid, device=self.device)

    def _widen(self, width: int) -> None:
        """Make room for longer prompts."""
        width = -(-width // 64) * 64 if self._is_static else width

        def wider(room: Tensor) -> Tensor:
            new = room.new_zeros(*room.shape[:2], width, room.shape[3])
            new[: self.num_slots, :, : self.width] = room[: self.num_slots]
            return new

        self.layers = [
            layer._replace(prompt_keys=wider(layer.prompt_keys), prompt_values=wider(layer.prompt_values))
            for layer in self.layers
        ]
        hidden = self.hidden.new_ones(len(self.hidden), width)
        hidden[:, : self.width] = self.hidden
        self.hidden, self.width = hidden, width
        self.version += 1
        self.cosines, self.sines = rotary_table(self._model, width + self.length, self.device)


def rotary_table(model: nn.Module, count: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(count, D) cosines and sines of the positions 0, 1 ... of text, by the model's own rotary embedding.

    The first half of the sines is negative: x * cos + roll(x, D / 2) * sin then rotates x.
    """
    text = backbone(model).language_model
    positions = torch.arange(count, device=device).expand(3, 1, -1)
    cosines, sines = text.rotary_emb(text.embed_tokens.weight[:1], positions)
    sines = sines[0].clone()
    sines[:, : sines.shape[-1] // 2] *= -1
    return cosines[0].clone(), sines


def _holes(kept: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where gaps among the first len(kept) places are, and which of the later ones are to fill them."""
    first = set(kept)
    return [place for place in range(len(kept)) if place not in first], [place for place in kept if place >= len(kept)]


def _move(listed: list[Any], holes: Sequence[int], movers: Sequence[int], count: int) -> None:
    """Fill the holes of a list and cut it to ``count``."""
    for hole, mover in zip(holes, movers):
        listed[hole] = listed[mover]
    del listed[count:]
