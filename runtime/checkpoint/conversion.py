"""What a conversion will make of a checkpoint, decided from headers alone: which files, how large, from what.

`runtime.checkpoint.making` makes it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from runtime.checkpoint.checkpoint import SCALE, Checkpoint, open_checkpoint
from runtime.checkpoint.convert import FilePlan, Layout, Recipe, plan_files, shapes_of
from runtime.checkpoint.families import SHAPES, WANTED, family
from runtime.checkpoint.files import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX, read_header, read_pickle
from runtime.checkpoint.layouts import collect
from runtime.checkpoint.names import Kind
from runtime.checkpoint.write import safetensors_size
from runtime.errors import RequestError, WeightsError

Target = Literal["bf16", "fp8", "int8"]
_PICKLE_TARGETS = (".pth", ".pt")
_ZIP_BYTES = 512  # of a .pth for each tensor: its record's head, its entry in the contents


@dataclass(frozen=True)
class Conversion:
    """What will be made of an opened source."""

    source: Checkpoint
    target: Path
    recipe: Recipe
    layout: Layout
    files: dict[str, FilePlan] = field(repr=False)  # by name

    @property
    def nbytes(self) -> int:
        """Bytes of the files to be."""
        return sum(self.size_of(name) for name in self.files)

    @property
    def notes(self) -> list[str]:
        """What the user should know of this source before the work begins."""
        given, wanted = self.source.quantization, self.recipe.quantization
        if given not in ("fp8", "int8"):
            return []
        if given == wanted:
            return [f"{self.source.path} is {given} already: its matrices are copied as they are."]
        return [
            f"{self.source.path} is quantized already ({given}): what that lost stays lost, and {wanted} "
            "adds an error of its own; convert from a bf16 file if there is one."
        ]

    def path_of(self, name: str) -> Path:
        """Where a file of the plan goes."""
        return self.target / name if self.layout == "blocks" else self.target

    def size_of(self, name: str) -> int:
        """Bytes of one file; of a .pth, nearly."""
        plan = self.files[name].holds
        return safetensors_size(plan) + (_ZIP_BYTES * len(plan) if self.layout == "pickle" else 0)

    def source_bytes(self, name: str) -> int:
        """Bytes of weights that making one file will read."""
        return sum(self.source.tensors[one].nbytes for one in self.files[name].names)


def plan_conversion(
    source: Path,
    target: Path,
    to: Target,
    *,
    layout: Literal["blocks", "single"] | None = None,
    kind: Kind | None = None,
    scale_dtype: torch.dtype = torch.float32,
    other_dtype: torch.dtype | None = None,
) -> Conversion:
    """Open `source` and decide what will be written; reads headers only, writes nothing.

    layout None: one file if the target's name ends like one, else blocks. kind None: that of the tensors.
    other_dtype None: what is not quantized stays exactly as it is (but for "bf16", which means all of it).
    Raises WeightsError for a source that cannot be used, RequestError for a target that cannot be meant.
    """
    kind = find_kind(source) if kind is None else kind
    if kind == "vae" and to != "bf16":
        raise RequestError(f"{source} is a VAE, which has no matrices to store as {to}; expected --to bf16.")
    chosen = _layout_of(target, layout, kind)
    checkpoint = open_checkpoint(source, kind)
    _check_whole(checkpoint)
    recipe = Recipe(kind, to, scale_dtype, torch.bfloat16 if to == "bf16" else other_dtype)
    inside = {file.resolve() for file in checkpoint.files}
    inside |= {file.parent.resolve() for file in checkpoint.files} if chosen == "blocks" else set()
    if target.resolve() in inside:
        raise RequestError(f"{target} is where the source is; name another place for what is made of it.")
    plans = plan_files(shapes_of(checkpoint), recipe, chosen)
    return Conversion(checkpoint, target, recipe, chosen, {k or target.name: p for k, p in plans.items()})


def find_kind(source: Path) -> Kind:
    """What model the tensors at `source` are; WeightsError if it is none of the three, or more than one."""
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if file.is_file())
        names = [[*read_header(file)] for file in files if file.suffix == SAFETENSORS_SUFFIX]
        if not names:  # the order in which a directory is read: its pickles are companions otherwise
            names = [[*read_pickle(file)[0]] for file in files if file.suffix in PICKLE_SUFFIXES]
    else:
        names = [[*collect(source, "transformer")[0]]]
    families = {label for label in map(family, names) if label is not None}
    found: list[Kind] = [kind for kind, label in WANTED.items() if label in families]
    if len(found) == 1:
        return found[0]
    if found:
        raise WeightsError(f"{source} holds {', '.join(found)}; say with --kind which of them to convert.")
    if names:
        seen = f"looks like {sorted(families)[0]}" if families else "holds weights of no known model"
        raise WeightsError(f"{source} {seen}; expected {', '.join(WANTED.values())}.")
    below = sorted({file.parent.name for file in source.glob(f"*/*{SAFETENSORS_SUFFIX}")})
    hint = f"; name one of its directories: {', '.join(below)}" if below else ""
    raise WeightsError(f"{source} holds no weight file{hint}.")


def _check_whole(source: Checkpoint) -> None:
    """WeightsError for a source that lacks tensors: what is made of it would be refused when it is loaded."""
    layers = int(source.sizes().get("num_layers", 0))
    blocks: list[set[str]] = [set() for _ in range(layers)]
    for name in source.tensors:
        if match := re.match(r"blocks\.(\d+)\.(.*)", name):
            blocks[int(match.group(1))].add(match.group(2))
    wanted = {name for name in SHAPES[source.kind] if "{n}" not in name}
    inner = {name.removeprefix("blocks.{n}.") for name in SHAPES[source.kind] if "{n}" in name}
    inner |= {name for block in blocks for name in block if not name.endswith(SCALE)}
    wanted |= {f"blocks.{n}.{name}" for n in range(layers) for name in inner}
    absent = sorted(wanted - source.tensors.keys())
    if absent:
        more = f" and {len(absent) - 3} more" if absent[3:] else ""
        raise WeightsError(
            f"{source.path} lacks {', '.join(absent[:3])}{more}: the file is incomplete; download it again"
        )


def _layout_of(target: Path, asked: str | None, kind: Kind) -> Layout:
    if target.suffix in _PICKLE_TARGETS and kind == "transformer":
        raise RequestError(f"{target}: a transformer is kept as safetensors; name a .safetensors file.")
    named: Layout | None = "single" if target.suffix == SAFETENSORS_SUFFIX else None
    if target.suffix in _PICKLE_TARGETS:
        named = "pickle"
    if asked == "blocks" and named is not None:
        raise RequestError(f"{target} is named like a file; expected a directory for --layout blocks.")
    if named is not None:
        return named
    if asked == "single" or kind != "transformer":
        endings = ".safetensors" if kind == "transformer" else ".safetensors or .pth"
        raise RequestError(f"{target} is not named like a file; expected a name that ends in {endings}.")
    return "blocks"
