"""What ships with the program: the profiles of cards and the manifests of models, listed or shown."""

import json
import shutil
import sys
from collections.abc import Sequence

import click
import yaml
from pydantic import BaseModel

from entrypoint.table import aligned
from runtime.profiles import list_manifests, list_profiles, load_manifest, load_profile, resolve_model


def show_profiles(name: str | None, *, as_json: bool) -> None:
    """All profiles as a table, or one as the YAML that `--profile FILE` reads; RequestError for others."""
    if name is not None:
        _show(load_profile(name), as_json=as_json)
        return
    profiles = [load_profile(other) for other in list_profiles()]
    rows = [
        (
            profile.name,
            "any" if profile.device == "auto" else profile.device,
            "-" if profile.vram_gb is None else f"{profile.vram_gb:g} GiB",
            profile.quantization,
            profile.description,
        )
        for profile in profiles
    ]
    _list(profiles, ("NAME", "DEVICE", "VRAM", "WEIGHTS", "WHAT"), rows, right=[2], as_json=as_json)


def show_models(name: str | None, *, as_json: bool) -> None:
    """All models as a table, or one as YAML; RequestError if there is none."""
    if name is not None:
        # A family's name shows the variant that runs where no profile says otherwise.
        _show(resolve_model(name, load_profile("auto")), as_json=as_json)
        return
    models = [load_manifest(other) for other in list_manifests()]
    rows = [
        (
            model.name,
            model.quantization or "-",
            f"{model.defaults.width}x{model.defaults.height}x{model.defaults.frames}",
            str(model.sampling.steps),
            model.title,
        )
        for model in models
    ]
    _list(models, ("NAME", "WEIGHTS", "VIDEO", "STEPS", "WHAT"), rows, right=[3], as_json=as_json)


def _list(
    entries: Sequence[BaseModel],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int],
    as_json: bool,
) -> None:
    if as_json:
        for entry in entries:
            click.echo(json.dumps(entry.model_dump(mode="json")))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    first, *others = aligned(header, rows, right=right, width=width)
    click.secho(first, bold=True)
    for line in others:
        click.echo(line)


def _show(entry: BaseModel, *, as_json: bool) -> None:
    fields = entry.model_dump(mode="json")
    click.echo(
        json.dumps(fields)
        if as_json
        else yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).rstrip()
    )
