"""Run every way of multiplying 8-bit weights on a device and print which are right, as one JSON object.

    python -m entrypoint.kernel_trials cuda:0        {"ways": {"fp8": {"rowwise": true, ...}, "int8": {...}}}

`t2v doctor` starts it as a process of its own, because a kernel that the card does not have may end it.
"""

import json
import sys

WAYS = {"fp8": ("rowwise", "unscaled", "dequantized"), "int8": ("integer", "dequantized")}
"""As `runtime.linear.fp8` and `.int8` name them, best first."""

TOLERANCE = 0.06
"""Relative RMS difference from the formula: activations in 8 bits differ from those in 16 by about 0.03."""


def trials(device: str) -> dict[str, dict[str, bool]]:
    """For each format: way -> whether its product is right on `device`; raises if nothing runs there."""
    import torch

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
            try:
                with forced_way(way):
                    y = linear(x.to(device)).float().cpu()
                distance = (y - expected).norm() / expected.norm()
                found[form][way] = bool(distance < TOLERANCE)  # NaN is not
            except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
                found[form][way] = False  # how torch says that it lacks the kernel
    return found


def main() -> None:
    """The command line."""
    try:
        answer: dict[str, object] = {"ways": trials(sys.argv[1])}
    except Exception as error:  # noqa: BLE001 - the one that asked wants a reason, whatever it is
        lines = str(error).strip().splitlines()
        answer = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
