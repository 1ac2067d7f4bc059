"""Decoding steps replayed as CUDA graphs: each step is one launch, and several are asked for at once.

A step (:func:`medvqa_rl.rollout.step.advance`) reads and writes nothing but a :class:`DecodeState` and the weights, at
addresses that stay, so what was recorded once is right for every later step of the same shape. Shapes are rounded up
to few sizes; rows, slots and columns too many are hidden or never read. Not yet measured on a GPU, hence not the
default. ``torch.compile`` is not used: whether it pays beside graphs has to be measured first, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from medvqa_rl.rollout.state import DecodeState, Room, Shape
from medvqa_rl.rollout.step import Picker, Sampling, advance

Run = Callable[[], None]

BURST = 8
"""Steps between two looks at what is done: each look waits for the GPU."""
COLUMNS = 64
"""Columns are rounded up to a multiple of this."""


def capture_graph(run: Run, pool: Any) -> Run:
    """Run once, so that every library has what it needs, record a second time without running; gives the replay.

    Args:
        run: works on memory that stays, and leaves nothing behind in new memory.
        pool: of ``torch.cuda.graph_pool_handle``; what graphs need only while they run may be shared by all.
    """
    side: Any = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph.replay


class GraphDecoder:
    """Keeps states and the graphs recorded on them from call to call."""

    def __init__(self, model: nn.Module, device: torch.device | str, capture: Callable[[Run, Any], Run]) -> None:
        """
        Args:
            model: may be trained between calls, in place.
            device: of the model.
            capture: :func:`capture_graph`, or what stands in for it without a GPU.
        """
        self._model, self._device, self._capture = model, device, capture
        self._pool: Any = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self._states: dict[tuple[int, int], DecodeState] = {}
        self._graphs: dict[tuple[int, int], dict[tuple[Shape, Sampling | None], Run]] = {}
        self._memory: dict[tuple[int, int], int] = {}
        self._addresses: list[int] = []
        self._lent: set[tuple[int, int]] = set()

    def borrow(self, room: Room) -> DecodeState:
        """An empty state with at least this much room; to be given back."""
        addresses = [parameter.data_ptr() for parameter in self._model.parameters()]
        if addresses != self._addresses:  # weights that were replaced, not changed in place
            self._graphs.clear()
            self._addresses = addresses
        key = room.places, room.length
        assert key not in self._lent, "the groups of one call must be taken before the next call begins"
        state = self._states.get(key)
        if state is None or state.capacity < room.rows or state.slot_capacity < room.slots:
            # What is replaced goes first, so that both never exist at once.
            state = None
            self._states.pop(key, None)
            self._graphs.pop(key, None)
            room = room._replace(width=_round_up(room.width, COLUMNS))
            state = DecodeState(self._model, room, self._device, is_static=True)
            self._states[key] = state
        state.clear()
        self._lent.add(key)
        return state

    def give_back(self, state: DecodeState) -> None:
        """Let the next call have the state."""
        self._lent.remove((state.places, state.length))

    def advance(self, state: DecodeState, picker: Picker) -> None:
        """Take BURST steps; rows that are done stand still."""
        key = state.places, state.length
        if self._memory.get(key) != state.version:  # longer prompts needed other memory
            self._graphs.pop(key, None)
            self._memory[key] = state.version
        graphs = self._graphs.setdefault(key, {})
        shape = bucket(state.shape(), state, BURST)
        for _ in range(BURST):
            replay = graphs.get((shape, picker.sampling))
            if replay is None:
                run = partial(advance, self._model, state, shape, picker)
                graphs[shape, picker.sampling] = self._capture(run, self._pool)  # which takes the step, too
            else:
                replay()
            state.tick()


def bucket(shape: Shape, state: DecodeState, steps: int) -> Shape:
    """The size to record for a shape and the next steps from it: powers of two for rows and slots, no shortcuts."""
    return Shape(
        rows=min(_power(shape.rows), state.capacity),
        slots=min(_power(shape.slots), state.slot_capacity),
        places=state.places,
        width=state.width,
        extent=min(_round_up(shape.extent + steps - 1, COLUMNS), state.length),
        is_even=False,
        is_padded=True,
        is_grid=False,
    )


def _power(count: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (count - 1).bit_length()


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
