"""How many bytes of tensors are alive while a block runs, on whatever device: counted by storage as operators
make them, so views cost nothing and what autograd keeps counts."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageTracker(TorchDispatchMode):
    """A context. Storages that were made before it do not count, whatever becomes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        """Bytes now, and the most so far."""
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._take(tensor.untyped_storage(), given)
        return found

    def _take(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:
            return
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self._known[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.alive -= size
        self._known.pop(key, None)
