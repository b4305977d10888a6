"""From canonical tensors to the published layouts, in bf16, fp8 or int8; tensor by tensor in memory.

What is quantized, and how (LightX2V's converter, with fp32 arithmetic): the matrices of the blocks, per
output channel, `scale = max(absmax, 1e-5) / qmax`, rounded to nearest even; everything else is cast to one
floating dtype or left as it is. `per_tensor` writes ComfyUI's fp8 instead: one `scale_weight` per matrix and
the marker `scaled_fp8`.

Layouts: "blocks" is a directory of block_N.safetensors, non_block.safetensors and their index; "single" is
one .safetensors file; "pickle" is one .pth file (text encoder, VAE).

Here a file is made; `runtime.checkpoint.conversion` plans a whole checkpoint of them, `.making` makes it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from runtime.checkpoint.checkpoint import QUANTIZED, SCALE, Checkpoint
from runtime.checkpoint.families import LINEARS
from runtime.checkpoint.layouts import NON_BLOCK_FILE
from runtime.checkpoint.names import Kind
from runtime.checkpoint.report import SLICE_ELEMENTS, LayerError, measure, unchanged
from runtime.checkpoint.write import stream_pickle, write_json, write_safetensors
from runtime.errors import WeightsError
from runtime.kernels.row_quantize import to_levels
from runtime.linear.quantize import FORMATS, FP8, Format, dequantize, quantize_weight

Layout = Literal["blocks", "single", "pickle"]
Read = Callable[[str], tuple[Tensor, Tensor | None]]  # name -> the tensor, and its scale if it is quantized
OnTensor = Callable[[str, LayerError | None], None]  # called when a tensor is done; its error if a matrix
INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"
CONFIG_FILE = "config.json"
_FLOATING = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How to store one kind of model.

    quantization: of the block matrices. scale_dtype: of their scales in the file. other_dtype: of all other
    tensors; None keeps that of the source (bf16 for what the source has quantized).
    """

    kind: Kind
    quantization: Literal["fp32", "bf16", "fp16", "fp8", "int8"]
    scale_dtype: torch.dtype = torch.float32
    other_dtype: torch.dtype | None = torch.bfloat16
    per_tensor: bool = False

    def __post_init__(self) -> None:
        if self.per_tensor and self.quantization != "fp8":
            raise ValueError(f"per_tensor is ComfyUI's fp8 layout; got quantization {self.quantization}")

    @property
    def form(self) -> Format | None:
        """The eight-bit format of the matrices, if it is one."""
        return FORMATS.get(self.quantization)

    def is_matrix(self, name: str) -> bool:
        """Whether the tensor of this name is one that converters quantize."""
        return name.endswith(".weight") and bool(LINEARS[self.kind].fullmatch(name.removesuffix(".weight")))

    def keeps(self, name: str, tensor: Tensor, scale: Tensor | None) -> bool:
        """Whether a quantized matrix goes to the file as it is: nothing is lost by quantizing it twice."""
        if scale is None or not self.is_matrix(name) or self.per_tensor:
            return False
        same = QUANTIZED.get(tensor.dtype) == self.quantization
        return same and torch.equal(scale.to(self.scale_dtype).float(), scale.float())

    def store(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors of the file that stand for this floating one: a cast, or a weight and its scale."""
        if not self.is_matrix(name):
            return {name: tensor.to(self.other_dtype or tensor.dtype)}
        if self.form is None:
            return {name: tensor.to(_FLOATING[self.quantization])}
        module = name.removesuffix(".weight")
        if self.per_tensor:
            q, scale = _quantize_whole(tensor, self.scale_dtype)
            return {name: q, f"{module}.scale_weight": scale}
        q, scale = _quantize_in_slices(tensor, self.form, self.scale_dtype)
        return {name: q, module + SCALE: scale}

    def marker(self) -> dict[str, Tensor]:
        """ComfyUI's `scaled_fp8`, where the layout has it."""
        return {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} if self.per_tensor else {}


@dataclass(frozen=True)
class FilePlan:
    """One file to be: its source tensors, in order, and what it will hold, on meta."""

    names: tuple[str, ...]
    holds: Mapping[str, Tensor]
    extra: Mapping[str, Tensor]  # what comes from no source tensor


def quantize_state_dict(tensors: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """Canonical floating tensors -> the tensors of a file of this recipe."""
    stored = {out: t for name, tensor in tensors.items() for out, t in recipe.store(name, tensor).items()}
    return stored | recipe.marker()


def write_layout(target: Path, tensors: Mapping[str, Tensor], recipe: Recipe, layout: Layout) -> list[Path]:
    """Write canonical floating tensors in a layout and return the files.

    target: a directory for "blocks", a file for the others. Raises OutputError when it cannot be written.
    """
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    plans = plan_files(shapes, recipe, layout)
    files = {name: target / name if layout == "blocks" else target for name in plans}
    sizes = {
        name: write_file(files[name], plan, lambda name: (tensors[name], None), recipe)
        for name, plan in plans.items()
    }
    if layout != "blocks":
        return [target]
    return [*files.values(), write_index(target, plans, sum(sizes.values()))]


def shapes_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """name -> a tensor on meta as the recipe will see it, in natural order whatever the source's layout.

    Matrices that the source has quantized are bf16 here if anything is to be derived from their dtype.
    """
    names = sorted((name for name in checkpoint.tensors if not name.endswith(SCALE)), key=_natural)
    quantized = checkpoint.quantized_linears()
    dtypes = {
        name: torch.bfloat16 if name.removesuffix(".weight") in quantized else checkpoint.tensors[name].dtype
        for name in names
    }
    return {name: torch.empty(checkpoint.shape(name), dtype=dtypes[name], device="meta") for name in names}


def reader(checkpoint: Checkpoint) -> Read:
    """Reads the tensors of a checkpoint by name, with their scales where they are quantized."""
    quantized = checkpoint.quantized_linears()

    def read(name: str) -> tuple[Tensor, Tensor | None]:
        module = name.removesuffix(".weight")
        return checkpoint.read(name), checkpoint.read(module + SCALE) if module in quantized else None

    return read


def plan_files(shapes: Mapping[str, Tensor], recipe: Recipe, layout: Layout) -> dict[str, FilePlan]:
    """File name ("" for a lone file) -> its plan, found by running the recipe on the meta device."""
    plans = {}
    for file, names in (_by_block(shapes) if layout == "blocks" else {"": list(shapes)}).items():
        extra = recipe.marker() if file in ("", NON_BLOCK_FILE) else {}
        holds = {out: t for name in names for out, t in recipe.store(name, shapes[name]).items()}
        plans[file] = FilePlan(tuple(names), {**holds, **extra}, extra)
    return plans


def write_file(
    path: Path,
    plan: FilePlan,
    read: Read,
    recipe: Recipe,
    on_tensor: OnTensor | None = None,
    on_data: Callable[[memoryview], object] | None = None,
) -> int:
    """Make one file of a plan, .safetensors or a pickle by its name; returns its size. Memory: one tensor.

    Raises WeightsError for a source that holds NaN or infinity, OutputError when `path` cannot be written.
    """

    def produce() -> Iterator[tuple[str, Tensor]]:
        for name in plan.names:
            stored, layer = _convert(name, read, recipe, measured=on_tensor is not None)
            if on_tensor is not None:
                on_tensor(name, layer)
            while stored:  # so that nothing here holds what is written while the next is read
                yield stored.pop(0)
        yield from plan.extra.items()

    if path.suffix == ".safetensors":
        return write_safetensors(path, plan.holds, produce(), on_data)
    return stream_pickle(path, plan.holds, produce())


def write_index(directory: Path, plans: Mapping[str, FilePlan], total: int) -> Path:
    """The index of a block layout; total: bytes of its files."""
    weight_map = {name: file for file, plan in plans.items() for name in plan.holds}
    path = directory / INDEX_FILE
    write_json(path, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return path


def write_config(directory: Path, sizes: Mapping[str, Any]) -> Path:
    """config.json of a transformer as the published directories carry it, from the sizes of its config."""
    path = directory / CONFIG_FILE
    said = {name: sizes[name] for name in sizes if name != "patch_size"}
    write_json(path, {"_class_name": "WanModel", "model_type": "t2v", **said})
    return path


def _convert(
    name: str, read: Read, recipe: Recipe, *, measured: bool
) -> tuple[list[tuple[str, Tensor]], LayerError | None]:
    """One source tensor -> the tensors of the file, and the matrix's error if it is to be `measured`."""
    tensor, scale = read(name)
    _check_finite(name, tensor)
    module, matrix = name.removesuffix(".weight"), recipe.is_matrix(name)
    if scale is not None:
        if recipe.keeps(name, tensor, scale):
            kept = {name: tensor, module + SCALE: scale.to(recipe.scale_dtype)}
            return [*kept.items()], unchanged(module, tensor, scale) if measured else None
        # what is no matrix of a block becomes what `shapes_of` promised
        tensor = dequantize(tensor, scale, torch.float32 if matrix else torch.bfloat16)
    stored = recipe.store(name, tensor)
    if not (measured and matrix):
        return [*stored.items()], None
    scale = stored.get(module + (".scale_weight" if recipe.per_tensor else SCALE))
    layer = measure(module, tensor, stored[name], scale, recipe.form)
    return [*stored.items()], layer


def _check_finite(name: str, tensor: Tensor) -> None:
    """WeightsError for NaN or infinity, which int8 has no code for and a video no use."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), SLICE_ELEMENTS):
        part = flat[start : start + SLICE_ELEMENTS].float()
        if not bool(torch.isfinite(torch.linalg.vector_norm(part, ord=float("inf")))):
            raise WeightsError(
                f"tensor {name} of the source holds NaN or infinity; expected finite numbers: "
                "the file is damaged, download it again"
            )


def _quantize_in_slices(weight: Tensor, form: Format, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`quantize_weight`, some rows at a time: the same bits, without copies of the matrix in fp32."""
    rows, columns = weight.shape
    q = torch.empty((rows, columns), dtype=form.dtype, device=weight.device)
    scale = torch.empty((rows, 1), dtype=scale_dtype, device=weight.device)
    if weight.is_meta:  # only shapes are asked for
        return q, scale
    step = max(SLICE_ELEMENTS // max(columns, 1), 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        q[part], scale[part] = quantize_weight(weight[part], form, scale_dtype)
    return q, scale


def _quantize_whole(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ComfyUI's fp8: one scale () for the matrix."""
    absmax = weight.abs().amax().float()
    scale = (torch.where(absmax == 0, torch.ones_like(absmax), absmax) / FP8.qmax).to(scale_dtype)
    return to_levels(weight, scale.float(), FP8.dtype), scale


def _by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """File name of the block layout -> its tensors, blocks in order, the rest last."""
    groups: dict[str, list[str]] = {}
    rest: list[str] = []
    for name in names:
        block = re.match(r"blocks\.(\d+)\.", name)
        (groups.setdefault(f"block_{block.group(1)}.safetensors", []) if block else rest).append(name)
    return groups | {NON_BLOCK_FILE: rest}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
