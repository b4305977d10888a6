"""A LightX2V configuration in the words of `t2v`: shown by `explain`, and taken by `generate --config`."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from entrypoint.events import emit, tell
from entrypoint.options import PATH, SectionedCommand, talk_options
from entrypoint.table import aligned

if TYPE_CHECKING:
    from runtime.lightx2v.config import Entry, Translation
    from runtime.schema import Sampling

HEADER = ("KEY", "VALUE", "HERE", "WHY")
REQUEST_OPTIONS = (
    *("prompt", "negative_prompt", "seed", "height", "width", "frames", "fps"),
    *("steps", "sampler", "guidance", "noise_device"),
)


@click.command(cls=SectionedCommand)
@click.argument("file", type=PATH)
@talk_options
def explain(file: Path, json: bool, debug: bool) -> None:
    """Show what a JSON configuration of LightX2V's means here.

    One line for each key of FILE, then the command that does the same. The exit code is that of a
    `t2v generate --config FILE`: 2 if a key is unknown, or asks for what would be another picture here.
    """
    from runtime.lightx2v.config import default_sampling, read, translate

    translation = translate(read(file), default_sampling())
    if json:
        _emit(translation)
    else:
        _print(translation)
    translation.refuse(str(file))
    _check(translation, file)


def _print(translation: "Translation") -> None:
    from runtime.lightx2v.config import shown, shown_key

    rows = [
        (
            entry.key if entry.implied else shown_key(entry.key),
            "" if entry.implied else shown(entry.value),
            _here(entry),
            entry.outcome.why,
        )
        for entry in translation.entries
    ]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    first, *others = aligned(HEADER, rows, width=width)
    click.secho(first, bold=True)
    for line in (*others, "", translation.command()):
        click.echo(line)
    placed = {name: value for name, value in translation.profile.items() if name != "quantization"}
    if placed:
        fields = ", ".join(f"{name}: {shown(value)}" for name, value in placed.items())
        click.echo(f"with, in the --profile: {fields}")


def _here(entry: "Entry") -> str:
    """The third column: the option with its value, the profile's field, or the fate of the key."""
    from runtime.lightx2v.config import shown

    outcome = entry.outcome
    if outcome.status in ("refused", "unknown"):
        return outcome.status
    if outcome.options:
        return " ".join(
            f"--{name.replace('_', '-')} {value if isinstance(value, int) else shown(value).strip(chr(34))}"
            for name, value in outcome.options.items()
        )
    return outcome.here or ("as here" if outcome.status == "used" else "no effect")


def _emit(translation: "Translation") -> None:
    """One "key" event for each entry, then one "translation"."""
    for entry in translation.entries:
        outcome = entry.outcome
        emit(
            "key",
            key=entry.key,
            value=entry.value,
            status=entry.status,
            options=dict(outcome.options),
            profile=dict(outcome.profile),
            why=outcome.why,
        )
    emit(
        "translation",
        command=translation.command(),
        options=dict(translation.options),
        profile=dict(translation.profile),
    )


def _check(translation: "Translation", file: Path) -> None:
    """Refuse a request that the model would: a height that is no multiple of 16."""
    from runtime.errors import RequestError
    from runtime.profiles import DIRECTORY_FAMILY, load_profile, resolve_model
    from runtime.request import Request, check

    options = translation.options
    wanted = {name: options[name] for name in REQUEST_OPTIONS if name in options}
    try:
        check(Request(**wanted), resolve_model(DIRECTORY_FAMILY, load_profile("auto")), "cuda:0")
    except RequestError as error:
        raise RequestError(f"{file}: {error}") from error


# -------------------------------------------------------------------------------------------- for `generate`


def apply_config(ctx: click.Context, given: dict[str, Any]) -> dict[str, Any]:
    """`given` with the options of its --config, if it has one, and `profile_changes` and `notes` beside them.

    What is typed wins over the file, and the file over T2V_ settings, which are those of the machine.
    Raises RequestError for a file that cannot be followed.
    """
    if given["config"] is None:
        return given
    from runtime.lightx2v.config import read, translate
    from runtime.profiles import list_manifests

    file: Path = given["config"]
    config = read(file)
    translation = translate(config, _sampling(ctx, given, config))
    translation.refuse(str(file), given["accept_nonstandard"])
    options = dict(given)
    for name, value in translation.options.items():
        if not _typed(ctx, name):
            options[name] = Path(value) if name == "output" else value
    if "prompt" in translation.options and not _typed(ctx, "prompt"):
        if _typed(ctx, "prompt_file"):
            options["prompt"] = None
        else:
            options["prompt_file"] = None
    if options["noise_device"] == "cuda" and not _typed(ctx, "noise_device") and _computes_on_cpu(given):
        options["noise_device"] = "cpu"
    profile = dict(translation.profile)
    if options["model"] in list_manifests():
        profile.pop("quantization", None)  # the name says it
    if not given["json"]:
        keys = [entry for entry in translation.entries if not entry.implied]
        used = sum(entry.status == "used" for entry in keys)
        tell(f"{file}: {used} of {len(keys)} keys have a meaning here; `t2v explain` lists them.")
    warnings = [f"{file}: {entry.sentence()}." for entry in translation.wishes()]
    if unknown := [entry.key for entry in translation.entries if entry.status == "unknown"]:
        warnings.append(f"{file}: ignored, since nobody here knows them: {', '.join(unknown)}.")
    return options | {"profile_changes": profile, "notes": tuple(warnings)}


def _typed(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE


def _sampling(ctx: click.Context, given: Mapping[str, Any], config: Mapping[str, Any]) -> "Sampling":
    """How the model is sampled that is going to run: typed, else the file's, else the default."""
    from runtime.lightx2v.config import default_sampling
    from runtime.profiles import load_profile, manifest_of

    if _typed(ctx, "model") or (given["model"] and not config.get("model_path")):
        return manifest_of(given["model"], load_profile(given["profile"])).sampling
    return default_sampling()


def _computes_on_cpu(given: Mapping[str, Any]) -> bool:
    from runtime.device import select_device
    from runtime.profiles import load_profile

    return select_device(given["device"], load_profile(given["profile"]))[1] == "cpu"
