"""Which tensors a computation has made and still holds: to count them, and to park them while it waits."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from billhook.layerworkers.scratch import Parking


class LiveTensors:
    """Notes every tensor that is made while :meth:`watching`; those that nobody holds any more drop out."""

    def __init__(self) -> None:
        self._references: list[weakref.ref[Tensor]] = []
        self._mode = _Watching(self.note)
        self.peak_bytes = 0
        """Most bytes that were alive at once while watching; kept by :meth:`note` on the meta device only."""
        self.made_bytes = 0
        """Bytes that were made while watching, whether they are still alive or not; likewise."""

    def watching(self) -> AbstractContextManager[Any]:
        """Return a context in which tensors are noted."""
        return self._mode

    def note(self, tensor: Tensor) -> None:
        """Count a tensor among those that were made."""
        if tensor.device.type == "meta":
            storage = tensor.untyped_storage()
            if storage._cdata not in {each.untyped_storage()._cdata for each in self.tensors()}:
                self.made_bytes += storage.nbytes()
        self._references.append(weakref.ref(tensor))
        if tensor.device.type == "meta":
            self.peak_bytes = max(self.peak_bytes, self.size_bytes())

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are alive, in the order in which they were made."""
        alive = [(reference, tensor) for reference in self._references if (tensor := reference()) is not None]
        self._references = [reference for reference, _ in alive]
        return [tensor for _, tensor in alive]

    def size_bytes(self) -> int:
        """Return the bytes of what is alive; tensors that share memory count once."""
        storages = [tensor.untyped_storage() for tensor in self.tensors()]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class _Watching(TorchDispatchMode):
    def __init__(self, note: Callable[[Tensor], None]):
        super().__init__()
        self._note = note

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out


@dataclass(frozen=True)
class _View:
    tensor: Tensor
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class ParkedTensors:
    """Tensors that gave up their memory, and where its content waits."""

    def __init__(self, tensors: Sequence[Tensor], parking: Parking):
        """Park the memory of ``tensors``, each piece once; they cannot be used until it is restored.

        Nothing else may look at that memory in between.
        """
        views: dict[int, list[_View]] = {}
        storages: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
            views.setdefault(storage._cdata, []).append(
                _View(tensor, int(tensor.storage_offset()), tensor.shape, tensor.stride())
            )
        self._waiting = [(parking.park(_bytes_of(storages[key])), views[key]) for key in storages]
        for tensor in tensors:
            tensor.set_(torch.empty(0, dtype=tensor.dtype, device=tensor.device).untyped_storage(), 0, (0,), (1,))

    def restore(self) -> None:
        """Give every tensor its content back."""
        waiting, self._waiting = self._waiting, []
        for parked, views in waiting:
            storage = parked.take().to(views[0].tensor.device).untyped_storage()
            for view in views:
                view.tensor.set_(storage, view.offset, view.shape, view.stride)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
