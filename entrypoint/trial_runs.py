"""Starting `entrypoint.kernel_trials` as a process of its own, and reading what it said before it ended.

A backend that ends the process, or makes it end itself, is one that cannot be used here; the rest is tried in
a new one.
"""

import json
import os
import subprocess
import sys
from typing import Any

from entrypoint.findings import sentence
from runtime.schema import project_root

TRIAL_SECONDS = 180
MOST_STARTS = 4
"""Each takes seconds: torch and CUDA start anew."""

NOT_TRIED = "not tried, after others had ended the trials"


def run_trials(device: str, seconds: float = TRIAL_SECONDS) -> dict[str, Any]:
    """What the trials found, or {"error": why they did not.

    {"ways": {format: {way: right}}, "attention": [{name, bits, ok, distance, reason, ms}], "tokens": int};
    the last two only if it came to them; ms None where it was not timed.
    """
    answer: dict[str, Any] = {}
    for _ in range(MOST_STARTS):
        before = len(answer.get("attention", ()))
        said, end = _start(device, answer.get("attention", []), seconds)
        trying = _take(said, answer)
        error = answer.pop("error", None)
        if "ways" not in answer:
            return {"error": error or end}
        if trying is not None and trying != "times":
            answer["attention"].append(_refused(trying, f"its trial ended the process ({end})"))
        elif trying == "times" or any("done" in line for line in said):
            break
        if len(answer.get("attention", ())) == before:
            break  # it ends before it begins: a new start would do so too
    return _complete(answer)


def _start(device: str, tried: list[dict[str, Any]], seconds: float) -> tuple[list[dict[str, Any]], str]:
    """The objects that a process has printed, and how it ended."""
    path = os.pathsep.join(filter(None, (str(project_root()), os.environ.get("PYTHONPATH"))))
    names = [",".join(one["name"] for one in tried), ",".join(one["name"] for one in tried if one["ok"])]
    command = [sys.executable, "-m", "entrypoint.kernel_trials", device, *(names if tried else ())]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        text = out if isinstance(out, str) else out.decode(errors="replace")
        return _objects(text), sentence(str(error)).rstrip(".") if not text else f"more than {seconds:.0f} s"
    except OSError as error:
        return [], sentence(str(error)).rstrip(".")
    last = done.stderr.strip().splitlines()
    end = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    found = _objects(done.stdout)
    if done.returncode == 0 and not found:
        return [], "it printed no object"
    return found, f"{end}{f', {last[-1][:200]}' if last else ''}"


def _objects(text: str) -> list[dict[str, Any]]:
    """The lines that are JSON objects; a library may print others between them."""
    found = []
    for line in text.splitlines():
        try:
            one = json.loads(line)
        except ValueError:
            continue
        if isinstance(one, dict):
            found.append(one)
    return found


def _take(said: list[dict[str, Any]], answer: dict[str, Any]) -> str | None:
    """Add what was said to the answer; the name of what was being tried when it ended."""
    trying = None
    for line in said:
        for name in ("ways", "backends", "times", "tokens", "error"):
            if name in line:
                answer[name] = line[name]
        if "backends" in line:
            answer.setdefault("attention", [])
        if "attention" in line:
            answer["attention"].append(line["attention"])
        trying = line.get("trying")  # any other line ends what was tried
    return trying


def _complete(answer: dict[str, Any]) -> dict[str, Any]:
    """With bits and times beside their backends, and with those that nobody came to."""
    bits, times = answer.pop("backends", {}), answer.pop("times", {})
    if "attention" not in answer:
        return answer
    there = {one["name"] for one in answer["attention"]}
    answer["attention"] += [_refused(name, NOT_TRIED) for name in bits if name not in there]
    for one in answer["attention"]:
        one |= {"bits": bits[one["name"]], "ms": times.get(one["name"])}
    return answer


def _refused(name: str, reason: str) -> dict[str, Any]:
    return {"name": name, "ok": False, "distance": None, "reason": reason}
