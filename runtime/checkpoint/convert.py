"""From canonical tensors to the published layouts, in bf16, fp8 or int8; tensor by tensor in memory.

What is quantized, and how (LightX2V's converter, with fp32 arithmetic): the matrices of the blocks, per
output channel, `scale = max(absmax, 1e-5) / qmax`, rounded to nearest even; everything else is cast to one
floating dtype. `per_tensor` writes ComfyUI's fp8 instead: one `scale_weight` per matrix and the marker
`scaled_fp8`.

Layouts: "blocks" is a directory of block_N.safetensors, non_block.safetensors and their index; "single" is
one .safetensors file; "pickle" is one .pth file (text encoder, VAE) and needs memory for all of its tensors.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from runtime.checkpoint.checkpoint import SCALE, Checkpoint
from runtime.checkpoint.families import LINEARS
from runtime.checkpoint.layouts import NON_BLOCK_FILE
from runtime.checkpoint.names import Kind
from runtime.checkpoint.write import write_json, write_pickle, write_safetensors
from runtime.linear.quantize import FORMATS, FP8, dequantize, quantize_weight, to_format

Layout = Literal["blocks", "single", "pickle"]
INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"
_FLOATING = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How to store one kind of model.

    quantization: of the block matrices. scale_dtype: of their scales in the file. other_dtype: of all other
    tensors, and of the matrices too when quantization is a floating format's name.
    """

    kind: Kind
    quantization: Literal["fp32", "bf16", "fp16", "fp8", "int8"]
    scale_dtype: torch.dtype = torch.float32
    other_dtype: torch.dtype = torch.bfloat16
    per_tensor: bool = False

    def __post_init__(self) -> None:
        if self.per_tensor and self.quantization != "fp8":
            raise ValueError(f"per_tensor is ComfyUI's fp8 layout; got quantization {self.quantization}")

    def store(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors of the file that stand for this one: itself in a dtype, or a weight and its scale."""
        module = name.removesuffix(".weight")
        if not LINEARS[self.kind].fullmatch(module) or not name.endswith(".weight"):
            return {name: tensor.to(self.other_dtype)}
        if self.quantization in _FLOATING:
            return {name: tensor.to(_FLOATING[self.quantization])}
        if self.per_tensor:
            q, scale = _quantize_whole(tensor, self.scale_dtype)
            return {name: q, f"{module}.scale_weight": scale}
        q, scale = quantize_weight(tensor, FORMATS[self.quantization], self.scale_dtype)
        return {name: q, module + SCALE: scale}

    def marker(self) -> dict[str, Tensor]:
        """ComfyUI's `scaled_fp8`, where the layout has it."""
        return {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} if self.per_tensor else {}


def quantize_state_dict(tensors: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """Canonical floating tensors -> the tensors of a file of this recipe."""
    stored = {out: t for name, tensor in tensors.items() for out, t in recipe.store(name, tensor).items()}
    return stored | recipe.marker()


def write_layout(target: Path, tensors: Mapping[str, Tensor], recipe: Recipe, layout: Layout) -> list[Path]:
    """Write canonical floating tensors in a layout and return the files.

    target: a directory for "blocks", a file for the others. Raises OutputError when it cannot be written.
    """
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    return _write(target, shapes, tensors.__getitem__, recipe, layout)


def convert_checkpoint(
    checkpoint: Checkpoint,
    target: Path,
    recipe: Recipe,
    layout: Layout,
    on_bytes: Callable[[int], None] | None = None,
) -> list[Path]:
    """Rewrite an opened checkpoint, dequantizing what is quantized. Memory: one tensor ("pickle": all).

    on_bytes(n) is called with the bytes of each tensor that was read.
    """
    quantized = checkpoint.quantized_linears()

    def read(name: str) -> Tensor:
        tensor = checkpoint.read(name)
        module = name.removesuffix(".weight")
        if module in quantized:
            tensor = dequantize(tensor, checkpoint.read(module + SCALE))
        if on_bytes is not None:
            on_bytes(checkpoint.tensors[name].nbytes)
        return tensor

    names = [name for name in checkpoint.tensors if not name.endswith(SCALE)]
    shapes = {name: torch.empty(checkpoint.shape(name), device="meta") for name in names}
    return _write(target, shapes, read, recipe, layout)


def write_config(directory: Path, sizes: Mapping[str, Any]) -> Path:
    """config.json of a transformer as the published directories carry it, from the sizes of its config."""
    path = directory / "config.json"
    said = {name: sizes[name] for name in sizes if name != "patch_size"}
    write_json(path, {"_class_name": "WanModel", "model_type": "t2v", **said})
    return path


def _quantize_whole(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ComfyUI's fp8: one scale () for the matrix."""
    absmax = weight.abs().amax().float()
    scale = (torch.where(absmax == 0, torch.ones_like(absmax), absmax) / FP8.qmax).to(scale_dtype)
    return to_format(weight, scale.float(), FP8), scale


def _write(
    target: Path, shapes: Mapping[str, Tensor], read: Callable[[str], Tensor], recipe: Recipe, layout: Layout
) -> list[Path]:
    if layout == "pickle":
        stored = {out: t for name in shapes for out, t in recipe.store(name, read(name)).items()}
        write_pickle(target, stored | recipe.marker())
        return [target]
    if layout == "single":
        _write_file(target, shapes, read, recipe, recipe.marker())
        return [target]
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    total = 0
    for file_name, names in _by_block(shapes).items():
        group = {name: shapes[name] for name in names}
        extra = recipe.marker() if file_name == NON_BLOCK_FILE else {}
        total += _write_file(target / file_name, group, read, recipe, extra)
        weight_map |= dict.fromkeys([*_plan(group, recipe), *extra], file_name)
        files.append(target / file_name)
    write_json(target / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return [*files, target / INDEX_FILE]


def _by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """File name of the block layout -> its tensors, blocks in order, the rest last."""
    groups: dict[str, list[str]] = {}
    rest: list[str] = []
    for name in names:
        block = re.match(r"blocks\.(\d+)\.", name)
        (groups.setdefault(f"block_{block.group(1)}.safetensors", []) if block else rest).append(name)
    return groups | {NON_BLOCK_FILE: rest}


def _plan(shapes: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """Names, dtypes and shapes of a file, found by running the recipe on the meta device."""
    return {out: t for name, tensor in shapes.items() for out, t in recipe.store(name, tensor).items()}


def _write_file(
    path: Path,
    shapes: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    recipe: Recipe,
    extra: Mapping[str, Tensor],
) -> int:
    def produce() -> Iterator[tuple[str, Tensor]]:
        for name in shapes:
            yield from recipe.store(name, read(name)).items()
        yield from extra.items()

    return write_safetensors(path, {**_plan(shapes, recipe), **extra}, produce())
