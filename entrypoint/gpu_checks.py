"""The checks of `t2v doctor` about GPUs: driver, cards, free memory and who holds it, products and attention.

The last two run in a process of their own (`entrypoint.kernel_trials`): a kernel that crashes takes that one
down, and torch is not loaded here.
"""

import os
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoint.cache import choose_cache
from entrypoint.checks import advice_for_no_driver
from entrypoint.findings import Finding, Scene, Table, fail, ok, split_advice, warn
from entrypoint.table import count, size
from entrypoint.trial_runs import run_trials
from runtime.device import BLACKWELL, BLACKWELL_CUDA, Gpu, choose_profile, torch_cuda
from runtime.errors import DeviceError

if TYPE_CHECKING:
    from runtime.tuning_file import Attention, Product

NVIDIA = "0x10de"
DISPLAY_CLASS = "0x03"  # of PCI: display controllers, among them 3D controllers without a screen
LITTLE_FREE = 0.8
"""Of a card's memory; with less free, who holds the rest is worth a line."""
LEAST_FREE = 4 << 30
"""Bytes below which no plan of the 14B model fits."""
OLDEST = (7, 5)
"""Compute capability below which newer builds of torch have no kernels, and nothing here was meant to run."""


def check_driver(scene: Scene) -> Iterator[Finding]:
    """The driver, and whether its CUDA is new enough for the installed torch."""
    stock = scene.stock
    if stock.reason is not None and not stock.gpus:
        found, fix = split_advice(stock.reason)
        if "there is no NVIDIA driver" not in found:
            yield fail("driver", found, fix, DeviceError)
        elif cards() or Path("/dev/dxg").exists():
            yield fail("driver", f"{found}, and there is an NVIDIA GPU", advice_for_no_driver(), DeviceError)
        else:
            fix = "Without them only the CPU computes, which is enough for --model demo."
            yield warn("driver", "no NVIDIA GPU and no driver", fix)
        return
    newest = stock.driver_cuda
    supports = "" if newest is None else f", supports CUDA up to {newest[0]}.{newest[1]}"
    found = f"NVIDIA {stock.gpus[0].driver}{supports}"
    built = torch_cuda()
    if built is not None and newest is not None and built[0] > newest[0]:
        found += f", and torch was built for {built[0]}.{built[1]}"
        yield fail("driver", found, "Update the driver, or use an image with an older CUDA.", DeviceError)
    else:
        yield ok("driver", found)
    yield from _image(scene)


def cards(root: Path = Path("/sys/bus/pci/devices")) -> int:
    """How many NVIDIA GPUs the PCI bus shows, driver or not; containers see it too."""
    found = 0
    for device in sorted(root.iterdir()) if root.is_dir() else ():
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:  # a device that has just gone
            continue
        found += vendor == NVIDIA and kind.startswith(DISPLAY_CLASS)
    return found


def _image(scene: Scene) -> Iterator[Finding]:
    """What the image that this runs in says of driver and card; nothing outside of one."""
    if scene.gpu is None:
        return
    from entrypoint.surroundings import Need, examine

    need = Need(f"cuda:{scene.gpu.index}", on_purpose=False, embedded=True)
    for finding in examine(need):
        if finding.name in ("driver", "architecture"):
            found, fix = split_advice(finding.message)
            if finding.error is not None:
                yield fail("image", found, fix, finding.error)
            else:
                yield warn("image", found, fix)


def check_gpus(scene: Scene) -> Iterator[Finding]:
    """Every card: the profile that suits it, its free memory, and what keeps it from being used."""
    built = torch_cuda()
    for gpu in scene.stock.gpus:
        name = f"cuda:{gpu.index}"
        profile, reason = choose_profile(gpu)
        if gpu.capability >= BLACKWELL and built is not None and built < BLACKWELL_CUDA:
            found = f"{gpu} needs a torch built for CUDA 12.8 or newer, this one is for {built[0]}.{built[1]}"
            yield fail(name, found, "Use the cu128 image, or install such a torch.", DeviceError)
        elif gpu.capability < OLDEST:
            fix = "Try --model demo on it first, or use a card of the RTX 20 series or newer."
            yield warn(name, f"{gpu} is older than the cards that this was made for", fix)
        else:
            taken = " (taken by default)" if gpu == scene.gpu and len(scene.stock.gpus) > 1 else ""
            yield ok(name, f"{reason}, weights {profile.quantization}{taken}")
        yield _free_memory(gpu)


def _free_memory(gpu: Gpu) -> Finding:
    name = f"cuda:{gpu.index} memory"
    found = f"{size(gpu.free)} free of {size(gpu.total)}"
    if gpu.free >= LITTLE_FREE * gpu.total:
        return ok(name, found)
    users = ", ".join(holders(gpu)) or "nobody that shows (a display, or processes outside of this container)"
    found = f"{found}; held by {users}"
    if gpu.free < LEAST_FREE:
        return warn(
            name, found, f"End them: with less than {size(LEAST_FREE)} free the 14B model is refused."
        )
    return warn(name, found, "End them for more speed: the plan takes what is free.")


def holders(gpu: Gpu) -> list[str]:
    """Who holds a card's memory, the largest first: `python (pid 4711, 9.3 GiB)`; [] where nobody shows."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid.encode())
        found: dict[int, int] = {}
        for listing in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
            for process in getattr(pynvml, listing)(handle):
                found[process.pid] = max(found.get(process.pid, 0), process.usedGpuMemory or 0)
    except (pynvml.NVMLError, AttributeError):
        return []
    finally:
        pynvml.nvmlShutdown()
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return [f"{_process(pid)} (pid {pid}{f', {size(held)}' if held else ''})" for pid, held in ordered]


def _process(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip() or "a process"
    except OSError:  # of another container, or gone
        return "a process"


def check_kernels(scene: Scene) -> Iterator[Finding]:
    """8-bit products and attention, by running every way of them on the card."""
    if scene.gpu is None or torch_cuda() is None:
        return
    trials = run_trials(f"cuda:{scene.gpu.index}")
    if "error" in trials:
        fix = "See whether nvidia-smi works; update the driver, or use an image with an older CUDA."
        yield fail("8-bit kernels", f"torch cannot compute on the card ({trials['error']})", fix, DeviceError)
        return
    yield _products(scene.gpu, trials)
    if "attention" in trials:
        yield _attention(trials["attention"], trials.get("tokens"))


def _products(gpu: Gpu, trials: dict[str, Any]) -> Finding:
    words, lacking = [], []
    for form, ways in trials["ways"].items():
        working = [way for way, works in ways.items() if works]
        words.append(f"{form}: {', '.join(working) or 'none'}")
        if not working:
            lacking.append(form)
    found = "; ".join(words)
    profile, _ = choose_profile(gpu)
    if profile.quantization in lacking:
        fix = f"Use bf16 weights, or another torch: no way to multiply {profile.quantization} is right."
        return fail("8-bit kernels", found, fix, DeviceError)
    if profile.quantization in trials["ways"] and _only_dequantized(trials["ways"][profile.quantization]):
        fix = "Use a newer torch, or image cu128: weights are widened before each product, which is slow."
        return warn("8-bit kernels", found, fix)
    return ok("8-bit kernels", f"{found}; the first that works is used, or what t2v tune found faster")


def _only_dequantized(ways: dict[str, bool]) -> bool:
    return [way for way, works in ways.items() if works] == ["dequantized"]


ATTENTION = ("ATTENTION", "BITS", "DISTANCE", "MS", "HERE")


def attention_row(
    name: str, bits: int, distance: float | None, ms: float | None, state: str
) -> tuple[str, ...]:
    """A row under ATTENTION, that of `t2v tune` too; - for what nobody knows."""
    far = "-" if distance is None else f"{distance:.4f}"
    return name, str(bits), far, "-" if ms is None else f"{ms:.3f}", state


def _attention(found: list[dict[str, Any]], tokens: int | None) -> Finding:
    """Which attention is right on the card, as its trials have shown, and which is fastest."""
    ranked = sorted(found, key=lambda one: (not one["ok"], one["ms"] is None, one["ms"] or 0.0))
    rows = [
        attention_row(
            *(one["name"], one["bits"], one["distance"], one["ms"]), "right" if one["ok"] else one["reason"]
        )
        for one in ranked
    ]
    table = Table(ATTENTION, tuple(rows), right=(1, 2, 3))
    fast = [one for one in ranked if one["ok"] and one["bits"] <= 16]
    if not fast:
        words = "of all ways to compute attention only the slowest is right here"
        fix = "Use a newer torch, or the image for this card: a video would take hours."
        return replace(warn("attention", words, fix), table=table)
    best = fast[0]
    timed = "" if best["ms"] is None else f", fastest {best['name']}: {best['ms']:.2f} ms for {tokens} tokens"
    eight = sum(one["bits"] == 8 for one in fast)
    return replace(
        ok("attention", f"{count(len(fast), 'way')} right here, {eight} in 8 bits{timed}"), table=table
    )


def check_tuning(scene: Scene) -> Iterator[Finding]:
    """What was measured on this card before, and what gave wrong numbers."""
    if scene.gpu is None:
        return
    from runtime.tuning import Store
    from runtime.tuning_file import setting_of

    cache = choose_cache(os.environ.get("T2V_CACHE") or None)
    if cache is None:
        yield ok("tuning", "nothing is kept (--cache none): every run measures anew")
        return
    store = Store(cache, setting_of(scene.gpu))
    known = store.content
    notes = store.take_notes()
    table = None
    if known.attention or known.products:
        rows = [_size_row(one, store.avoided()) for one in known.attention]
        rows += [_product_row(one) for one in known.products]
        table = Table(("REMEMBERED", "USED", "MS", "SINCE"), tuple(rows), right=(2,))
    if known.avoided:
        words = "; ".join(f"{one.name} since {one.date}: {one.reason}" for one in known.avoided)
        fix = "Nothing must be done; `t2v tune --forget` tries them again."
        yield replace(warn("tuning", f"left out after wrong numbers: {words}", fix), table=table)
    elif notes:
        yield warn(
            "tuning", notes[0].rstrip("."), "Run `t2v tune`, or let the next run measure what it needs."
        )
    elif table is None:
        yield ok("tuning", "nothing measured yet: a run measures what it needs, t2v tune all of it")
    else:
        sizes, products = len(known.attention), len(known.products)
        words = f"{count(sizes, 'size')} of attention and {count(products, 'product')} measured: {store.path}"
        yield replace(ok("tuning", words), table=table)


def _size_row(one: "Attention", avoided: Collection[str]) -> tuple[str, ...]:
    heads = f"{one.heads} heads of {one.head_dim}, {one.dtype}"
    what = f"attention, {one.tokens} tokens on {one.keys} keys ({heads})"
    ms = next((entry.ms for entry in one.entries if entry.name == one.won), None)
    won = f"{one.won} (left out)" if one.won in avoided else one.won
    return what, won, "-" if ms is None else f"{ms:.2f}", one.date


def _product_row(one: "Product") -> tuple[str, ...]:
    tiles = "" if one.tiles is None else f" {one.tiles.rows}x{one.tiles.columns}x{one.tiles.depth}"
    what = f"{one.dtype} product {one.depth} -> {one.columns}, {one.rows} tokens"
    ms = one.ms.get(one.way)
    return what, one.way + (tiles if one.way == "fused" else ""), "-" if ms is None else f"{ms:.2f}", one.date
