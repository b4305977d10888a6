"""The most bytes of tensors alive at once while some code runs: exact, on any device, `meta` included.

On the meta device a full-size model runs in seconds and holds nothing, so the memory formulas of
`runtime/memory` are checked here against the real code at its real sizes, without a GPU. What this cannot see
are the buffers that a kernel asks for inside an operation (workspaces), and an allocator's rounding.
"""

import weakref
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the storages that operations make while it is entered, until they are freed.

    `given` are tensors that live already and shall count. `live` and `peak` are bytes.
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in given:
            self._count(tensor)

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):  # what was there before, weights for one, and its views are not ours
                self._count(leaf, ours=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor, ours: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known and self._known[key]() is not None:
            return
        nbytes = storage.nbytes() if ours else 0

        def gone(_: Any, nbytes: int = nbytes, key: int = key) -> None:
            self.live -= nbytes
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.live += nbytes
        self.peak = max(self.peak, self.live)


def peak_of(run: Any, *given: Tensor) -> int:
    """Bytes alive at the worst moment of `run()`, `given` tensors included; under inference mode."""
    with torch.inference_mode(), LiveMemory(*given) as memory:
        run()
    return memory.peak
