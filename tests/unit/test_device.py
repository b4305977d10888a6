"""Devices: with a stand-in for the driver, every card, setting and fault; without one, the reason."""

import os
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from runtime import device
from runtime.device import Gpu, choose_profile, confirm_device, gpus, inventory, select_device, visible
from runtime.errors import DeviceError, RequestError
from runtime.profiles import load_profile
from runtime.schema import Profile

GIB = 1 << 30
AUTO = load_profile("auto")


def card(name: str, gib: float, capability: tuple[int, int], free: float | None = None) -> Gpu:
    free_bytes = int((gib if free is None else free) * GIB)
    return Gpu(0, name, f"GPU-{abs(hash(name)):x}", int(gib * GIB), free_bytes, capability, "580.65")


RTX4090 = card("NVIDIA GeForce RTX 4090", 23.99, (8, 9))
RTX3060 = card("NVIDIA GeForce RTX 3060", 12.0, (8, 6))


class NVMLError(Exception):
    pass


class LibraryNotFound(NVMLError):
    pass


class DriverNotLoaded(NVMLError):
    pass


class LibRmVersionMismatch(NVMLError):
    pass


def install_driver(
    monkeypatch: pytest.MonkeyPatch,
    *cards: Gpu,
    fault: Exception | None = None,
    late: Exception | None = None,
    cuda: int = 13000,
    text: type = str,
) -> list[str]:
    """Put a stand-in for pynvml in place; returns the list of its starts and stops."""
    calls: list[str] = []

    def start() -> None:
        if fault:
            raise fault
        calls.append("init")

    def memory(handle: Gpu) -> SimpleNamespace:
        if late:
            raise late
        return SimpleNamespace(total=handle.total, free=handle.free)

    def said(value: str) -> Any:
        return value if text is str else value.encode()

    module: Any = ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.NVMLError_LibraryNotFound = LibraryNotFound
    module.NVMLError_DriverNotLoaded = DriverNotLoaded
    module.NVMLError_LibRmVersionMismatch = LibRmVersionMismatch
    module.nvmlInit = start
    module.nvmlShutdown = lambda: calls.append("shutdown")
    module.nvmlSystemGetDriverVersion = lambda: said("580.65")
    module.nvmlSystemGetCudaDriverVersion = lambda: cuda
    module.nvmlDeviceGetCount = lambda: len(cards)
    module.nvmlDeviceGetHandleByIndex = lambda i: cards[i]
    module.nvmlDeviceGetUUID = lambda handle: said(handle.uuid)
    module.nvmlDeviceGetName = lambda handle: said(handle.name)
    module.nvmlDeviceGetMemoryInfo = memory
    module.nvmlDeviceGetCudaComputeCapability = lambda handle: handle.capability
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return calls


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the real machine, and a torch built for CUDA 12.8."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setattr(device, "torch_cuda", lambda: (12, 8))


# --------------------------------------------------------------------------------------------- inventory


@pytest.mark.parametrize("text", [str, bytes])
def test_cards_are_read(monkeypatch: pytest.MonkeyPatch, text: type) -> None:
    calls = install_driver(monkeypatch, RTX4090, RTX3060, text=text)
    first, second = gpus()
    assert first == RTX4090
    assert (second.index, second.name, second.total, second.capability) == (1, RTX3060.name, 12 * GIB, (8, 6))
    assert inventory().driver_cuda == (13, 0)
    assert inventory().reason is None
    assert calls == ["init", "shutdown"] * 3


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (LibraryNotFound(), "no NVIDIA driver"),
        (DriverNotLoaded(), "not loaded"),
        (LibRmVersionMismatch(), "reboot"),
        (NVMLError("Insufficient Permissions"), "Insufficient Permissions"),
    ],
)
def test_no_driver_has_a_reason(monkeypatch: pytest.MonkeyPatch, fault: Exception, told: str) -> None:
    install_driver(monkeypatch, RTX4090, fault=fault)
    assert gpus() == []
    assert told in str(inventory().reason)


def test_driver_that_stops_answering(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install_driver(monkeypatch, RTX4090, late=NVMLError("GPU is lost"))
    assert "GPU is lost" in str(inventory().reason)
    assert calls == ["init", "shutdown"]


def test_no_package_and_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch)
    assert "finds no GPU" in str(inventory().reason)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in str(inventory().reason)


def test_the_real_package_answers() -> None:
    """Whatever this machine has: GPUs, or a reason."""
    stock = inventory()
    assert bool(stock.gpus) != bool(stock.reason)


@pytest.mark.parametrize(
    ("setting", "places"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        (" 1 ", [1]),
        ("0,7,1", [0]),
        ("0,0", [0]),
        ("GPU-aa", [0]),
        ("GPU-b", []),  # the beginning of two
        ("GPU-b2,1", [2, 1]),
        ("MIG-12", []),
        ("none", []),
    ],
)
def test_visible(setting: str | None, places: list[int]) -> None:
    assert visible(["GPU-aa1", "GPU-b1", "GPU-b2"], setting) == places


def test_visible_devices_renumber(monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch, RTX4090, RTX3060)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [(gpu.index, gpu.name) for gpu in gpus()] == [(0, RTX3060.name)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides all GPUs (2)" in str(inventory().reason)


@pytest.mark.parametrize(
    ("line", "built"),
    [
        ("cuda: Optional[str] = '12.4'", (12, 4)),
        ("cuda = '13.0'", (13, 0)),
        ("cuda: Optional[str] = None", None),
        ("nocuda = '12.4'", None),
    ],
)
def test_torch_build_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, line: str, built: tuple[int, int] | None
) -> None:
    monkeypatch.undo()
    (tmp_path / "version.py").write_text(f"__version__ = '2.8.0'\n{line}\nhip: Optional[str] = '6.1'\n")
    monkeypatch.setattr(
        device, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    )
    assert device.torch_cuda() == built


def test_torch_build_agrees_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.undo()
    built = device.torch_cuda()
    assert torch.version.cuda == (None if built is None else ".".join(map(str, built)))


# ---------------------------------------------------------------------------------------------- selection


def test_auto_takes_the_gpu_with_most_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = card("NVIDIA GeForce RTX 4090", 23.99, (8, 9), free=2)
    install_driver(monkeypatch, busy, RTX3060)
    profile, name = select_device("auto", AUTO)
    assert name == "cuda:1"
    assert profile.name == "rtx3060-12gb"
    assert select_device("cuda:0", AUTO)[0].name == "rtx4090"
    assert select_device("cuda", AUTO)[1] == "cuda:1"


def test_named_profile_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch, RTX4090)
    asked = load_profile("rtx4060")
    assert select_device("auto", asked) == (asked, "cuda:0")
    assert select_device("cpu", asked) == (asked, "cpu")
    own = AUTO.model_copy(update={"dtype": "fp32"})  # called auto, but not the shipped one
    assert select_device("auto", own) == (own, "cuda:0")


def test_auto_without_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch, fault=LibraryNotFound())
    assert select_device("auto", AUTO) == (load_profile("cpu"), "cpu")


def test_auto_with_a_torch_without_cuda_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch, RTX4090)
    monkeypatch.setattr(device, "torch_cuda", lambda: None)
    assert select_device("auto", AUTO)[1] == "cpu"


def refused(asked: str, profile: Profile = AUTO) -> str:
    with pytest.raises(DeviceError) as caught:
        select_device(asked, profile)
    return str(caught.value)


def test_missing_pieces_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch, fault=LibraryNotFound())
    assert "device cuda needs CUDA, but there is no NVIDIA driver" in refused("cuda")
    assert "profile rtx4070 needs CUDA" in refused("auto", load_profile("rtx4070"))
    assert "--device cpu" in refused("cuda:1")
    install_driver(monkeypatch)
    assert "finds no GPU" in refused("cuda")
    install_driver(monkeypatch, RTX4090)
    message = refused("cuda:3")
    assert "cuda:3" in message
    assert "expected one of: cuda:0 NVIDIA GeForce RTX 4090" in message
    install_driver(monkeypatch, RTX4090, cuda=11080)
    assert "supports CUDA up to 11.8 and torch was built for 12.8" in refused("cuda")
    install_driver(monkeypatch, RTX4090, cuda=12020)  # same major version: compatible
    assert select_device("cuda", AUTO)[1] == "cuda:0"


def test_torch_builds_that_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch, card("NVIDIA GeForce RTX 5090", 31.8, (12, 0)))
    assert select_device("cuda", AUTO)[0].name == "rtx5090"
    monkeypatch.setattr(device, "torch_cuda", lambda: (12, 4))
    assert "RTX 5090 (compute capability 12.0, 31.8 GiB) needs a torch built for CUDA 12.8" in refused("cuda")
    monkeypatch.setattr(device, "torch_cuda", lambda: None)
    assert "built without CUDA" in refused("cuda")
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    assert "torch is not installed" in refused("cuda")


@pytest.mark.parametrize("asked", ["gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cuda:0,1", "", "mps"])
def test_words_that_are_no_device(asked: str) -> None:
    with pytest.raises(RequestError, match="expected auto, cuda, cuda:N or cpu"):
        select_device(asked, AUTO)


def test_pci_order_is_asked_for_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch, RTX4090)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    select_device("cuda", AUTO)
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    select_device("cpu", AUTO)
    assert "CUDA_DEVICE_ORDER" not in os.environ
    select_device("cuda", AUTO)
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_confirm_device(monkeypatch: pytest.MonkeyPatch) -> None:
    confirm_device("cpu")
    install_driver(monkeypatch, RTX4090)
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: False,
        device_count=lambda: 1,
        get_device_name=lambda index: RTX4090.name,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, __spec__=find_spec("torch")))
    confirm_device("cuda:0")
    with pytest.raises(DeviceError, match=r"torch sees 1 GPU\(s\); expected 0 to 0"):
        confirm_device("cuda:1")
    cuda.get_device_name = lambda index: f"{RTX4090.name} MIG 1g.10gb"
    confirm_device("cuda:0")
    cuda.get_device_name = lambda index: RTX3060.name
    with pytest.raises(DeviceError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        confirm_device("cuda:0")
    cuda.is_available = lambda: False
    with pytest.raises(DeviceError, match="torch cannot start CUDA"):
        confirm_device("cuda:0")
    monkeypatch.setattr(device, "torch_cuda", lambda: None)
    with pytest.raises(DeviceError, match="built without CUDA"):
        confirm_device("cuda:0")


# ----------------------------------------------------------------------------------------------- profiles


@pytest.mark.parametrize(
    ("name", "gib", "capability", "profile"),
    [
        ("NVIDIA GeForce RTX 4060", 8.0, (8, 9), "rtx4060"),
        ("NVIDIA GeForce RTX 4060 Ti", 8.0, (8, 9), "rtx4060"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.99, (8, 9), "rtx4060ti-16gb"),
        ("NVIDIA GeForce RTX 4070", 11.99, (8, 9), "rtx4070"),
        ("NVIDIA GeForce RTX 4070 Ti", 11.99, (8, 9), "rtx4070"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 15.99, (8, 9), "rtx4070-ti-super"),
        ("NVIDIA GeForce RTX 4080 SUPER", 15.99, (8, 9), "rtx4080-super"),
        ("NVIDIA GeForce RTX 4080", 15.99, (8, 9), "rtx4080-super"),
        ("NVIDIA GeForce RTX 4090", 23.99, (8, 9), "rtx4090"),
        ("NVIDIA L4", 22.5, (8, 9), "rtx4090"),
        ("NVIDIA L40S", 44.99, (8, 9), "l40s"),
        ("NVIDIA GeForce RTX 5090", 31.84, (12, 0), "rtx5090"),
        ("NVIDIA GeForce RTX 3060", 12.0, (8, 6), "rtx3060-12gb"),
        ("NVIDIA GeForce RTX 3090", 24.0, (8, 6), "rtx3090"),
        ("NVIDIA RTX A6000", 47.99, (8, 6), "a6000"),
        ("NVIDIA A100-SXM4-80GB", 80.0, (8, 0), "a100"),
        ("NVIDIA H100 80GB HBM3", 79.65, (9, 0), "h100"),
        ("NVIDIA H200", 140.4, (9, 0), "h200"),
        # Cards that no profile describes: too much or too little memory, another compute capability.
        ("NVIDIA RTX 4000 Ada Generation", 19.99, (8, 9), "auto"),
        ("NVIDIA RTX 6000 Ada Generation", 47.99, (8, 9), "auto"),
        ("NVIDIA A100-PCIE-40GB", 39.4, (8, 0), "auto"),
        ("NVIDIA GeForce RTX 5070", 11.9, (12, 0), "auto"),
        ("Tesla T4", 14.75, (7, 5), "auto"),
    ],
)
def test_profile_of_card(name: str, gib: float, capability: tuple[int, int], profile: str) -> None:
    chosen, reason = choose_profile(card(name, gib, capability))
    assert chosen.name == profile
    assert name in reason
    assert "\n" not in reason
    assert chosen.capability == capability
    assert chosen.vram_gb is None or chosen.vram_gb >= gib * 0.97


@pytest.mark.parametrize(
    ("gib", "capability", "expected"),
    [
        (19.99, (8, 9), ("fp8", "bf16", False, False, "bf16")),
        (39.4, (8, 0), ("int8", "bf16", True, True, "bf16")),
        (23.0, (12, 0), ("fp8", "bf16", False, True, "bf16")),
        (14.75, (7, 5), ("int8", "fp16", False, False, "fp32")),
    ],
)
def test_generic_profile(gib: float, capability: tuple[int, int], expected: tuple[object, ...]) -> None:
    p, reason = choose_profile(card("NVIDIA X", gib, capability))
    kept = (p.quantization, p.dtype, p.text_encoder.stay_on_gpu, p.vae.stay_on_gpu, p.vae.dtype)
    assert kept == expected
    assert p.device == "cuda"
    assert "no profile describes" in reason


def test_no_card() -> None:
    assert choose_profile(None)[0] == load_profile("cpu")
