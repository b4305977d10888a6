"""Which way a forward computes while it is measured, and the reference; afterwards the model is as before."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from runtime.layers.attending import Attending
from runtime.transformer import Block, Transformer
from runtime.ways import Ways


def plain(device: torch.device) -> Ways:
    """The reference: torch's attention, and plain torch around it."""
    return Ways(device, fused=False)


@contextmanager
def following(model: Transformer, ways: Ways, *, guarded: bool = True) -> Iterator[None]:
    """In the block, one forward of `model` computes this way; `guarded`: the guard samples it as in a run."""
    with restored(model), ways.computing():
        if not guarded:
            model.use_attention(Attending(ways.name, ways.device), Attending(ways.on_text, ways.device))
            yield
            return
        ways.use_in(model)
        ways.begin(0)
        try:
            yield
        finally:
            if ways.kernel_samples is not None:  # its hooks would look at the next forward too
                ways.kernel_samples.close()
                ways.kernel_samples = None


@contextmanager
def restored(model: Transformer) -> Iterator[list[Block]]:
    """The blocks of `model`, whose attention is afterwards what it was."""
    blocks = [block for block in model.blocks.children() if isinstance(block, Block)]
    before = [(block.self_attn.mix, block.cross_attn.mix) for block in blocks]
    try:
        yield blocks
    finally:
        for block, (of_tokens, on_text) in zip(blocks, before, strict=True):
            block.self_attn.mix, block.cross_attn.mix = of_tokens, on_text
