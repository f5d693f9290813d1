"""The hidden states of a worker's samples between two blocks."""

from __future__ import annotations

from collections.abc import Iterable, MutableSequence
from typing import Any

import torch
from torch import Tensor

from billhook.layerworkers.scratch import Parked, Parking


class Activations(MutableSequence[Tensor]):
    """One hidden state [1, T, H] per sample: where it was made, or parked and brought to ``device`` when asked for."""

    def __init__(self, device: torch.device, parking: Parking | None):
        self._device, self._parking = device, parking
        self._states: list[Tensor | Parked] = []

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, index: Any) -> Any:
        """Return one sample's hidden state on the device."""
        state = self._states[index]
        return state if isinstance(state, Tensor) else state.rows(0, state.shape[0]).to(self._device)

    def __setitem__(self, index: Any, value: Tensor | Iterable[Tensor]) -> None:
        """Replace one sample's hidden state."""
        assert isinstance(value, Tensor)
        _give_up(self._states[index])
        self._states[index] = self._kept(value)

    def insert(self, index: int, value: Tensor) -> None:
        """Add a sample's hidden state."""
        self._states.insert(index, self._kept(value))

    def __delitem__(self, index: Any) -> None:
        """Remove a sample, or, given a slice, several; their places may be used again."""
        for state in self._states[index] if isinstance(index, slice) else [self._states[index]]:
            _give_up(state)
        del self._states[index]

    def _kept(self, value: Tensor) -> Tensor | Parked:
        return value if self._parking is None else self._parking.park(value)


def _give_up(state: Tensor | Parked) -> None:
    if not isinstance(state, Tensor):
        state.give_up()
