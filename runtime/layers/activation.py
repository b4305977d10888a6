"""The feed-forward's activation, in the form that the linear after it takes."""

import torch.nn.functional as F
from torch import Tensor, nn

from runtime.kernels.gelu_quantize import gelu_quantize
from runtime.kernels.prepared import Prepared
from runtime.layers.norm import Rows, by_kernel, taken_by


def gelu_for(h: Tensor, reader: nn.Module) -> Rows:
    """The tanh-approximated GELU of h (B, L, F), in h's dtype or as `reader` takes it."""
    dtype = taken_by(reader, h) if by_kernel(h) else None
    if dtype is None:
        return F.gelu(h, approximate="tanh")
    return Prepared(*gelu_quantize(h, dtype), h.dtype)
