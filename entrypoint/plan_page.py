"""How a plan is shown: a table with a picture of each phase's memory, or JSON."""

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from entrypoint.table import GAP, aligned, count, duration, size
from runtime.memory.costs import CUDA_CONTEXT
from runtime.memory.machine import Machine
from runtime.memory.plan import Plan
from runtime.schema import ModelManifest, Profile

MARKS = {
    "resident blocks": "#",
    "slots": "=",
    "embeddings": "e",
    "small tensors": ":",
    "text encoder": "t",
    "text keys and values": "k",
    "activations": "~",
    "VAE": "v",
    "VAE and frames": "v",
    "reserve": "-",
}
LEGEND = (
    "# resident blocks, = slots, t text encoder, k its keys and values, e embeddings, ~ activations, v VAE, "
    ": other weights, - reserve"
)
PIPE_WIDTH = 100  # characters, where there is no terminal to ask
LEAST_BAR, MOST_BAR = 16, 60
LABEL = 9  # of the lines below the table
FULL = 3  # a bar ends at the budget, unless the highest peak is less than one part in so many of it


@dataclass(frozen=True)
class Subject:
    """What a plan is about.

    weights: the directory whose headers it went by; None: the manifest's sizes. why: how the profile was
    chosen, None where it was named.
    """

    manifest: ModelManifest
    profile: Profile
    machine: Machine
    weights: Path | None
    why: str | None = None


def as_json(plan: Plan, subject: Subject) -> list[str]:
    """One line."""
    machine = subject.machine
    about = {
        "event": "plan",
        "model": subject.manifest.name,
        "quantization": plan.inputs.sizes.quantization,
        "sizes_from": "manifest" if subject.weights is None else str(subject.weights),
        "profile": subject.profile.name,
        "profile_reason": subject.why,
        "gpu": None if machine.gpu is None else machine.gpu.name,
        "disk": {"bytes_per_second": machine.disk, "source": machine.disk_source},
    }
    return [json.dumps(about | plan.as_dict())]


def as_text(plan: Plan, subject: Subject, width: int | None = None) -> list[str]:
    """The page for people, `width` characters wide: that of the terminal if None."""
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH
    job, blocks = plan.job, plan.blocks
    stored = plan.inputs.sizes.blocks.count - len(blocks.resident) - len(blocks.cached)
    steps = count(job.steps, "step") + ("" if job.forwards == 1 else " of two forwards")
    lines = [f"Prediction for a video of {job} in {steps}", ""]
    lines += _labelled(width, _about(plan, subject))
    lines += ["", *_table(plan, width), ""]
    where = f"{len(blocks.resident)} resident (#)"
    if plan.device == "cuda":
        where += f", {len(blocks.cached)} cached in RAM (+)"
    where += f", {stored} read from disk each time (.)"
    where += f"; {count(blocks.slots, 'slot')} (=)" if blocks.slots else ""
    ring = f"{size(plan.ring.nbytes)} for staging, " + ("pinned" if plan.ring.pinned else "not pinned")
    below = [
        ("blocks", plan.strip(min(40, width - LABEL))),
        ("", where),
        ("text", _text(plan)),
        *([("", encoder)] if (encoder := _encoder(plan)) else []),
        *([("attention", f"{plan.attention}, in 8 bits")] if plan.attention else []),
        ("ring", f"{ring}; {size(plan.disk_bytes)} read from disk for one video"),
        ("decode", f"rung {plan.rung.name}; the blocks {'leave' if plan.release_for_decode else 'stay'}"),
        ("why", plan.reason),
        ("bars", LEGEND),
        ("speeds", _speeds(plan, subject)),
    ]
    return lines + _labelled(width, below)


def _text(plan: Plan) -> str:
    """Where the blocks get keys and values of the text from."""
    if not plan.text_kv:
        return "its keys and values are made in each step"
    kept = plan.parts["denoise"]["text keys and values"]
    return f"its keys and values are made in the first step and stay: {size(kept)} (k)"


def _encoder(plan: Plan) -> str:
    """Where the text encoder is between prompts; empty where nobody needs it."""
    if plan.text == "resident":
        return "its encoder stays " + ("on the GPU" if plan.device == "cuda" else "in RAM")
    if plan.text == "cached":
        pinned = plan.pinned - plan.ring.nbytes
        beside = f", up to {size(pinned)} of it pinned" if plan.ring.pinned else ""
        return f"its encoder stays in RAM once a prompt was read{beside}"
    return "its encoder is read from disk for each prompt" if plan.text == "streamed" else ""


def _about(plan: Plan, subject: Subject) -> list[tuple[str, str]]:
    budget, machine = plan.budget, subject.machine
    source = "as its manifest says" if subject.weights is None else f"from the headers in {subject.weights}"
    lines = [("model", f"{subject.manifest.name}, {source}")]
    if plan.device == "cuda":
        here = "not in this machine" if machine.gpu is None else f"{machine.gpu}"
        lines.append(
            ("card", subject.why or f"{subject.profile.name}: {subject.profile.description}; {here}")
        )
        less = f"less {size(CUDA_CONTEXT)} for CUDA"
        lines.append(("budget", f"{size(budget.vram)} of GPU memory: {budget.vram_source}, {less}"))
        lines.append(("", f"{size(budget.ram)} of RAM: {budget.ram_source}"))
        lines.append(("", f"{size(budget.pinned)} pinned: {budget.pinned_source}"))
    else:
        lines.append(("device", f"the CPU ({subject.why or f'profile {subject.profile.name}'})"))
        lines.append(("budget", f"{size(budget.ram)} of RAM: {budget.ram_source}"))
    return lines


def _speeds(plan: Plan, subject: Subject) -> str:
    speeds = plan.inputs.speeds
    card = f"{'measured' if speeds.measured else 'predicted'} ({speeds.source})"
    disk = f"disk {speeds.disk / 1e9:.1f} GB/s, " + (
        f"measured ({subject.machine.disk_source})" if speeds.disk_known else "assumed"
    )
    return f"{card}; {disk}"


def _labelled(width: int, lines: list[tuple[str, str]]) -> list[str]:
    """Each text behind its label, wrapped under itself."""
    shown = []
    for label, text in lines:
        first, *rest = textwrap.wrap(text, max(width - LABEL, 30)) or [""]
        shown.append(f"{label.ljust(LABEL)}{first}".rstrip())
        shown += [" " * LABEL + more for more in rest]
    return shown


def _table(plan: Plan, width: int) -> list[str]:
    """Phase by phase: memory, time, what limits it, and the bar."""
    cuda = plan.device == "cuda"
    phases = list(dict.fromkeys([*plan.seconds, *plan.parts]))
    phases.sort(key=("load", "text", "entry", "denoise", "decode", "mp4").index)
    rows = []
    for phase in phases:
        estimate, there = plan.seconds.get(phase), phase in plan.parts
        rows.append(
            [
                phase,
                *([size(plan.peaks[phase]) if there else ""] if cuda else []),
                size(plan.host[phase]) if there else "",
                duration(estimate.seconds) if estimate else "",
                estimate.limit if estimate else "",
            ]
        )
    peaks = [size(plan.vram)] if cuda else []
    rows.append(["all", *peaks, size(plan.ram), duration(plan.total_seconds), ""])
    header = ["PHASE", *(["GPU"] if cuda else []), "RAM", "TIME", "LIMIT"]
    numbers = [1, 2, 3] if cuda else [1, 2]
    lines = aligned(header, rows, right=numbers)
    column = max(map(len, lines))
    room = min(width - column - 2 * len(GAP) - 1, MOST_BAR)
    if room < LEAST_BAR:
        return lines
    full, end = _scale(plan)
    bars = [_bar(plan.parts[phase], full, room) + end if phase in plan.parts else "" for phase in phases]
    title = f"0 {'.' * max(room - len(size(full)) - 4, 1)} {size(full)}"
    return [
        f"{line.ljust(column)}{GAP}{bar}".rstrip()
        for line, bar in zip(lines, [title, *bars, ""], strict=True)
    ]


def _scale(plan: Plan) -> tuple[int, str]:
    """Bytes of a full bar, and the mark at its end: the budget, or the highest peak if that is far below."""
    budget = plan.budget.vram if plan.device == "cuda" else plan.budget.ram
    highest = max(sum(parts.values()) for parts in plan.parts.values())
    return (highest, "") if FULL * highest < budget else (budget, "|")


def _bar(parts: Mapping[str, int], full: int, width: int) -> str:
    """Parts side by side, `full` bytes being `width` characters; what is left is free."""
    drawn, reached = "", 0
    for name, nbytes in parts.items():
        reached += nbytes
        drawn += MARKS[name] * (round(reached * width / full) - len(drawn))
    return drawn[:width].ljust(width)
