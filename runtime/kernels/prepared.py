"""Rows that are already in the eight bits in which the linear that reads them multiplies."""

from typing import NamedTuple

import torch
from torch import Tensor


class Prepared(NamedTuple):
    """values·scales stand for rows of `dtype`: what a kernel hands to the linears that read its result."""

    values: Tensor  # (..., K) e4m3 or int8
    scales: Tensor  # (..., 1) fp32, one for each row
    dtype: torch.dtype  # of the rows, and of their product with a weight
