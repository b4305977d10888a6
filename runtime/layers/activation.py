"""The feed-forward's activation, in the form that the linear after it takes."""

import torch.nn.functional as F
from torch import Tensor, nn

from runtime.kernels.gelu_quantize import gelu_quantize
from runtime.kernels.prepared import Prepared
from runtime.layers.norm import Rows, by_kernel, taken_by


def gelu_for(h: Tensor, reader: nn.Module, factor: Tensor | None = None) -> Rows:
    """The tanh-approximated GELU of h, times `factor` if there is one: (B, L, F) each.

    In h's dtype or as `reader` takes it.
    """
    dtype = taken_by(h, reader) if by_kernel(h) else None
    if dtype is not None:
        return Prepared(*gelu_quantize(h, dtype, factor), h.dtype)
    h = F.gelu(h, approximate="tanh")  # under one name, so that what came in is freed
    return h if factor is None else h * factor
