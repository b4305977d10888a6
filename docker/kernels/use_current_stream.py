"""Have kernels launch on torch's current stream, as the fourth argument of `<<<grid, block[, shared]>>>`.

    python use_current_stream.py DIRECTORY...

A launch that names no stream goes to the legacy default stream. A program that computes on another one races
with it, and the result is garbage that is finite, so nothing notices. Edits .cu, .cuh and .h files in place.

A patch that silently stops matching is worse than none, so this one ends with exit 1 when a directory holds
no launch at all, when a launch has other than two or three arguments, or when brackets are left unread.
"""

import re
import sys
from pathlib import Path

SUFFIXES = (".cu", ".cuh", ".h")
STREAM = "at::cuda::getCurrentCUDAStream()"
INCLUDE = "#include <ATen/cuda/CUDAContext.h>"
LAUNCH = re.compile(r"<<<(.*?)>>>", re.DOTALL)
LONGEST = 400  # characters of a launch's arguments; beyond that the brackets belong to something else


def arguments(text: str) -> list[str]:
    """The arguments between `<<<` and `>>>`, split at commas that stand outside of brackets."""
    parts, depth, begun = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            parts.append(text[begun:place])
            begun = place + 1
    return [part.strip() for part in (*parts, text[begun:])]


def with_stream(launch: str) -> str:
    """A launch's arguments with the current stream as the fourth. ValueError for what is not understood."""
    given = arguments(launch)
    if len(launch) > LONGEST or not 2 <= len(given) <= 3 or not all(given):
        raise ValueError(
            f"<<<{launch[:60]}>>> has {len(given)} arguments; expected grid, block and shared memory"
        )
    return ", ".join([*[*given, "0"][:3], STREAM])


def patched(source: str) -> tuple[str, int]:
    """The source with all launches on the current stream, and how many there were."""
    text, count = LAUNCH.subn(lambda found: f"<<<{with_stream(found[1])}>>>", source)
    if text.count("<<<") != count:
        raise ValueError(f"{text.count('<<<')} launches begin and {count} end")
    if count and INCLUDE not in text:
        text = f"{INCLUDE}\n{text}"
    return text, count


def patch(directory: Path) -> int:
    """Patch every source below `directory`; returns the number of launches, which is never 0."""
    total = 0
    for path in sorted(path for path in directory.rglob("*") if path.suffix in SUFFIXES):
        try:
            text, count = patched(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SystemExit(f"use_current_stream: {path}: {error}; look at the new source.") from error
        if count:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"{path}: {count}\n")
        total += count
    if not total:
        raise SystemExit(
            f"use_current_stream: {directory} launches nothing; expected kernels: has the source moved?"
        )
    return total


def main() -> None:
    """Patch the directories that are named."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python use_current_stream.py DIRECTORY...")
    total = sum(patch(Path(name)) for name in sys.argv[1:])
    sys.stdout.write(f"{total} launches now use torch's current stream\n")


if __name__ == "__main__":
    main()
