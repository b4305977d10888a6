"""A model that rests in host memory visits the GPU for the phase that needs it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def visiting(model: nn.Module, device: str) -> Iterator[None]:
    """Move `model` to `device` for the block and back home afterwards, giving the memory back.

    Does nothing for a model whose home is `device`.
    """
    home = next(model.parameters()).device
    if home == torch.device(device) or (home.type == "cuda" and device == "cuda"):
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
        give_back(device)


def give_back(device: str) -> None:
    """Hand memory that torch keeps for later back to the driver."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
