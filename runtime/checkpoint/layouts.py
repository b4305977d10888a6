"""Which files make one model: a single file, `block_N` + `non_block` files, shards, plain files merged.

Reads headers, never data. A set that lacks a file, or a directory that holds the model twice, is an error
that names the files: merging two variants would be noise.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from runtime.checkpoint.families import WANTED, family
from runtime.checkpoint.files import (
    PICKLE_SUFFIXES,
    SAFETENSORS_SUFFIX,
    TensorInfo,
    read_header,
    read_index,
    read_pickle,
)
from runtime.checkpoint.names import Kind
from runtime.errors import WeightsError

INDEX_SUFFIX = ".safetensors.index.json"
BLOCK_FILE = re.compile(r"block_(\d+)\.safetensors")
NON_BLOCK_FILE = "non_block.safetensors"
_SHARD_FILE = re.compile(r"(?P<stem>.+)-(?P<i>\d{5})-of-(?P<n>\d{5})\.safetensors")
# Pickles are opened only when their name may fit: the header that would tell is a pickle itself.
_PICKLE_NAMES: dict[Kind, re.Pattern[str]] = {
    "transformer": re.compile(r"(?i)(?!.*(t5|vae|tae|clip|lora)).*"),
    "text_encoder": re.compile(r"(?i).*t5.*"),
    "vae": re.compile(r"(?i).*vae.*"),
}

Stored = dict[str, TensorInfo]
Opened = tuple[Stored, dict[str, Tensor]]  # descriptions, and the mapped tensors of a .pth


def collect(path: Path, kind: Kind) -> Opened:
    """All stored tensors of the model at `path`. Raises WeightsError as the module says."""
    if path.is_dir():
        return _from_directory(path, kind)
    if not path.exists():
        raise WeightsError(
            f"{path} does not exist; expected the weights of {WANTED[kind]}, a file or a directory"
        )
    if path.name.endswith(INDEX_SUFFIX):
        return _merge(path, kind, *_indexed(path)), {}
    if path.suffix == SAFETENSORS_SUFFIX:
        return read_header(path), {}
    if path.suffix in PICKLE_SUFFIXES:
        return read_pickle(path)
    if path.suffix == ".gguf":
        raise WeightsError(
            f"{path} is a GGUF file, which is not supported; use a bf16, fp8 or int8 safetensors file"
        )
    raise WeightsError(
        f"{path} has an unknown ending; expected .safetensors, {', '.join(PICKLE_SUFFIXES)} or a directory"
    )


def _from_directory(path: Path, kind: Kind) -> Opened:
    files = {file: read_header(file) for file in sorted(path.glob(f"*{SAFETENSORS_SUFFIX}"))}
    of_kind = {file: tensors for file, tensors in files.items() if family(tensors) in (WANTED[kind], None)}
    if not any(family(tensors) for tensors in of_kind.values()):
        of_kind = {}  # nothing but strangers
    index: dict[str, Path] = {}
    for index_file in sorted(path.glob(f"*{INDEX_SUFFIX}")):
        members, listed = _indexed(index_file)
        names = [name for tensors in members.values() for name in tensors]
        if family(names) == WANTED[kind]:
            of_kind.update(members)
            index.update(listed)
    if of_kind:
        _check_complete(path, of_kind)
        return _merge(path, kind, of_kind, index), {}
    pickles = [file for file in sorted(path.iterdir()) if file.suffix in PICKLE_SUFFIXES]
    opened = {file: read_pickle(file) for file in pickles if _PICKLE_NAMES[kind].fullmatch(file.name)}
    fitting = [file for file, (tensors, _) in opened.items() if family(tensors) == WANTED[kind]]
    if len(fitting) == 1:
        return opened[fitting[0]]
    if fitting:
        raise _alternatives(path, kind, fitting)
    seen = ", ".join(file.name for file in [*files, *pickles]) or "no weight file"
    raise WeightsError(
        f"{path} holds no {WANTED[kind].split(' ', 1)[1]} (found: {seen}); expected its files there"
    )


def _indexed(index_file: Path) -> tuple[dict[Path, Stored], dict[str, Path]]:
    """The files of an index with their headers, and its map; each tensor must be where the index says."""
    listed = {name: index_file.parent / file for name, file in read_index(index_file).items()}
    members: dict[Path, Stored] = {}
    for file in sorted(set(listed.values())):
        if not file.is_file():
            raise WeightsError(f"{file} is missing ({index_file.name} lists it); download it")
        members[file] = read_header(file)
    for name, file in listed.items():
        if name not in members[file]:
            raise WeightsError(
                f"{file} lacks tensor {name}, which {index_file.name} says it holds; download both again"
            )
    return members, listed


def _check_complete(path: Path, files: Iterable[Path]) -> None:
    """WeightsError that names the first absent member of a numbered set."""
    present = {file.name for file in files}
    blocks = {int(match.group(1)) for match in map(BLOCK_FILE.fullmatch, present) if match}
    # One beyond their count is enough to name the first that is absent; a file's name may say any number.
    wanted = [f"block_{n}.safetensors" for n in range(min(max(blocks, default=-1), len(blocks)) + 1)]
    if blocks or NON_BLOCK_FILE in present:
        wanted += [NON_BLOCK_FILE] + ([] if blocks else ["block_0.safetensors"])
    for match in map(_SHARD_FILE.fullmatch, sorted(present)):
        if match:
            count = int(match["n"])
            wanted += [f"{match['stem']}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name in wanted:
        if name not in present:
            raise WeightsError(f"{path / name} is missing: other files of its set are there; download it")


def _merge(path: Path, kind: Kind, files: Mapping[Path, Stored], index: Mapping[str, Path]) -> Stored:
    """One dict of all tensors. A name in two files belongs to the one that the index says, or is an error."""
    merged: Stored = {}
    doubles: dict[tuple[Path, Path], list[str]] = {}
    for file, tensors in files.items():
        for name, info in tensors.items():
            if name in merged and not _decided(index.get(name), merged[name].file, file, index):
                doubles.setdefault((merged[name].file, file), []).append(name)
            if name not in merged or index.get(name) == file:
                merged[name] = info
    if doubles:
        (one, two), names = max(doubles.items(), key=lambda item: len(item[1]))
        if 2 * len(names) >= min(len(files[one]), len(files[two])):
            raise _alternatives(path, kind, files)
        raise WeightsError(
            f"tensor {names[0]} is both in {one} and in {two}; expected it once: remove one of the files"
        )
    return merged


def _decided(owner: Path | None, one: Path, two: Path, index: Mapping[str, Path]) -> bool:
    """Both files belong to the index's set, and it says which of them holds the tensor."""
    members = set(index.values())
    return owner is not None and one in members and two in members


def _alternatives(path: Path, kind: Kind, files: Iterable[Path]) -> WeightsError:
    """The error for a directory with more than one complete model; members of one set are named once."""
    labels = {BLOCK_FILE.sub("block_*.safetensors", file.name) for file in files} - {NON_BLOCK_FILE}
    named = ", ".join(sorted({_SHARD_FILE.sub(r"\g<stem>-*.safetensors", label) for label in labels}))
    return WeightsError(
        f"{path} holds {WANTED[kind].split(' ', 1)[1]} weights more than once ({named}); "
        "pass the one file that you want, or give each variant its own directory"
    )
