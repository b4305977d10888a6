"""Strict loading: every tensor that the model names and no other, of the right shape, one in flight."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from runtime.checkpoint.checkpoint import FLOATING, QUANTIZED, SCALE, Checkpoint
from runtime.errors import WeightsError

_NAMED = 5  # tensors of each fault that the message lists


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    fp32_parameters: tuple[str, ...] = (),
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Fill `model`, built on the meta device and with its quantized linears swapped in, from `checkpoint`.

    Floating tensors become `dtype`, or fp32 where the name contains one of `fp32_parameters`. Quantized
    weights stay as they are, scales are fp32, and the bias of a quantized linear keeps the file's precision
    (it is added in fp32). on_bytes(n) is called after each tensor with its bytes in the file. Memory beside
    the model: one tensor. Afterwards parameters need no gradient. Raises WeightsError that lists missing,
    unknown and misshapen tensors.
    """
    expected: dict[str, Tensor] = dict(model.state_dict())
    check_tensors(expected, checkpoint)
    quantized = checkpoint.quantized_linears()
    state: dict[str, Tensor] = {}
    for name in expected:
        module, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias") and module in quantized:
            target = checkpoint.tensors[name].dtype
        elif name.endswith(SCALE) or any(fragment in name for fragment in fp32_parameters):
            target = torch.float32
        else:
            target = dtype
        state[name] = checkpoint.read_to(name, device, target)
        if on_bytes is not None:
            on_bytes(checkpoint.tensors[name].nbytes)
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False)
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(
            f"{left[0]} is still on the meta device: it is in no state dict, the model must create it"
        )


def check_tensors(expected: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    """Compare names, shapes and quantized dtypes with the headers: one WeightsError for all faults."""
    given = checkpoint.tensors
    faults = {
        "missing": [name for name in expected if name not in given],
        "unknown": [f"{name} in {given[name].file.name}" for name in given if name not in expected],
        "misshapen": [],
        "of another format": [],
    }
    for name in expected.keys() & given.keys():
        shape, wanted = checkpoint.shape(name), tuple(expected[name].shape)
        if shape != wanted:
            faults["misshapen"].append(f"{name} is {shape} in {given[name].file.name}, expected {wanted}")
        elif not _same_format(given[name].dtype, expected[name].dtype):
            is_of = QUANTIZED.get(given[name].dtype) or FLOATING.get(given[name].dtype)
            is_for = QUANTIZED.get(expected[name].dtype, "floating point")
            faults["of another format"].append(
                f"{name} is {is_of} in {given[name].file.name}, the model's layer is {is_for}"
            )
    found = [f"{len(names)} {what} ({_list(sorted(names))})" for what, names in faults.items() if names]
    if found:
        raise WeightsError(
            f"{checkpoint.path} does not fit the model: {'; '.join(found)}. Choose the weights of this model"
        )


def _same_format(given: torch.dtype, expected: torch.dtype) -> bool:
    if given in QUANTIZED or expected in QUANTIZED:
        return given == expected
    return True  # one floating dtype may become another


def _list(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
