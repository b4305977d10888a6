"""One opened model: canonical names, shapes and formats from the headers alone, tensors on demand.

Quantized linears, after names are made canonical (LightX2V's form; W = weight * weight_scale):
  <lin>.weight        e4m3 or int8, [out, in]
  <lin>.weight_scale  [out, 1], fp32, bf16 or fp16 in the file; read as fp32, so exactly as written
ComfyUI's fp8 files have one `scale_weight` number per tensor instead and a `scaled_fp8` marker: the number
becomes [out, 1] by expansion, the marker is dropped. A static activation scale (`scale_input`, `input_scale`)
is dropped too: it only says how another engine would quantize its activations; W does not depend on it and
ours are scaled per token.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from runtime.checkpoint.families import LINEARS, check_family, merge_config, read_config, solve_sizes
from runtime.checkpoint.files import TensorInfo, read_pieces, read_tensor
from runtime.checkpoint.layouts import collect
from runtime.checkpoint.names import Kind, to_canonical
from runtime.errors import WeightsError

Quantization = Literal["fp32", "bf16", "fp16", "fp8", "int8"]
QuantizedFormat = Literal["fp8", "int8"]

QUANTIZED: dict[torch.dtype, QuantizedFormat] = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}
FLOATING: dict[torch.dtype, Quantization] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE = ".weight_scale"

_SCALE_ALIAS = ".scale_weight"
_ACTIVATION_SCALES = (".scale_input", ".input_scale")
_MARKER = "scaled_fp8"
_PIECE = 64 << 20  # bytes of a large tensor on their way to a GPU
_UNSUPPORTED = [  # (a name that only this format has, its name)
    (re.compile(r".*\.(weight_global_scale|input_global_scale|input_absmax|weight_scale_2)$"), "NVFP4"),
    (re.compile(r".*\.weight_scale_inv$"), "FP8 with 128x128 block scales"),
    (re.compile(r".*\.comfy_quant$"), "ComfyUI's comfy_quant format"),
    (re.compile(r".*\.(absmax|quant_map|quant_state\..*)$"), "bitsandbytes"),
    (re.compile(r".*\.(qweight|qzeros|svdq_.*)$"), "a 4-bit integer format (GPTQ, AWQ or SVDQuant)"),
]


class Checkpoint:
    """The tensors of one model under canonical Wan names. Opening reads headers; `read` one tensor.

    tensors: name -> TensorInfo (dtype, shape, nbytes, offset as stored). Its shape is that of the file;
    `shape(name)` is that of what `read` returns (they differ for per-tensor and [out] scales).
    """

    def __init__(
        self,
        kind: Kind,
        path: Path,
        stored: Mapping[str, TensorInfo],
        mapped: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.kind: Kind = kind
        self.path = path
        self.files: tuple[Path, ...] = tuple(sorted({info.file for info in stored.values()}))
        # what cannot be read by offset; the rest of the mapping is let go
        self._mapped = {name: t for name, t in (mapped or {}).items() if stored[name].offset is None}
        check_family(kind, path, stored)
        self.tensors = _canonical(kind, path, stored)
        self._quantized = _find_quantized(self.tensors)
        self.quantization: Quantization = _overall_format(kind, path, self.tensors, self._quantized)
        self._sizes: dict[str, Any] | None = None

    def quantized_linears(self) -> dict[str, QuantizedFormat]:
        """module name -> format, of every matrix that is stored quantized."""
        return dict(self._quantized)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def sizes(self) -> dict[str, Any]:
        """Model sizes from the tensor shapes, plus what only config.json tells (text_len, eps, max_distance).

        transformer: dim ffn_dim num_layers in_dim out_dim text_dim freq_dim num_heads; text_encoder:
        vocab_size dim dim_attn dim_ffn num_heads num_layers num_buckets; vae: base_dim z_dim. Raises
        WeightsError on a contradiction.
        """
        if self._sizes is None:
            solved = solve_sizes(self.kind, self.path, self.tensors)
            self._sizes = merge_config(self.kind, self.path, solved, read_config(self.kind, self.path))
        return dict(self._sizes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of `read(name)`."""
        if name.endswith(SCALE):
            return (self.tensors[name.removesuffix(SCALE) + ".weight"].shape[0], 1)
        return self.tensors[name].shape

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, contiguous, in the file's dtype; scales as fp32 [out, 1].

        Memory: this tensor only. Raises WeightsError when the file is short or a scale is not a finite number
        >= 0.
        """
        info = self.tensors[name]
        mapped = self._mapped.get(info.name)
        tensor = read_tensor(info) if mapped is None else mapped.contiguous().clone()
        if not name.endswith(SCALE):
            return tensor
        scale = tensor.float().reshape(-1, 1)
        if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise WeightsError(
                f"{info.file}: scale {info.name} is negative or not finite somewhere; download the file again"
            )
        return scale.expand(self.shape(name)).contiguous()

    def read_to(self, name: str, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """`read(name)` as `dtype` on `device`; CPU memory beside the result: 64 MiB where it is a GPU's."""
        info = self.tensors[name]
        away = torch.device(device).type != "cpu"
        if not away or info.nbytes <= _PIECE or name.endswith(SCALE) or info.name in self._mapped:
            return self.read(name).to(dtype).to(device)
        whole = torch.empty(info.shape, dtype=dtype, device=device)
        flat = whole.view(-1)
        for first, piece in read_pieces(info, _PIECE):
            flat[first : first + len(piece)] = piece.to(device)
        return whole


def open_checkpoint(path: Path, kind: Kind) -> Checkpoint:
    """Open a file (.safetensors, .pth, .pt) or a directory (blocks, shards, plain files) as `kind`.

    Only headers are read. Raises WeightsError, one sentence that names the file and tensor, for missing,
    truncated or corrupt files, two alternatives in a directory, another model's weights, and unsupported
    formats.
    """
    stored, mapped = collect(path, kind)
    return Checkpoint(kind, path, stored, mapped)


def expect_quantization(checkpoint: Checkpoint, expected: Literal["bf16", "fp8", "int8"]) -> None:
    """WeightsError unless the headers say `expected`; the bf16 slot also takes fp32 and fp16 files."""
    found = checkpoint.quantization
    allowed = ("bf16", "fp16", "fp32") if expected == "bf16" else (expected,)
    if found not in allowed:
        raise WeightsError(
            f"{checkpoint.path} holds {found} block matrices (from its header), expected {expected}; "
            f"choose the {expected} file or ask for {'bf16' if found in FLOATING.values() else found}"
        )


def _canonical(kind: Kind, path: Path, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Canonical name -> info, whatever the publisher's names; markers and unused tensors are dropped."""
    tensors: dict[str, TensorInfo] = {}
    for name, canonical in to_canonical(kind, stored).items():
        info = stored[name]
        if canonical is None or canonical == _MARKER:
            continue
        for pattern, label in _UNSUPPORTED:
            if pattern.match(canonical):
                raise WeightsError(
                    f"{info.file} is quantized as {label} (tensor {name}), which is not supported; "
                    "use an fp8 or int8 file"
                )
        if canonical.endswith(_ACTIVATION_SCALES):
            if info.nbytes != info.dtype.itemsize:
                raise WeightsError(
                    f"{info.file}: {name} scales activations per channel (shape {info.shape}), "
                    "which is not supported; expected one number or none"
                )
            continue
        if canonical.endswith(_SCALE_ALIAS):
            canonical = canonical.removesuffix(_SCALE_ALIAS) + SCALE
        if canonical in tensors:
            other = tensors[canonical]
            raise WeightsError(
                f"{path} holds {canonical} twice: {other.name} in {other.file} and {name} in {info.file}"
            )
        tensors[canonical] = info
    return tensors


def _find_quantized(tensors: Mapping[str, TensorInfo]) -> dict[str, QuantizedFormat]:
    """The quantized linears, each proven to be a matrix with a usable scale; no scale without its matrix."""
    quantized: dict[str, QuantizedFormat] = {}
    for name, info in tensors.items():
        if name.endswith(SCALE):
            weight = tensors.get(name.removesuffix(SCALE) + ".weight")
            if weight is None or weight.dtype not in QUANTIZED:
                what = "no weight" if weight is None else f"a weight of dtype {_short(weight.dtype)}"
                raise WeightsError(
                    f"{info.file}: scale {info.name} belongs to {what}; expected an fp8 (e4m3) or int8 weight"
                )
        elif info.dtype in QUANTIZED:
            _check_scale(info, tensors.get(name.removesuffix(".weight") + SCALE))
            quantized[name.removesuffix(".weight")] = QUANTIZED[info.dtype]
        elif info.dtype not in FLOATING:
            hint = (
                ": packed 4-bit or another format that is not supported" if info.dtype == torch.uint8 else ""
            )
            raise WeightsError(
                f"{info.file}: tensor {info.name} has dtype {_short(info.dtype)}{hint}; "
                "expected fp32, bf16, fp16, e4m3 or int8"
            )
    return quantized


def _check_scale(weight: TensorInfo, scale: TensorInfo | None) -> None:
    form = QUANTIZED[weight.dtype]
    if len(weight.shape) != 2:
        raise WeightsError(
            f"{weight.file}: tensor {weight.name} of shape {weight.shape} is {form}; only matrices may be"
        )
    if scale is None:
        raise WeightsError(
            f"{weight.file}: {weight.name} is {form} without a scale (no weight_scale or scale_weight); "
            "expected a scaled checkpoint: raw 8-bit casts are not supported"
        )
    if scale.dtype not in SCALE_DTYPES:
        raise WeightsError(
            f"{scale.file}: scale {scale.name} has dtype {_short(scale.dtype)}; expected fp32, bf16 or fp16"
        )
    rows = weight.shape[0]
    if scale.shape not in ((rows, 1), (rows,), (), (1,), (1, 1)):
        hint = (
            " (128x128 block scales are not supported)"
            if len(scale.shape) == 2 and scale.shape[1] > 1
            else ""
        )
        raise WeightsError(
            f"{scale.file}: scale {scale.name} has shape {scale.shape}, "
            f"expected ({rows}, 1) or one number{hint}"
        )


def _overall_format(
    kind: Kind, path: Path, tensors: Mapping[str, TensorInfo], quantized: Mapping[str, QuantizedFormat]
) -> Quantization:
    """One word for the whole model, from the matrices that converters quantize (all tensors, for a VAE)."""
    formats = sorted(set(quantized.values()))
    if len(formats) > 1:
        raise WeightsError(f"{path} mixes {' and '.join(formats)} matrices; expected one format")
    if formats:
        return formats[0]
    matrices = [
        info.dtype for name, info in tensors.items() if LINEARS[kind].fullmatch(name.removesuffix(".weight"))
    ]
    dtypes = set(matrices) or {info.dtype for info in tensors.values()}
    for dtype, word in FLOATING.items():  # the widest, when parts differ
        if dtype in dtypes:
            return word
    raise WeightsError(f"{path} holds no floating-point tensor; expected the weights of {kind}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
