"""`t2v version`: which program this is: commit, image, versions, and what its kernels were built for."""

import json
import platform
import shutil
import subprocess
from typing import Any

import click

from entrypoint.options import SectionedCommand, talk_options

PACKAGES = (
    *("torch", "triton", "safetensors", "tokenizers", "av", "numpy", "pydantic", "huggingface_hub"),
    *("sageattention", "q8_matmul", "nvidia-cudnn-frontend"),
)
"""Whose versions decide about a picture, a kernel or a download; what is not installed is left out."""


@click.command(cls=SectionedCommand)
@talk_options
def version(json: bool, debug: bool) -> None:
    """Say which program this is: commit, image, versions."""
    show(as_json=json)


def show(*, as_json: bool) -> None:
    """Print `facts`, as one JSON object or as lines."""
    found = facts()
    if as_json:
        click.echo(json.dumps(found))
        return
    image = found["image"] or {}
    rows = {
        "fourstep": found["version"],
        "commit": found["revision"] or "unknown",
        "image": image.get("tag") or "none",
        "built for": ", ".join(image.get("architectures", ())) or "-",
        "python": found["python"],
        "cuda": found["cuda"] or "none",
        **found["packages"],
    }
    widest = max(map(len, rows))
    for name, value in rows.items():
        click.echo(f"{name.ljust(widest)}  {value}")


def facts() -> dict[str, Any]:
    """Everything that a bug report needs to name; no torch is imported for it.

    version, revision (a commit, `-dirty` where files differ; None when nobody knows), python, platform, cuda
    (that torch was built for), packages (name -> version), image (what its build wrote down; None outside of
    an image).
    """
    from entrypoint.surroundings import description
    from runtime.device import torch_cuda

    image = description()
    cuda = torch_cuda()
    return {
        "version": program_version(),
        "revision": image["revision"] if image is not None else _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": None if cuda is None else ".".join(map(str, cuda)),
        "packages": _packages(),
        "image": image,
    }


def program_version() -> str:
    """The program's own version: of the installed package, or of the source tree that it runs from."""
    import tomllib
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed
    from pathlib import Path

    try:
        return installed("fourstep")
    except PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])


def _packages() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    found = {}
    for name in PACKAGES:
        try:
            found[name] = installed(name)
        except PackageNotFoundError:  # optional, or not needed for what this installation does
            continue
    return found


def _git_revision() -> str | None:
    """The commit of the source tree that this runs from; None without a repository or without git."""
    from runtime.schema import project_root

    git = shutil.which("git")
    if git is None or not (project_root() / ".git").exists():
        return None
    command = [
        git,
        "-C",
        str(project_root()),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
