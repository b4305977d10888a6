"""Run every way to multiply 8-bit weights, and every attention, on a device; say which are right, in JSON.

    python -m entrypoint.kernel_trials cuda:0 [TRIED [RIGHT]]    names of backends, with commas between them

One object a line, as soon as it is known, so that what a crash ends is known too:

    {"ways": {"fp8": {"rowwise": true, ...}, "int8": {...}}}       only if nothing was tried before
    {"backends": {"sage2": 8, ...}}                                all that there are, and the bits of each
    {"trying": "sage2"}
    {"attention": {"name": "sage2", "ok": true, "distance": 0.031, "reason": ""}}
    {"trying": "times"}
    {"times": {"sage2": 1.9, ...}, "tokens": 30720}                 ms, of the backends that are right
    {"done": true}
    {"error": "..."}                                               instead: nothing runs there at all

`t2v doctor` and `t2v tune` start it as a process of its own, because a kernel that the card does not have may
end it, or leave CUDA unusable in it: then it ends itself, and is started again without that backend.
"""

import json
import math
import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from runtime.layers.backends import Proof

WAYS = {"fp8": ("rowwise", "unscaled", "fused", "dequantized"), "int8": ("fused", "integer", "dequantized")}
"""As `runtime.linear.fp8` and `.int8` name them, best first."""

TOLERANCE = 0.06
"""Relative RMS difference from the formula: activations in 8 bits differ from those in 16 by about 0.03."""

HEADS, HEAD_DIM = 40, 128
"""Of the 14B model."""


def trials(device: str) -> dict[str, dict[str, bool]]:
    """For each format: way -> whether its product is right on `device`; raises if nothing runs there."""
    import torch

    from runtime.kernels.launch import fused
    from runtime.linear import LINEAR_CLASSES, forced_way
    from runtime.linear.quantize import FORMATS, dequantize, quantize_weight

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 256, generator=generator).bfloat16()
    matrix = torch.randn(128, 256, generator=generator) / 16
    bias = torch.randn(128, generator=generator)
    torch.ones(8, device=device).add_(1).cpu()  # whether anything runs at all
    found: dict[str, dict[str, bool]] = {}
    for form, ways in WAYS.items():
        weight, scale = quantize_weight(matrix, FORMATS[form])
        linear = LINEAR_CLASSES[form](256, 128, True, device)
        linear.weight, linear.weight_scale = weight.to(device), scale.to(device)
        linear.bias = bias.to(device)
        expected = x.float() @ dequantize(weight, scale).t() + bias
        found[form] = {}
        for way in ways:
            if way == "fused" and not fused(linear.weight, FORMATS[form].dtype):
                found[form][way] = False  # its twin in plain torch would answer
                continue
            try:
                with forced_way(way):
                    y = linear(x.to(device)).float().cpu()
                distance = (y - expected).norm() / expected.norm()
                found[form][way] = bool(distance < TOLERANCE)  # NaN is not
            except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
                found[form][way] = False  # how torch says that it lacks the kernel
    return found


def attention_trials(
    device: str, tried: Collection[str] = (), right: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """The lines about attention, as the head of this file describes them.

    Backends that were `tried` are left out, of which the `right` ones are timed with the others. Ends after
    a backend that left the device unusable.
    """
    import torch

    from runtime.layers import backends

    place = torch.device(device)
    usable = list(right)
    yield {"backends": {name: backend.bits for name, backend in backends.BACKENDS.items()}}
    for name in backends.BACKENDS:
        if name in tried:
            continue
        yield {"trying": name}
        proof = backends.prove(name, place)
        yield {"attention": _as_dict(proof)}
        if not proof.ok and not _alive(place):
            return
        if proof.ok:
            usable.append(name)
    if place.type == "cuda":
        yield {"trying": "times"}
        timed = [name for name in usable if name != backends.LAST_RESORT]
        yield {"times": _times(timed, place), "tokens": backends.TIMED_TOKENS}
    yield {"done": True}


def _as_dict(proof: "Proof") -> dict[str, Any]:
    distance = proof.distance if math.isfinite(proof.distance) else None
    return {
        "name": proof.name,
        "ok": proof.ok,
        "distance": distance,
        "reason": " ".join(proof.reason.split()),
    }


def _times(names: list[str], device: "torch.device") -> dict[str, float]:
    """Milliseconds of some heads at TIMED_TOKENS tokens, interleaved; {} where there is no room for that."""
    from functools import partial

    import torch

    from runtime.kernels.tune import in_a_row, time_candidates
    from runtime.layers import backends

    tokens = backends.TIMED_TOKENS
    try:
        heads = backends.timed_heads(tokens, HEADS, device)
        given = backends.inputs(tokens, tokens, heads, HEAD_DIM, torch.bfloat16, device)
        runs = {name: partial(backends.named(name, device), *given, HEAD_DIM**-0.5) for name in names}
        found = time_candidates(runs, repeats=3, clock=in_a_row)
    except RuntimeError:  # out of memory: somebody else has it
        return {}
    return {one.name: round(one.milliseconds, 4) for one in found if one.milliseconds is not None}


def _alive(device: "torch.device") -> bool:
    """Whether anything still runs: a fault of a kernel stays with its process."""
    import torch

    try:
        return bool((torch.ones(8, device=device) + 1).sum().item() == 16)
    except RuntimeError:
        return False


def main() -> None:
    """The command line."""
    device, *more = sys.argv[1:]
    tried, right = ([name for name in text.split(",") if name] for text in [*more, "", ""][:2])
    try:
        if not tried:
            _say({"ways": trials(device)})
        for line in attention_trials(device, tried, right):
            _say(line)
    except Exception as error:  # noqa: BLE001 - the one that asked wants a reason, whatever it is
        lines = str(error).strip().splitlines()
        _say({"error": f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")})


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
