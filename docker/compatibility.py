"""docs/compatibility.md from profiles/images.yaml: `make compatibility`, or `--check` to compare only.

python docker/compatibility.py [--check]
"""

import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "profiles" / "images.yaml"
PAGE = ROOT / "docs" / "compatibility.md"

HEAD = """\
<!-- Made by `make compatibility` from profiles/images.yaml: change that file, not this one. -->
# Which image for which card and driver

"""
ADVICE = """
- **A new driver?** Take `cu128`: it has the faster attention on RTX 40, and RTX 50 runs on nothing older.
- **A driver older than the image's own?** CUDA starts on any driver of its major version (the number in
  brackets), and `t2v doctor` says so; an image whose own driver is not newer than yours is the safe choice.
- `t2v version --json` names the image that you run and what it was built for; `t2v doctor` compares it with
  the card.
- *Compiled for* is what SageAttention's kernels hold machine code for, asserted with cuobjdump in the build.
  *torch runs on* is what torch's own wheel holds; a card in that list alone runs with torch's kernels.
- SageAttention's fp16 accumulation needs nvcc 12.8 or newer: on RTX 40, `cu124` must accumulate in fp32,
  which is slower.
- Nothing here was tried on every card: what was measured, and where, is in the README.
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def images(data: dict[str, Any]) -> str:
    """One row for each image."""
    rows = [
        [
            f"`fourstep:{one['tag']}`",
            one["torch"],
            one["cuda"],
            f"{one['driver']} ({one['minimum_driver']})",
            ", ".join(one["architectures"]),
            ", ".join(one["torch_architectures"]),
            one["cards"],
        ]
        for one in data["images"]
    ]
    header = ["image", "torch", "CUDA", "driver (oldest)", "compiled for", "torch runs on", "cards"]
    return table(header, rows)


def kernels(data: dict[str, Any]) -> str:
    """One row for each optional kernel."""
    tags = [one["tag"] for one in data["images"]]
    rows = []
    for kernel in data["kernels"].values():
        where = (
            "those of the image" if kernel["architectures"] is None else ", ".join(kernel["architectures"])
        )
        version = f" {kernel['version']}" if kernel.get("version") else ""
        accumulation = ", ".join(f"{one['tag']}: {one['sage_accumulation']}" for one in data["images"])
        rows.append(
            [
                f"{kernel['title']}{version}",
                f"`{kernel['commit'][:12]}` of {kernel['source'].removeprefix('https://')}",
                where,
                "yes" if kernel["default"] else "no",
                accumulation if kernel["title"] == "SageAttention" else "-",
            ]
        )
    header = [
        "kernels",
        "source",
        "architectures",
        f"in {' and '.join(tags)}",
        "accumulation of P·V on RTX 40",
    ]
    return table(header, rows)


def page() -> str:
    """The whole page."""
    data = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    return HEAD + images(data) + ADVICE + "\n" + kernels(data)


def main() -> None:
    """Write the page, or compare it."""
    if sys.argv[1:] == ["--check"]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
            raise SystemExit(
                f"{PAGE.relative_to(ROOT)} is not what profiles/images.yaml says; run make compatibility."
            )
    elif sys.argv[1:]:
        raise SystemExit("usage: python docker/compatibility.py [--check]")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
