"""Which files a model's publisher has, and what is in each: from its manifest and the model's shapes alone.

Whether what is not quantized is fp32 or bf16 is not said there; it follows from the sizes of the files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from runtime.checkpoint.convert import CONFIG_FILE, INDEX_FILE, FilePlan, Layout, Recipe, plan_files
from runtime.checkpoint.files import SAFETENSORS_SUFFIX
from runtime.checkpoint.find import ITSELF
from runtime.checkpoint.layouts import BLOCK_FILE
from runtime.checkpoint.names import Kind
from runtime.checkpoint.write import safetensors_size
from runtime.errors import RequestError
from runtime.schema import ModelManifest, Quantization

KINDS: tuple[Kind, ...] = ("transformer", "text_encoder", "vae")
_ZIP_BYTES = 384  # of a .pth for each tensor: its record's head, its padding, its entry in the contents

Shapes = Mapping[Kind, Mapping[str, Tensor]]
"""For each part, name -> a floating tensor on meta, as the model's classes have it."""


@dataclass(frozen=True)
class SynthPlan:
    """What will be written below a directory: weight files by their path there, and what goes with them.

    configs: directory -> the transformer's sizes, where the layout has a config.json. indexed: directories
    that have an index. tokenizer: where it goes; None where the text encoder is not asked for.
    """

    model: str
    files: Mapping[str, FilePlan] = field(repr=False)
    configs: Mapping[str, Mapping[str, Any]]
    indexed: tuple[str, ...]
    tokenizer: str | None

    def size_of(self, path: str) -> int:
        """Bytes of one file; of a .pth, nearly."""
        return _size(self.files[path].holds, pickled=not path.endswith(SAFETENSORS_SUFFIX))

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(map(self.size_of, self.files))


def plan_synth(manifest: ModelManifest, shapes: Shapes) -> SynthPlan:
    """Which files the published layout of `manifest` has, and what is in each.

    shapes: of the parts that are wanted. Raises RequestError for a manifest that names no file for a part.
    """
    published = _published(manifest)
    files: dict[str, FilePlan] = {}
    configs: dict[str, Mapping[str, Any]] = {}
    indexed: list[str] = []
    for kind in KINDS:
        if kind not in shapes:
            continue
        place, name = _choose(manifest, kind, published)
        layout: Layout = "blocks" if name == ITSELF else "single"
        if name != ITSELF and not name.endswith(SAFETENSORS_SUFFIX):
            layout = "pickle"
        sizes = {
            (path.rpartition("/")[2] if layout == "blocks" else ""): size
            for path, size in published.items()
            if (path.rpartition("/")[0] == place if layout == "blocks" else path == _joined(place, name))
        }
        plans = _fitting(kind, manifest.quantization or "bf16", name, shapes[kind], layout, sizes)
        files |= {_joined(place, file or name): plan for file, plan in plans.items()}
        if kind == "transformer" and manifest.transformer is not None:
            if _joined(place, CONFIG_FILE) in published:
                configs[place] = manifest.transformer.model_dump()
            indexed += [place] if _joined(place, INDEX_FILE) in published else []
    tokenizer = None
    if "text_encoder" in shapes:
        tokenizer = _joined(*_choose(manifest, "tokenizer", published))
    return SynthPlan(manifest.name, files, configs, tuple(indexed), tokenizer)


def _published(manifest: ModelManifest) -> dict[str, int]:
    """Path below a weights directory -> bytes (0 unknown), of the repository or of what ships."""
    embedded = manifest.embedded_directory()
    if embedded is None:
        return {file.target: file.about_bytes for source in manifest.sources() for file in source.files}
    found = (path for path in embedded.rglob("*") if path.is_file())
    return {path.relative_to(embedded).as_posix(): path.stat().st_size for path in found}


def _choose(manifest: ModelManifest, part: str, published: Mapping[str, int]) -> tuple[str, str]:
    """The directory and the candidate that the publisher has for a part, in the order of searching."""
    for place in (*manifest.subdirectories, ""):
        for name in getattr(manifest.files, part):
            if name == ITSELF:
                inside = (path.rpartition("/") for path in published)
                if any(folder == place and BLOCK_FILE.fullmatch(file) for folder, _, file in inside):
                    return place, name
            elif _joined(place, name) in published:
                return place, name
    raise RequestError(
        f"{manifest.name} names no published file for its {part}; expected one of its candidates among the "
        "files of its source: choose another model of `t2v models`."
    )


def _fitting(
    kind: Kind,
    quantization: Quantization,
    name: str,
    shapes: Mapping[str, Tensor],
    layout: Layout,
    sizes: Mapping[str, int],
) -> dict[str, FilePlan]:
    """The plans of the recipe whose files are nearest in size to those that are published."""
    comfyui = "comfyui" in name
    if kind != "vae" and quantization in ("fp8", "int8"):
        rest = (torch.bfloat16, torch.float32) if kind == "text_encoder" else (torch.float32, torch.bfloat16)
        recipes = [
            Recipe(kind, quantization, other_dtype=one, per_tensor=comfyui and kind == "transformer")
            for one in rest
        ]
    else:
        whole = [Recipe(kind, "bf16"), Recipe(kind, "fp32", other_dtype=torch.float32)]
        recipes = whole[::-1] if kind == "vae" else whole
    plans = [plan_files(shapes, recipe, layout) for recipe in recipes]

    def distance(plan: Mapping[str, FilePlan]) -> int:
        made = {file: _size(plan[file].holds, pickled=layout == "pickle") for file in plan}
        return sum(abs(made[file] - sizes[file]) for file in plan if sizes.get(file))

    return min(plans, key=distance)  # the first of equals, where no size is known


def _size(held: Mapping[str, Tensor], *, pickled: bool) -> int:
    """Bytes of a file that holds these tensors; of a .pth, nearly."""
    return sum(like.nbytes + _ZIP_BYTES for like in held.values()) if pickled else safetensors_size(held)


def _joined(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name
