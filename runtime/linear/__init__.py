"""Eight-bit Linear layers, one class per format, swapped in for `nn.Linear` before the weights are loaded."""

from collections.abc import Mapping

from torch import nn

from runtime.errors import WeightsError
from runtime.linear.fp8 import Fp8Linear
from runtime.linear.int8 import Int8Linear
from runtime.linear.module import QuantizedLinear, forced_way

__all__ = ["LINEAR_CLASSES", "Fp8Linear", "Int8Linear", "QuantizedLinear", "forced_way", "swap_linears"]

LINEAR_CLASSES: dict[str, type[QuantizedLinear]] = {"fp8": Fp8Linear, "int8": Int8Linear}


def swap_linears(model: nn.Module, formats: Mapping[str, str]) -> None:
    """Replace the named `nn.Linear` modules of `model` (on meta) by the class of their format.

    formats: module name -> "fp8" or "int8", as `Checkpoint.quantized_linears()` says. Raises WeightsError,
    and changes nothing, when a name is no nn.Linear of this model or a format is not known.
    """
    modules = dict(model.named_modules())
    strangers = [name for name in formats if not isinstance(modules.get(name), nn.Linear)]
    if strangers:
        what = type(modules[strangers[0]]).__name__ if strangers[0] in modules else "not a layer of it"
        more = f" (and {len(strangers) - 1} more)" if strangers[1:] else ""
        raise WeightsError(
            f"The weights hold {strangers[0]}{more} quantized, which is {what} in this model; "
            "expected a Linear. Choose weights of this model."
        )
    unknown = sorted(set(formats.values()) - set(LINEAR_CLASSES))
    if unknown:
        raise WeightsError(
            f"Format {unknown[0]} is not supported; expected one of {', '.join(LINEAR_CLASSES)}."
        )
    for name, form in formats.items():
        linear = modules[name]
        assert isinstance(linear, nn.Linear)
        parent, _, leaf = name.rpartition(".")
        quantized = LINEAR_CLASSES[form](
            linear.in_features, linear.out_features, linear.bias is not None, linear.weight.device
        )
        setattr(modules[parent], leaf, quantized)
