"""Which GPU, and is it usable: asked of the driver itself (NVML), so the answer comes before torch does.

NVML counts every GPU of the machine or container, in PCI order. CUDA counts those that CUDA_VISIBLE_DEVICES
leaves, fastest first unless CUDA_DEVICE_ORDER says otherwise. `gpus` applies CUDA_VISIBLE_DEVICES (numbers
and UUIDs), and `select_device` asks CUDA for PCI order, so that `cuda:1` means the same card to both and to
nvidia-smi. A MIG slice cannot be told apart here: its card's whole memory is reported.
"""

import os
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

from runtime.errors import DeviceError, RequestError
from runtime.profiles import list_profiles, load_profile
from runtime.schema import Profile

DEVICE_PATTERN = re.compile(r"auto|cpu|cuda(:(?P<index>[0-9]{1,3}))?")

MEMORY_MATCH = (0.9, 1.03)
"""A card's memory over its profile's ceiling: ECC takes up to 6 %; more than the ceiling would lie idle."""

BLACKWELL, BLACKWELL_CUDA = (10, 0), (12, 8)
"""Cards from this compute capability on have no kernels in a torch built for an earlier CUDA."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as CUDA numbers it (`cuda:index`); memory in bytes, free as of the question."""

    index: int
    name: str
    uuid: str
    total: int
    free: int
    capability: tuple[int, int]
    driver: str

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name} (compute capability {major}.{minor}, {self.total / 2**30:.1f} GiB)"


@dataclass(frozen=True)
class Inventory:
    """The GPUs that CUDA may use, the newest CUDA that the driver supports, or why there are no GPUs."""

    gpus: tuple[Gpu, ...] = ()
    driver_cuda: tuple[int, int] | None = None
    reason: str | None = None


# ------------------------------------------------------------------------------------------- what there is


def inventory() -> Inventory:
    """Ask the driver. Never raises: without driver, GPU or permission, `reason` says what is missing."""
    try:
        import pynvml
    except ImportError:
        return Inventory(reason="the Python package nvidia-ml-py, which asks the driver, is not installed")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Inventory(reason=_driver_reason(pynvml, error))
    try:
        return _count(pynvml)
    except pynvml.NVMLError as error:
        return Inventory(reason=f"the NVIDIA driver does not answer ({error}); see whether nvidia-smi works")
    finally:
        pynvml.nvmlShutdown()


def gpus() -> list[Gpu]:
    """The GPUs that CUDA may use, by their index; empty when there are none (`inventory` says why)."""
    return list(inventory().gpus)


def _driver_reason(pynvml: Any, error: Exception) -> str:
    """Why NVML did not start, with what to do."""
    container = "in a container, start it with --gpus all and the NVIDIA container toolkit"
    if isinstance(error, pynvml.NVMLError_LibraryNotFound):
        return f"there is no NVIDIA driver (libnvidia-ml.so.1 was not found); {container}"
    if isinstance(error, pynvml.NVMLError_DriverNotLoaded):
        return "the NVIDIA driver is installed but not loaded; see whether nvidia-smi works"
    if isinstance(error, pynvml.NVMLError_LibRmVersionMismatch):
        return "the NVIDIA driver was updated and its old kernel module still runs; reboot"
    return f"the NVIDIA driver does not start ({error}); {container}, or see whether nvidia-smi works"


def _count(pynvml: Any) -> Inventory:
    driver = _text(pynvml.nvmlSystemGetDriverVersion())
    version = pynvml.nvmlSystemGetCudaDriverVersion()
    driver_cuda = version // 1000, version % 1000 // 10
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    if not handles:
        return Inventory((), driver_cuda, f"the NVIDIA driver {driver} finds no GPU")
    uuids = [_text(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    chosen = visible(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not chosen:
        setting = os.environ["CUDA_VISIBLE_DEVICES"]
        reason = (
            f"CUDA_VISIBLE_DEVICES={setting!r} hides all GPUs ({len(handles)}); unset it or name one of them"
        )
        return Inventory((), driver_cuda, reason)
    found = []
    for index, place in enumerate(chosen):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handles[place])
        found.append(
            Gpu(
                index=index,
                name=_text(pynvml.nvmlDeviceGetName(handles[place])),
                uuid=uuids[place],
                total=int(memory.total),
                free=int(memory.free),
                capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handles[place])),
                driver=driver,
            )
        )
    return Inventory(tuple(found), driver_cuda)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # bytes before nvidia-ml-py 12


def visible(uuids: list[str], setting: str | None) -> list[int]:
    """The places in `uuids` that CUDA_VISIBLE_DEVICES leaves, in its order.

    As CUDA does: the list ends before the first entry that names no GPU, so "" and "-1" leave none. An entry
    is a number (PCI order, see `select_device`) or the beginning of exactly one UUID.
    """
    if setting is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for entry in (part.strip() for part in setting.split(",")):
        if re.fullmatch(r"[0-9]{1,4}", entry):
            named = [int(entry)] if int(entry) < len(uuids) else []
        else:
            named = [i for i, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
        if len(named) != 1 or named[0] in chosen:
            break
        chosen += named
    return chosen


def torch_cuda() -> tuple[int, int] | None:
    """The CUDA version that the installed torch was built for, read without importing it; None for none."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    built = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+)\.(\d+)", version, re.MULTILINE)
    return (int(built[1]), int(built[2])) if built else None


# ------------------------------------------------------------------------------------------- what to use


def select_device(asked: str, profile: Profile) -> tuple[Profile, str]:
    """The device to run on, `cuda:N` or `cpu`, and the profile for it (the shipped `auto` is replaced).

    `auto` leaves the choice to the profile; of several GPUs the one with the most free memory is taken. A
    profile without preference takes the CPU when no GPU is usable; one that names CUDA never does silently.
    Raises RequestError for a word that is no device, DeviceError for a GPU that is absent or unusable, with
    the piece that is missing.
    """
    match = DEVICE_PATTERN.fullmatch(asked)
    if not match:
        raise RequestError(f"device is {asked!r}; expected auto, cuda, cuda:N or cpu.")
    wanted = profile.device if asked == "auto" else asked
    if wanted == "cpu":
        return _filled(profile, None), "cpu"
    _ask_for_pci_order()
    stock = inventory()
    index = int(match["index"]) if match["index"] else None
    gpu = _pick(stock, index)
    missing = stock.reason if not stock.gpus else _unusable(stock, gpu)
    if wanted == "auto" and missing:
        return _filled(profile, None), "cpu"
    if missing:
        who = f"device {asked}" if asked != "auto" else f"profile {profile.name}"
        raise DeviceError(f"{who} needs CUDA, but {missing}. Without a GPU: --device cpu --profile cpu.")
    if gpu is None:
        names = ", ".join(f"cuda:{g.index} {g.name}" for g in stock.gpus)
        raise DeviceError(f"device is {asked}; there is no such GPU, expected one of: {names}.")
    return _filled(profile, gpu), f"cuda:{gpu.index}"


def gpu_of(device: str) -> Gpu | None:
    """The GPU that `cuda:N` names, with its free memory as of now; None for the CPU or where it is gone."""
    return next((gpu for gpu in gpus() if device == f"cuda:{gpu.index}"), None)


def _ask_for_pci_order() -> None:
    """Have CUDA number GPUs as the driver does. It reads this once, when torch first touches it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def _pick(stock: Inventory, index: int | None) -> Gpu | None:
    if index is None:
        return max(stock.gpus, key=lambda gpu: (gpu.free, -gpu.index), default=None)
    return next((gpu for gpu in stock.gpus if gpu.index == index), None)


def _unusable(stock: Inventory, gpu: Gpu | None) -> str | None:
    """What keeps the installed torch from using a GPU that is there; None when nothing is known to."""
    built = torch_cuda()
    if find_spec("torch") is None:
        return "torch is not installed"
    if built is None:
        return "the installed torch was built without CUDA; install the CUDA build"
    text = ".".join(map(str, built))
    if stock.driver_cuda is not None and built[0] > stock.driver_cuda[0]:
        newest = ".".join(map(str, stock.driver_cuda))
        return (
            f"the driver {stock.gpus[0].driver} supports CUDA up to {newest} and torch was built for {text}; "
            "update the driver, or use an image with an older CUDA"
        )
    if gpu is not None and gpu.capability >= BLACKWELL and built < BLACKWELL_CUDA:
        return (
            f"{gpu} needs a torch built for CUDA 12.8 or newer, this one is for {text}; use the cu128 image"
        )
    return None


def confirm_device(device: str) -> None:
    """Have torch itself agree, at load: imports it and starts CUDA. DeviceError when it sees no such GPU."""
    if device == "cpu":
        return
    import torch

    index = int(device.removeprefix("cuda:"))
    if not torch.cuda.is_available():
        stock = inventory()
        reason = stock.reason or _unusable(stock, None) or "torch cannot start CUDA on this driver"
        raise DeviceError(f"device is {device}, but {reason}. See whether nvidia-smi works.")
    if index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise DeviceError(f"device is {device}, but torch sees {count} GPU(s); expected 0 to {count - 1}.")
    driver_name = next((gpu.name for gpu in gpus() if gpu.index == index), None)
    torch_name = torch.cuda.get_device_name(index)
    if driver_name is not None and not torch_name.startswith(driver_name):  # a MIG slice adds to the name
        raise DeviceError(
            f"{device} is {driver_name!r} to the driver and {torch_name!r} to CUDA; expected one numbering: "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID before the program starts."
        )


# ------------------------------------------------------------------------------------------- auto profile


def _filled(profile: Profile, gpu: Gpu | None) -> Profile:
    # Compared whole: a profile of one's own that happens to be called auto is kept as it is.
    return choose_profile(gpu)[0] if profile == load_profile("auto") else profile


def choose_profile(gpu: Gpu | None) -> tuple[Profile, str]:
    """The profile for `auto` on this card (None: no usable GPU), and the reason in one line.

    By compute capability and memory; among equals, the one whose name is most like the card's. A card that no
    profile describes gets the `auto` profile with what its compute capability and memory allow.
    """
    if gpu is None:
        return load_profile("cpu"), "no usable GPU: profile cpu"
    shipped = (load_profile(name) for name in list_profiles())
    alike = [profile for profile in shipped if _suits(profile, gpu)]
    if not alike:
        return _generic(gpu), f"no profile describes {gpu}: auto, with what such a card can do"
    best = max(alike, key=lambda profile: _likeness(profile.name, gpu.name))
    same = _likeness(best.name, gpu.name) == min(len(_plain(best.name)), len(_plain(gpu.name)))
    reason = "its own" if same else "the same compute capability and memory"
    return best, f"{gpu}: profile {best.name} ({reason})"


def _suits(profile: Profile, gpu: Gpu) -> bool:
    if profile.vram_bytes is None or profile.capability != gpu.capability:
        return False
    low, high = MEMORY_MATCH
    return low <= gpu.total / profile.vram_bytes <= high


def _plain(name: str) -> str:
    """A card's or profile's name as letters and digits: "NVIDIA GeForce RTX 4070 Ti" -> "4070ti"."""
    return re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())


def _likeness(profile: str, gpu: str) -> int:
    """How many characters the two names have in common from their beginning."""
    pairs = zip(_plain(profile), _plain(gpu), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _generic(gpu: Gpu) -> Profile:
    major, minor = gpu.capability
    modern = gpu.capability >= (8, 0)  # bf16 units
    return Profile.model_validate(
        load_profile("auto").model_dump()
        | {
            "description": gpu.name,
            "device": "cuda",
            "dtype": "bf16" if modern else "fp16",
            "quantization": "fp8" if gpu.capability >= (8, 9) else "int8",
            "compute_capability": f"{major}.{minor}",
            # The same thresholds as in the shipped profiles: see rtx5090.yaml and rtx4090.yaml.
            "text_encoder": {"stay_on_gpu": gpu.total >= 30 * 2**30},
            "vae": {"stay_on_gpu": gpu.total >= 22 * 2**30, "dtype": "bf16" if modern else "fp32"},
        }
    )
