"""What an image is, as JSON for `t2v version --json`: its pins, and what was really installed, compared.

    python describe.py TARGET

Takes the pins from the environment, as a Dockerfile's ARGs arrive there. Exits 1 in one sentence when the
environment that was built is not the one that was promised.
"""

import importlib.util
import json
import os
import re
import sys
from importlib.metadata import distributions, version
from pathlib import Path

PINS = (
    "TAG",
    "TORCH",
    "CUDA",
    "ARCHITECTURES",
    "DRIVER",
    "MINIMUM_DRIVER",
    "VERSION",
    "REVISION",
    "PYTHON_IMAGE",
)
KERNELS = {"sageattention": "sage", "q8_matmul": "q8", "q8_kernels": "q8"}
"""Distribution names of the optional kernels, and what we call them."""


def torch_built_for() -> str:
    """The CUDA version that the installed torch was built for, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("describe: torch is not installed; expected the one of the lock.")
    source = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    built = re.search(r"^cuda\b[^=\n]*=\s*['\"]([0-9.]+)", source, re.MULTILINE)
    if built is None:
        raise SystemExit(
            "describe: the installed torch was built without CUDA; expected the lock's CUDA build."
        )
    return built[1]


def kernels() -> dict[str, str]:
    """Version by name of the compiled kernels that are installed."""
    found = {}
    for distribution in distributions():
        name = re.sub(r"[-.]+", "_", distribution.metadata["Name"] or "").lower()
        if name in KERNELS:
            found[KERNELS[name]] = distribution.version
    return found


def describe(pins: dict[str, str]) -> dict[str, object]:
    """The description; SystemExit for a torch or a CUDA that is not the pinned one."""
    installed, cuda = version("torch").split("+")[0], torch_built_for()
    if (installed, cuda) != (pins["TORCH"], pins["CUDA"]):
        raise SystemExit(
            f"describe: torch {installed} for CUDA {cuda} is installed; "
            f"expected {pins['TORCH']} for CUDA {pins['CUDA']}: resolve locks/{pins['TAG']}.txt again."
        )
    return {
        "tag": pins["TAG"],
        "version": pins["VERSION"],
        "revision": pins["REVISION"],
        "base": pins["PYTHON_IMAGE"],
        "torch": installed,
        "cuda": cuda,
        "driver": pins["DRIVER"],
        "minimum_driver": pins["MINIMUM_DRIVER"],
        "architectures": pins["ARCHITECTURES"].split(";"),
        "kernels": kernels(),
    }


def main() -> None:
    """Write the description to the path that is given."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python describe.py TARGET")
    missing = [name for name in PINS if name not in os.environ]
    if missing:
        raise SystemExit(
            f"describe: not in the environment: {', '.join(missing)}; each is an ARG of the stage."
        )
    text = json.dumps(describe({name: os.environ[name] for name in PINS}), indent=2) + "\n"
    Path(sys.argv[1]).write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
