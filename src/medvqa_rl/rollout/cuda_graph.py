"""Decoding steps replayed as CUDA graphs: one launch per step, several of them queued before the host synchronises.

A step (:func:`medvqa_rl.rollout.step.advance`) reads and writes only the statically allocated buffers of a
:class:`DecodeState` and the weights, so a captured graph stays valid for every later step of the same shape. Shapes
are rounded up so that few graphs suffice; the extra rows, slots and tokens are masked or never read. Not measured on a
GPU yet, hence not the default. ``torch.compile`` is not used: its benefit on top of graphs is not measured either.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from medvqa_rl.rollout.state import Capacity, DecodeState, Shape, needs_window
from medvqa_rl.rollout.step import Picker, Sampling, advance

Run = Callable[[], None]

STEPS_PER_SYNC = 8
"""Steps between two checks for finished sequences; each check waits for the GPU."""
LENGTH_MULTIPLE = 64
"""Prompt and completion lengths are rounded up to a multiple of this."""


def capture_graph(run: Run, pool: Any) -> Run:
    """Run once to warm up, capture a second run, and return the replay of that graph.

    Args:
        run: works on static buffers only.
        pool: from ``torch.cuda.graph_pool_handle``; graphs that share it share their temporary memory.
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
    """Keeps decode states, and the graphs captured on them, between calls."""

    def __init__(self, model: nn.Module, device: torch.device | str, capture: Callable[[Run, Any], Run]) -> None:
        """
        Args:
            model: may be trained between calls, in place.
            device: of the model.
            capture: :func:`capture_graph`, or a stand-in in tests without a GPU.
        """
        self._model, self._device, self._capture = model, device, capture
        self._pool: Any = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self._states: dict[tuple[int, int], DecodeState] = {}
        self._graphs: dict[tuple[int, int], dict[tuple[Shape, Sampling | None], Run]] = {}
        self._versions: dict[tuple[int, int], int] = {}
        self._addresses: list[int] = []
        self._in_use: set[tuple[int, int]] = set()

    def acquire(self, capacity: Capacity) -> DecodeState:
        """An empty state of at least this capacity; return it with :meth:`release`."""
        addresses = [parameter.data_ptr() for parameter in self._model.parameters()]
        if addresses != self._addresses:  # weights were replaced instead of changed in place
            self._graphs.clear()
            self._addresses = addresses
        key = _key(capacity)
        assert key not in self._in_use, "consume all groups of one call before the next"
        state = self._states.get(key)
        if state is None or state.capacity.rows < capacity.rows or state.capacity.slots < capacity.slots:
            # Free the old state first, so that the two never exist at once.
            state = None
            self._states.pop(key, None)
            self._graphs.pop(key, None)
            capacity = capacity._replace(prompt_length=_round_up(capacity.prompt_length, LENGTH_MULTIPLE))
            state = DecodeState(self._model, capacity, self._device, is_static=True)
            self._states[key] = state
        state.clear()
        self._in_use.add(key)
        return state

    def release(self, state: DecodeState) -> None:
        """Make the state available to the next call."""
        self._in_use.remove(_key(state.capacity))

    def advance(self, state: DecodeState, picker: Picker) -> None:
        """Take :data:`STEPS_PER_SYNC` steps; sequences that are done do not change."""
        key = _key(state.capacity)
        if self._versions.get(key) != state.version:  # buffers were reallocated for longer prompts
            self._graphs.pop(key, None)
            self._versions[key] = state.version
        graphs = self._graphs.setdefault(key, {})
        shape = round_shape(state.shape(), state.capacity, STEPS_PER_SYNC, state.window)
        for _ in range(STEPS_PER_SYNC):
            replay = graphs.get((shape, picker.sampling))
            if replay is None:
                run = partial(advance, self._model, state, shape, picker)
                graphs[shape, picker.sampling] = self._capture(run, self._pool)  # also takes the step
            else:
                replay()
            state.count_step()


def round_shape(shape: Shape, capacity: Capacity, steps: int, window: int | None = None) -> Shape:
    """The shape to capture for the next steps: rows and slots rounded up to powers of two, no work skipped."""
    length = min(_round_up(shape.completion_length + steps - 1, LENGTH_MULTIPLE), capacity.completion_length)
    return Shape(
        rows=min(_power(shape.rows), capacity.rows),
        slots=min(_power(shape.slots), capacity.slots),
        rows_per_slot=capacity.rows_per_slot,
        prompt_length=capacity.prompt_length,
        completion_length=length,
        is_aligned=False,
        is_padded=True,
        is_grid=False,
        is_windowed=needs_window(window, capacity.prompt_length, length),
    )


def _key(capacity: Capacity) -> tuple[int, int]:
    """States are kept by the sizes that never grow."""
    return capacity.rows_per_slot, capacity.completion_length


def _power(count: int) -> int:
    """The smallest power of two that is not smaller than the count."""
    return 1 << (count - 1).bit_length()


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
