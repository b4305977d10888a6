"""The transformer of a checkpoint as the engine loads it, all blocks resident, on the CPU in fp32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from runtime import loading
from runtime.memory.plan import Blocks
from runtime.memory.ring import Ring
from runtime.schema import ModelManifest
from runtime.transformer import Transformer


@contextmanager
def transformer(
    files: loading.ModelFiles, manifest: ModelManifest, on_bytes: Callable[[int], None] | None = None
) -> Iterator[Transformer]:
    """For as long as the block lasts: its matrices lie in the stream's buffers."""
    every = tuple(range(files.transformer.sizes()["num_layers"]))
    ring = Ring(1 << 20, 3, pinned=False)
    try:
        model, stream = loading.stream_transformer(
            files.transformer, manifest, "cpu", torch.float32, Blocks(every, (), 0), ring, on_bytes
        )
        loading.load_entry(model, files.transformer, "cpu", torch.float32)
        stream.expect(1)
        yield model
        stream.close()
    finally:
        ring.close()
