"""Predicted against measured memory: whole runs of the program under a hard cap, a process each.

    t2v weights synth DIRECTORY --model wan2.1-t2v-14b-4step-fp8
    python -m tests.gpu.measure_memory DIRECTORY --runs 480x832x81@6 720x1280x49@8

A run is HEIGHTxWIDTHxFRAMES@VRAM[:RAM], GB of 2^30 bytes. One denoise step is made unless --steps says more:
the second takes what the first took. The cap is the program's own: torch fails beyond the budget.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPT = "A man with short gray hair plays a red electric guitar."


def run(arguments: list[str]) -> tuple[list[tuple[float, dict[str, Any]]], str, float]:
    """The events of one run with their times after its start, what it said, and its seconds."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "entrypoint", "generate", "--json", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    events = [(time.perf_counter() - began, json.loads(line)) for line in process.stdout]
    said = process.stderr.read()
    process.wait()
    return events, said, time.perf_counter() - began


def of_kind(events: list[tuple[float, dict[str, Any]]], kind: str) -> list[dict[str, Any]]:
    """The events called `kind`."""
    return [event for _, event in events if event["event"] == kind]


def row(given: argparse.Namespace, one: str) -> str:
    """Make one run and tell of it in a line of a table."""
    size, _, budget = one.partition("@")
    height, width, frames = size.split("x")
    vram, _, ram = budget.partition(":")
    arguments = ["--model", given.model, "--weights", str(given.weights), "--prompt", PROMPT]
    arguments += ["--height", height, "--width", width, "--frames", frames, "--cache", given.cache]
    arguments += ["--steps", str(given.steps), "--accept-nonstandard"] if given.steps != 4 else []
    arguments += ["--vram", vram] if vram else []
    arguments += ["--ram", ram] if ram else []
    arguments += ["--output", "/tmp/measured.mp4", "--overwrite", *given.more]
    events, said, seconds = run(arguments)
    plans, results = of_kind(events, "plan"), of_kind(events, "result")
    if not plans or not results:
        return f"| {one} | FAILED | {said.strip()[-600:]} |"
    plan, result = plans[0], results[0]
    predicted = plan["predicted"]
    measured = {phase: peak for phase, peak in result["peak_memory"].items() if peak["vram"] is not None}
    cells = []
    for phase in ("text", "denoise", "decode"):
        expected = max(
            predicted["vram"].get(phase, 0), predicted["vram"].get("entry", 0) * (phase == "denoise")
        )
        found = measured.get(phase, {"vram": 0})["vram"]
        cells.append(
            f"{expected / 2**30:.2f} / {found / 2**30:.2f} ({100 * (expected / max(found, 1) - 1):+.1f} %)"
        )
    peak = max((one["vram"] for one in measured.values()), default=1)
    expected = max(predicted["vram"].values())
    ram_found = max(one["ram"] for one in result["peak_memory"].values())
    ram_expected = max(predicted["ram"].values())
    placement = plan["placement"]
    where = f"{len(placement['resident'])}/{len(placement['cached'])} {placement['rung']}"
    first = next((at for at, event in events if event.get("phase") == "text"), 0.0)
    timings = result["timings"]
    overall = f"{expected / 2**30:.2f} / {peak / 2**30:.2f} ({100 * (expected / peak - 1):+.1f} %)"
    off = 100 * (ram_expected / ram_found - 1)
    host = f"{ram_expected / 2**30:.2f} / {ram_found / 2**30:.2f} ({off:+.1f} %)"
    by_phase = " ".join(f"{k} {v['ram'] / 2**30:.2f}" for k, v in result["peak_memory"].items())
    guessed = " ".join(f"{k} {v / 2**30:.2f}" for k, v in predicted["ram"].items())
    host += f"<br>{by_phase}<br>predicted {guessed}"
    notes = "; ".join(event["message"] for event in of_kind(events, "warning"))
    times = " ".join(
        f"{phase} {timings.get(phase, 0):.2f}" for phase in ("load", "text", "denoise", "decode", "save")
    )
    return (
        f"| {given.model[-4:]} {one} | {where} | {overall} | {' | '.join(cells)} | {host} | "
        f"{times} total {seconds:.1f}, text known after {first:.1f} | {notes} |"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--model", default="wan2.1-t2v-14b-4step-fp8")
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--cache", default="none")
    parser.add_argument("--more", nargs="*", default=[], help="further options of generate")
    given = parser.parse_args()
    print("| run | resident/cached, rung | peak VRAM | text | denoise | decode | RAM | seconds | notes |")
    print("|---|---|---|---|---|---|---|---|---|")
    for one in given.runs:
        print(row(given, one), flush=True)


if __name__ == "__main__":
    main()
