"""Loading a model whose blocks stream: what `checkpoint.load_weights` does, with a stream in their place.

    stream = load_streamed(model, checkpoint, placement=plan.blocks, ring=ring, dtype=..., device=...)
    load_part(model, ("text_embedding",), checkpoint, dtype=..., device=...)   what was left for later

The small tensors and what is no block are read at once. The blocks' matrices are not: the stream knows where
in the files they are, and brings each when it is its turn (`stream.py`).
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from runtime.checkpoint import Checkpoint, TensorInfo, load_weights
from runtime.checkpoint.load import check_tensors
from runtime.memory.ring import Ring
from runtime.memory.rows import StoredEmbedding
from runtime.memory.source import WeightFiles
from runtime.memory.stored import PieceReader, stored_block
from runtime.memory.stream import READERS, BlockStream, OnBytes, Placement, take_out


def load_streamed(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    blocks: str = "blocks",
    placement: Placement,
    ring: Ring,
    dtype: torch.dtype,
    device: torch.device | str,
    fp32_parameters: tuple[str, ...] = (),
    on_bytes: OnBytes | None = None,
    skip: tuple[str, ...] = ("token_embedding.weight",),
    later: tuple[str, ...] = (),
    preload: bool = True,
    readers: int = READERS,
    files: WeightFiles | None = None,
) -> BlockStream:
    """What `load_weights` does, for a model whose `blocks` stream; returns the stream that is in their place.

    model: on meta, its quantized linears swapped in. Dtypes and strictness are those of `load_weights`; all
    tensors of the checkpoint are accounted for. skip: tables whose rows are read from the file
    (`StoredEmbedding`), as far as the model has them. later: children of the model that stay on meta until
    `load_part`. preload: load the resident blocks now rather than during the first pass. Memory beside the
    model: one tensor, the ring, and the cached blocks as they come.
    """
    check_tensors(dict(model.state_dict()), checkpoint)
    modules = cast(nn.ModuleList, getattr(model, blocks))
    stored = [
        stored_block(checkpoint, f"{blocks}.{i}.", block, dtype, fp32_parameters)
        for i, block in enumerate(modules)
    ]
    files = files or WeightFiles()
    take_out(list(modules))
    for name in skip:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and name in checkpoint.tensors:
            parent, _, child = owner.rpartition(".")
            setattr(model.get_submodule(parent), child, StoredEmbedding(checkpoint, name, files, dtype))
    now = tuple(name for name, _ in model.named_children() if name not in later)
    load_part(
        model, now, checkpoint, dtype=dtype, device=device, fp32_parameters=fp32_parameters, on_bytes=on_bytes
    )
    reader = PieceReader(files, checkpoint, stored)
    stream = BlockStream(list(modules), stored, reader, placement, ring, device, readers)
    setattr(model, blocks, stream)
    model.eval().requires_grad_(False)
    if preload and placement.resident:
        try:
            stream.load_residents(on_bytes)
        except BaseException:
            stream.close()
            raise
    return stream


def load_part(
    model: nn.Module,
    children: tuple[str, ...],
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    fp32_parameters: tuple[str, ...] = (),
    on_bytes: OnBytes | None = None,
) -> None:
    """`load_weights` for some children of a model alone, by name; `child.to("meta")` frees them again.

    The names and shapes must have been checked, as `load_streamed` does for the whole model.
    """
    part = nn.ModuleDict({name: model.get_submodule(name) for name in children})
    some = cast(Checkpoint, _Part(checkpoint, part.state_dict()))
    load_weights(part, some, dtype=dtype, device=device, fp32_parameters=fp32_parameters, on_bytes=on_bytes)


class _Part:
    """A checkpoint in which only some tensors are: what `load_weights` asks of one."""

    def __init__(self, whole: Checkpoint, names: Mapping[str, Tensor]) -> None:
        self.path = whole.path
        self.tensors: dict[str, TensorInfo] = {n: info for n, info in whole.tensors.items() if n in names}
        self.shape, self.read_to, self.quantized_linears = whole.shape, whole.read_to, whole.quantized_linears
