"""`t2v plan`: what a run would take and how long, without loading anything; for any card, here or not."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from entrypoint.cache import choose_cache
from entrypoint.options import (
    SAMPLE,
    SIZE,
    SectionedCommand,
    cache_option,
    memory_options,
    model_options,
    models_own,
    option,
    talk_options,
    together,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from entrypoint.plan_page import Subject
    from runtime.memory.plan import Plan
    from runtime.memory.sizes import Header, ModelSizes
    from runtime.schema import ModelManifest, Profile

video_options = together(
    option(SIZE, "--height", "PIXELS", "A multiple of 16.", type=int, **models_own(480)),
    option(SIZE, "--width", "PIXELS", "A multiple of 16.", type=int, **models_own(832)),
    option(SIZE, "--frames", "N", "4n+1: 17, 49, 81 ...", type=int, **models_own(81)),
    option(SAMPLE, "--steps", "N", "Denoise steps.", type=int, **models_own(4)),
    option(SAMPLE, "--guidance", "SCALE", "Only for models that are not distilled.", type=float),
    option(SAMPLE, "--accept-nonstandard", None, "Plan what the model was not made for."),
)


@click.command(cls=SectionedCommand)
@video_options
@model_options()
@memory_options
@cache_option
@talk_options
def plan(json: bool, debug: bool, **given: Any) -> None:
    """Show what a run would take in memory and time, loading nothing.

    Works for every profile, with its card or without: t2v plan --profile rtx4060 --ram 16
    """
    from entrypoint import plan_page

    planned, subject = make(**given)
    lines = plan_page.as_json(planned, subject) if json else plan_page.as_text(planned, subject)
    for line in lines:
        click.echo(line)


def make(
    *,
    model: str | None,
    weights: Path | None,
    profile: str,
    device: str,
    vram: float | None,
    ram: float | None,
    cache: str | None,
    **request: Any,
) -> "tuple[Plan, Subject]":
    """The plan for such options, and what it is about. RequestError, DeviceError, WeightsError, PlanError."""
    from entrypoint.plan_page import Subject
    from runtime.device import choose_profile, gpus
    from runtime.memory.machine import look
    from runtime.memory.planning import plan_run, sizes_for
    from runtime.profiles import DEFAULT_MODEL, load_profile
    from runtime.request import Request, check

    chosen, place = _place(device, load_profile(profile))
    manifest, directory = _model(model or DEFAULT_MODEL, chosen, weights)
    asked = Request(**request)
    checked = check(asked, manifest, place)
    gpu = next((one for one in gpus() if f"cuda:{one.index}" == place), None)
    machine = look(directory, gpu)
    files = None if directory is None else _headers(manifest, directory)
    sizes = sizes_for(manifest, chosen, files)
    # A run on this GPU takes what was measured to be the fastest; of a card elsewhere nobody knows.
    fastest = "" if gpu is None else _attention(choose_cache(cache), place, checked.tokens, sizes)
    planned = plan_run(
        *(manifest, chosen, checked, machine, place), files=files, vram=vram, ram=ram, attention=fastest
    )
    why = choose_profile(gpu)[1] if profile == "auto" == device else None
    return planned, Subject(manifest, chosen, machine, directory if files is not None else None, why)


def _attention(cache: Path | None, place: str, tokens: int, sizes: "ModelSizes") -> str:
    """The attention that won on this GPU at about so many tokens, if it computes in 8 bits."""
    from runtime.memory.costs import STATES_8BIT
    from runtime.tuning import open_store

    store = open_store(cache, place)
    known = store.attention(tokens, tokens, sizes.num_heads, sizes.head_dim, "bfloat16")
    won = "" if known is None else known.won
    return won if won in STATES_8BIT and won not in store.avoided() else ""


def _place(device: str, profile: "Profile") -> "tuple[Profile, str]":
    """As for a run; but a card that is named and not here can be planned for all the same."""
    from runtime.device import select_device
    from runtime.errors import DeviceError

    try:
        return select_device(device, profile)
    except DeviceError:
        if device != "auto" or profile.device != "cuda":
            raise
        return profile, "cuda:0"


def _model(name: str, profile: "Profile", weights: Path | None) -> "tuple[ModelManifest, Path | None]":
    """The manifest, and the directory of its weights where they are: a plan needs none."""
    from runtime.errors import WeightsError
    from runtime.profiles import DEFAULT_WEIGHTS, find_model, manifest_of

    manifest = manifest_of(name, profile)
    named = manifest.embedded is None and manifest.transformer is not None
    if named and not (weights or DEFAULT_WEIGHTS).expanduser().is_dir():
        return manifest, None
    try:
        return find_model(name, profile, weights)
    except WeightsError:
        return manifest, None


def _headers(manifest: "ModelManifest", directory: Path) -> "Sequence[Header] | None":
    """The opened files; None where they are not all there and the manifest's sizes do as well."""
    from runtime.errors import WeightsError

    known = manifest.transformer is not None
    if manifest.embedded is not None:
        return None  # what ships with the program is as its manifest says
    if known and not any(path.exists() for path in _transformers(manifest, directory)):
        return None
    from runtime.loading import open_files  # imports torch: only where there is something to read

    try:
        files = open_files(manifest, directory)
    except WeightsError:
        if known:
            return None
        raise
    return files.transformer, files.text_encoder, files.vae


def _transformers(manifest: "ModelManifest", directory: Path) -> "list[Path]":
    """Where the transformer would be: single files, or the first of the files in a variant's directory."""
    places = manifest.directories(directory)
    named = [place / name for place in places for name in manifest.files.transformer if name != "."]
    return named + [
        file for place in places if place.is_dir() for file in sorted(place.glob("*.safetensors"))[:1]
    ]
