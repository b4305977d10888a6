"""The wrong machine around the program, told in one sentence each before anything loads.

An image describes itself (`image.json`, written by its build); `profiles/images.yaml` says what every image
needs. `examine` compares them with the machine. `check` is for a run: it raises the first finding that would
end it. Outside of an image there is nothing here to find: `runtime.device` and the plan speak for other
installations.

No torch here.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from entrypoint.table import size
from runtime.device import Gpu, Inventory, inventory
from runtime.errors import DeviceError, FourstepError, OutputError, PlanError, WeightsError
from runtime.memory.ram import host_ram, is_wsl
from runtime.profiles import load_profile
from runtime.schema import ModelManifest, project_root

DESCRIPTION = Path(sys.prefix) / "image.json"
OUTPUTS, WEIGHTS, SHARED_MEMORY = Path("/outputs"), Path("/weights"), Path("/dev/shm")

LEAST_RAM = 4 << 30
"""Bytes of RAM below which no plan for a published model exists; what is above is the plan's to judge."""
LEAST_SHARED_MEMORY = 64 << 20
"""What an engine gives a container that asks for nothing; less was asked for by mistake."""

Version = tuple[int, ...]


@dataclass(frozen=True)
class Image:
    """What an image needs of a machine; an entry of profiles/images.yaml (see there for each field)."""

    tag: str
    torch: str
    cuda: str
    cuda_image: str
    driver: str
    minimum_driver: str
    architectures: tuple[str, ...]
    torch_architectures: tuple[str, ...]
    cards: str
    sage_accumulation: str

    def starts_on(self, driver: str) -> bool:
        """Whether this driver starts this image's CUDA at all."""
        return numbers(driver) >= numbers(self.minimum_driver)

    def computes_on(self, capability: tuple[int, int]) -> bool:
        """Whether its torch has code for a card: that of a minor runs on later minors of the same major."""
        built = [numbers(one) for one in self.torch_architectures]
        return any(one[0] == capability[0] and one[1] <= capability[1] for one in built)


@dataclass(frozen=True)
class Finding:
    """Something that is wrong around the program; `error` is None where a run may still go well."""

    name: str  # gpu, driver, architecture, weights, outputs, cache, ram, shm
    message: str
    error: type[FourstepError] | None


@dataclass(frozen=True)
class Need:
    """What a run asks of the machine."""

    device: str  # cpu or cuda:N, as it was resolved
    on_purpose: bool  # whether a CPU was asked for, by an option or by the profile
    embedded: bool  # the model's weights ship with the program
    weights: Path = WEIGHTS
    output: Path | None = None  # None: the volume


def numbers(version: str) -> Version:
    """ "550.54.14" -> (550, 54, 14)."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def images() -> tuple[Image, ...]:
    """Every image that there is, oldest CUDA first."""
    table = yaml.safe_load((project_root() / "profiles" / "images.yaml").read_text(encoding="utf-8"))
    return tuple(_image(entry) for entry in table["images"])


def _image(entry: dict[str, Any]) -> Image:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
    }
    return Image(**fields)


def description() -> dict[str, Any] | None:
    """What the image that this program runs in says of itself; None outside of an image."""
    if not DESCRIPTION.is_file():
        return None
    found: dict[str, Any] = json.loads(DESCRIPTION.read_text(encoding="utf-8"))
    return found


def own_image() -> Image | None:
    """The image that this program runs in; None outside of one."""
    described = description()
    return next((one for one in images() if described is not None and one.tag == described["tag"]), None)


# ------------------------------------------------------------------------------------------- what a run asks


class Asked(Protocol):
    """The user's options that say where a run takes place; `entrypoint.generate.Where` is one."""

    @property
    def profile(self) -> str:
        """Name or path."""

    @property
    def device(self) -> str:
        """auto, cuda:N or cpu."""

    @property
    def weights(self) -> Path | None:
        """None: the volume."""

    @property
    def output(self) -> Path | None:
        """None: the volume."""


def need_of(asked: Asked, device: str, manifest: ModelManifest) -> Need:
    """What a run needs; `device` is what became of the one that was asked for."""
    return Need(
        device=device,
        on_purpose=asked.device == "cpu" or load_profile(asked.profile).device == "cpu",
        embedded=manifest.embedded_directory() is not None,
        weights=WEIGHTS if asked.weights is None else asked.weights,
        output=asked.output,
    )


def check(need: Need) -> None:
    """Raise the first finding that would end this run; `t2v doctor` tells of the others."""
    for finding in examine(need):
        if finding.error is not None:
            raise finding.error(finding.message)


def examine(need: Need) -> Iterator[Finding]:
    """All findings about this machine, for a run or for `t2v doctor`; none outside of an image."""
    image = own_image()
    if image is None:
        return
    stock = inventory()
    yield from _gpu(image, stock, need)
    if not need.embedded:
        yield from _weights(need.weights)
        yield from _ram()
    yield from _volumes(need)
    yield from _shared_memory()


# ------------------------------------------------------------------------------------------- GPU and driver


def _gpu(image: Image, stock: Inventory, need: Need) -> Iterator[Finding]:
    if need.device == "cpu":
        if not need.on_purpose and not need.embedded and stock.reason:
            yield Finding(
                "gpu",
                f"No GPU can be used: {stock.reason}. To wait for a CPU instead: --device cpu.",
                DeviceError,
            )
        return
    index = int(need.device.removeprefix("cuda:"))
    gpu = next((one for one in stock.gpus if one.index == index), None)
    if gpu is not None:
        yield from _driver(image, gpu)
        yield from _architecture(image, gpu)


def _driver(image: Image, gpu: Gpu) -> Iterator[Finding]:
    if not image.starts_on(gpu.driver):
        oldest = min((one.minimum_driver for one in images()), key=numbers)
        yield Finding(
            "driver",
            f"The NVIDIA driver is {gpu.driver}; image {image.tag} (CUDA {image.cuda}) needs "
            f"{image.minimum_driver} or newer: {_other(image, gpu) or f'update it to {oldest} or newer'}.",
            DeviceError,
        )
    elif numbers(gpu.driver) < numbers(image.driver):
        fitting = [
            o for o in images() if numbers(o.driver) <= numbers(gpu.driver) and o.computes_on(gpu.capability)
        ]
        other = f"image {fitting[-1].tag} was made for it" if fitting else "no image was made for it"
        yield Finding(
            "driver",
            f"The NVIDIA driver {gpu.driver} is older than the {image.driver} of CUDA {image.cuda}, which "
            f"image {image.tag} was built with: it works by CUDA's minor-version compatibility; {other}, or "
            "update it.",
            None,
        )


def _architecture(image: Image, gpu: Gpu) -> Iterator[Finding]:
    if not image.computes_on(gpu.capability):
        built = ", ".join(image.torch_architectures)
        yield Finding(
            "architecture",
            f"{gpu} is no card for image {image.tag}, which is built for {built}: "
            f"{_other(image, gpu) or 'no image supports this card; run it with --device cpu'}.",
            DeviceError,
        )


def _other(image: Image, gpu: Gpu) -> str | None:
    """The newest other image that runs on this driver and card, as advice."""
    fitting = [
        one
        for one in images()
        if one.tag != image.tag and one.starts_on(gpu.driver) and one.computes_on(gpu.capability)
    ]
    return f"use image {fitting[-1].tag} (TAG={fitting[-1].tag} with compose)" if fitting else None


# --------------------------------------------------------------------------------------- volumes and memory


def _weights(directory: Path) -> Iterator[Finding]:
    if directory != WEIGHTS or not directory.is_dir():
        return  # a directory of the user's own: the loader tells what it lacks
    try:
        empty = not any(directory.iterdir())
    except OSError as error:
        yield Finding(
            "weights",
            f"{directory} cannot be read by {_who()} ({error.strerror}); expected the model's weights: make "
            "their directory readable, or run as its owner.",
            WeightsError,
        )
        return
    if empty:
        yield Finding(
            "weights",
            f"No weights are mounted: {directory} is empty; mount them with `-v DIRECTORY:{directory}:ro`, "
            "or download them with `docker compose run pull`, or try --model demo, which needs none.",
            WeightsError,
        )


def _volumes(need: Need) -> Iterator[Finding]:
    inside = need.output is None or not need.output.is_absolute() or need.output.is_relative_to(OUTPUTS)
    if inside and not os.access(OUTPUTS, os.W_OK):
        yield Finding("outputs", _unwritable(OUTPUTS, "the video goes there"), OutputError)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "/cache")
    if not os.access(cache, os.W_OK):
        # Triton writes its kernels there before it can load them; on a CPU nothing is lost but time.
        fatal = OutputError if need.device != "cpu" else None
        yield Finding("cache", _unwritable(cache, "compiled kernels and text states are kept there"), fatal)


def _unwritable(directory: Path, purpose: str) -> str:
    if not directory.exists():
        return f"{directory} does not exist, and {purpose}; mount a directory or a volume there."
    status = directory.stat()
    mount = f"-v DIRECTORY:{directory}"
    return (
        f"{directory} cannot be written by {_who()} (it belongs to {status.st_uid}:{status.st_gid}, mode "
        f"{status.st_mode & 0o7777:o}, or nothing is mounted), and {purpose}: mount a directory of your own "
        f"({shlex.join(mount.split())}) and run as its owner (--user, or UID and GID in .env)."
    )


def _who() -> str:
    return f"user {os.getuid()}:{os.getgid()}"


def _ram() -> Iterator[Finding]:
    ram = host_ram()
    if ram.total >= LEAST_RAM:
        return
    advice = (
        "give WSL2 more (memory= under [wsl2] in .wslconfig, then `wsl --shutdown`)"
        if is_wsl()
        else "raise the container's memory limit, or use a machine with more"
    )
    yield Finding(
        "ram",
        f"There is {size(ram.total)} of RAM ({ram.source}); the model needs {size(LEAST_RAM)} or more: "
        f"{advice}.",
        PlanError,
    )


def _shared_memory() -> Iterator[Finding]:
    if not SHARED_MEMORY.is_dir():
        return
    status = os.statvfs(SHARED_MEMORY)
    total = status.f_blocks * status.f_frsize
    if total < LEAST_SHARED_MEMORY:
        yield Finding(
            "shm",
            f"{SHARED_MEMORY} holds {size(total)}; expected {size(LEAST_SHARED_MEMORY)} or more, which "
            "processes share: start the container with --shm-size 256m (shm_size with compose).",
            None,
        )
