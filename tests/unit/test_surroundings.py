"""The wrong machine around an image: one sentence, the right exit code, and the right advice."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from entrypoint import surroundings
from entrypoint.generate import Where
from entrypoint.surroundings import Image, Need, check, examine, images, need_of, numbers
from runtime.device import Gpu, Inventory
from runtime.errors import DeviceError, FourstepError, OutputError, PlanError, WeightsError
from runtime.memory.ram import Ram
from runtime.profiles import load_manifest
from tests.conftest import Run

DEMO_RUN = Need(device="cpu", on_purpose=True, embedded=True)


def card(
    driver: str = "580.65.06", capability: tuple[int, int] = (8, 9), name: str = "GeForce RTX 4070"
) -> Gpu:
    return Gpu(0, name, "GPU-1", 12 << 30, 11 << 30, capability, driver)


class Place(NamedTuple):
    """A machine that can be made wrong."""

    set_gpu: Callable[..., None]
    set_image: Callable[[str | None], None]
    weights: Path
    outputs: Path
    cache: Path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The inside of image cu128 on a good machine."""
    weights, outputs, cache = (tmp_path / name for name in ("weights", "outputs", "cache"))
    for directory in (weights, outputs, cache):
        directory.mkdir()
    (weights / "config.json").write_text("{}")

    def set_image(tag: str | None) -> None:
        described = tmp_path / "image.json"
        described.unlink(missing_ok=True)
        if tag is not None:
            described.write_text(json.dumps({"tag": tag, "revision": "0" * 40}))

    def set_gpu(*gpus: Gpu, reason: str | None = None) -> None:
        monkeypatch.setattr(surroundings, "inventory", lambda: Inventory(gpus, (13, 0), reason))

    monkeypatch.setattr(surroundings, "DESCRIPTION", tmp_path / "image.json")
    monkeypatch.setattr(surroundings, "WEIGHTS", weights)
    monkeypatch.setattr(surroundings, "OUTPUTS", outputs)
    monkeypatch.setattr(surroundings, "SHARED_MEMORY", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(surroundings, "host_ram", lambda: Ram(32 << 30, 30 << 30, "host"))
    set_image("cu128")
    set_gpu(card())
    return Place(set_gpu, set_image, weights, outputs, cache)


def gpu_run(place: Place, **changes: Any) -> Need:
    asked: dict[str, Any] = {"device": "cuda:0", "on_purpose": False, "embedded": False}
    return Need(**asked | {"weights": place.weights} | changes)


def test_a_good_machine_has_no_findings(place: Place) -> None:
    assert list(examine(gpu_run(place))) == []
    assert list(examine(DEMO_RUN)) == []


def test_outside_of_an_image_nothing_is_found(place: Place) -> None:
    place.set_image(None)
    place.set_gpu(reason="there is no NVIDIA driver")
    (place.weights / "config.json").unlink()
    assert list(examine(gpu_run(place))) == []


def refusal(need: Need, kind: type[FourstepError]) -> str:
    with pytest.raises(kind) as caught:
        check(need)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


def test_no_gpu_is_no_silent_cpu(place: Place) -> None:
    place.set_gpu(reason="there is no NVIDIA driver; start it with --gpus all")
    message = refusal(gpu_run(place, device="cpu"), DeviceError)
    assert "--gpus all" in message and "--device cpu" in message
    check(gpu_run(place, device="cpu", on_purpose=True))
    check(gpu_run(place, device="cpu", embedded=True))


@pytest.mark.parametrize(
    ("tag", "driver", "capability", "advice"),
    [
        ("cu124", "580.65.06", (12, 0), "use image cu128"),  # RTX 50 in the image without its kernels
        ("cu128", "470.256.02", (8, 6), "update it to 525.60.13"),  # too old for any image
        ("cu128", "580.65.06", (6, 1), "use image cu124"),  # Pascal: newer CUDA has no code for it
        ("cu128", "580.65.06", (3, 7), "--device cpu"),
    ],
)
def test_the_right_image_is_named(
    place: Place, tag: str, driver: str, capability: tuple[int, int], advice: str
) -> None:
    place.set_image(tag)
    place.set_gpu(card(driver, capability))
    message = refusal(gpu_run(place), DeviceError)
    assert advice in message and tag in message


def test_a_newer_cuda_names_the_image_that_the_driver_starts(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a CUDA 13 image would: its major version starts on 580 and newer only."""
    newer = Image(
        **(vars(images()[-1]) | {"tag": "cu130", "driver": "580.65.06", "minimum_driver": "580.65.06"})
    )
    table = (*images(), newer)
    monkeypatch.setattr(surroundings, "images", lambda: table)
    place.set_image("cu130")
    place.set_gpu(card("570.133.20"))
    message = refusal(gpu_run(place), DeviceError)
    assert "570.133.20" in message and "580.65.06" in message and "use image cu128" in message


def test_a_driver_between_minimum_and_native_is_told_and_not_refused(place: Place) -> None:
    place.set_gpu(card("550.120"))
    check(gpu_run(place))
    (found,) = examine(gpu_run(place))
    assert found.name == "driver" and found.error is None
    assert (
        "550.120" in found.message
        and "570.26" in found.message
        and "image cu124 was made for it" in found.message
    )
    place.set_gpu(card("535.104.05"))
    (found,) = examine(gpu_run(place))
    assert "no image was made for it" in found.message


def test_empty_weights(place: Place) -> None:
    (place.weights / "config.json").unlink()
    message = refusal(gpu_run(place), WeightsError)
    assert (
        str(place.weights) in message and "docker compose run pull" in message and "--model demo" in message
    )
    check(gpu_run(place, embedded=True))
    check(gpu_run(place, weights=place.outputs))  # a directory of one's own: the loader knows what it lacks


def test_a_volume_that_cannot_be_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests may run as root, whom no mode stops; what the program asks is os.access.
    allowed = os.access
    for directory, fatal_on_cpu in ((place.outputs, True), (place.cache, False)):
        monkeypatch.setattr(os, "access", lambda path, mode, no=directory: path != no and allowed(path, mode))
        message = refusal(gpu_run(place), OutputError)
        assert str(directory) in message and f"user {os.getuid()}:{os.getgid()}" in message
        findings = list(examine(DEMO_RUN))
        assert [finding.error is not None for finding in findings] == [fatal_on_cpu]
    monkeypatch.setattr(os, "access", lambda path, mode: path != place.outputs and allowed(path, mode))
    check(gpu_run(place, output=Path("/elsewhere/fox.mp4")))
    refusal(gpu_run(place, output=Path("fox.mp4")), OutputError)  # relative names land on the volume


def test_too_little_ram(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "host_ram", lambda: Ram(3 << 30, 2 << 30, "cgroup v2 /docker/x"))
    for wsl, advice in ((True, ".wslconfig"), (False, "memory limit")):
        monkeypatch.setattr(surroundings, "is_wsl", lambda wsl=wsl: wsl)
        message = refusal(gpu_run(place), PlanError)
        assert "3.0 GiB" in message and "4.0 GiB" in message and advice in message
    check(gpu_run(place, embedded=True))


def test_little_shared_memory_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    one = os.statvfs("/")
    small = os.statvfs_result((4096, 4096, 256, 256, 256, *tuple(one)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    check(gpu_run(place))
    (found,) = examine(gpu_run(place))
    assert found.name == "shm" and "1.0 MiB" in found.message and "--shm-size" in found.message


def test_what_a_run_needs() -> None:
    demo, big = load_manifest("demo"), load_manifest("wan2.1-t2v-14b-4step-fp8")

    def asked(profile: str, device: str) -> Where:
        return Where(None, None, profile, device, None, False, False)

    assert need_of(asked("cpu", "auto"), "cpu", big).on_purpose
    assert need_of(asked("auto", "cpu"), "cpu", big).on_purpose
    assert not need_of(asked("auto", "auto"), "cpu", big).on_purpose
    assert need_of(asked("auto", "auto"), "cuda:0", demo).embedded
    assert not need_of(asked("auto", "auto"), "cuda:0", big).embedded


def test_versions_compare_as_numbers() -> None:
    assert numbers("525.60.13") < numbers("525.147.05") < numbers("550.54.14") < numbers("1000.1")


def test_a_run_is_refused_before_anything_loads(place: Place, t2v: Run) -> None:
    """Through the program: the default model, in an image, on a machine without a GPU."""
    place.set_gpu(reason="there is no NVIDIA driver (libnvidia-ml.so.1 was not found)")
    result = t2v("--prompt", "a fox")
    assert result.exit_code == DeviceError.exit_code
    assert "No GPU can be used" in result.stderr
