"""An attention backend as the blocks of a model take it."""

import torch
from torch import Tensor

from runtime.layers.backends import BACKENDS, named
from runtime.layers.compact_qk import MixCompact, QKScales


class Attending:
    """A backend as a model's blocks take it (an `Attend`): it may take the memory of its inputs.

    compact: what `compact_qk.compact_of` finds.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        """Raises RequestError for a backend that is missing on this device."""
        run, backend = named(name, device), BACKENDS[name]
        self._run, self._run_compact = backend.over or run, backend.compact
        self.compact: MixCompact | None = None if backend.compact is None else self._of_compact

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `attend`."""
        return self._run(q, k, v, q.shape[-1] ** -0.5)

    def _of_compact(self, q8: Tensor, k8: Tensor, v: Tensor, scales: QKScales) -> Tensor:
        assert self._run_compact is not None
        return self._run_compact(q8, k8, v, scales, q8.shape[-1] ** -0.5, v)
