"""`t2v weights`: download, verify and list the files of models.

With --json, stdout has one object a line:

    pull    {"event": "notice",   "message": str}
            {"event": "file",     "model": str, "file": str, "state": str, "bytes": int, "missing": int}
            {"event": "plan",     "model": str, "bytes": int, "missing": int, "free": int, "exact": bool}
            {"event": "progress", "bytes": int, "total": int, "files_done": int, "files": int,
                                  "rate": float|null, "eta": float|null}      bytes/s, seconds
            {"event": "result",   "model": str, "directory": str, "files": int, "bytes": int, "received": int,
                                  "complete_before": bool, "dry_run": bool}
    verify  {"event": "file",     "model": str, "file": str, "state": "ok"|"missing"|"wrong",
                                  "bytes": int|null, "sha256": str|null, "reason": str}
            {"event": "result",   "model": str, "ok": bool, "full": bool}     one a model
    list    {"event": "model",    "model": str, "state": "present"|"partial"|"absent", "bytes": int,
                                  "total": int, "where": str, "verified": bool, "missing": [str]}

A failure is an "error" event, as in every verb.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from entrypoint.options import DEFAULT_MODEL, MODEL, PATH, SectionedCommand, option, talk_options

if TYPE_CHECKING:
    from runtime.schema import ModelManifest

TRANSFER = "Transfer"

weights_option = option(
    MODEL, "--weights", "DIR", "Where files of models lie.", type=PATH, default="/weights"
)


class Verbs(click.Group):
    """A group whose commands have the settings of the program, wherever they are defined."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """As click does."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            command.context_settings = {**self.context_settings, **command.context_settings}
        return command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of definition, which is that of use."""
        return list(self.commands)


@click.group(cls=Verbs, invoke_without_command=True)
@click.pass_context
def weights(ctx: click.Context) -> None:
    """Download, verify, list and convert weights."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@weights.command(cls=SectionedCommand)
@option(MODEL, "--model", "NAME", "A name of `t2v models`.", default=DEFAULT_MODEL)
@weights_option
@option(MODEL, "--profile", "NAME|FILE", "Whose variant, where --model names a family.", default="auto")
@option(
    MODEL,
    "--revision",
    "REVISION",
    "Of the repository: a commit, a tag, main.",
    default_text="noted, or newest",
)
@option(TRANSFER, "--workers", "N", "Files at a time.", type=click.IntRange(1, 32), default=4)
@option(TRANSFER, "--dry-run", None, "Show files, sizes and what is missing; download nothing.")
@talk_options
def pull(model: str, weights: Path, profile: str, **given: Any) -> None:
    """Download the files of a model, verified; run again to continue.

    HF_ENDPOINT (a mirror), HF_TOKEN and HTTPS_PROXY are honoured.
    """
    from entrypoint.transfer import make_reporter
    from runtime.weights import pull as download

    reporter = make_reporter(as_json=given["json"], dry_run=given["dry_run"])
    with reporter:
        pulled = download(
            _one(model, profile),
            weights.expanduser(),
            reporter,
            revision=given["revision"],
            workers=given["workers"],
            dry_run=given["dry_run"],
        )
    reporter.result(pulled)


@weights.command(cls=SectionedCommand)
@option(MODEL, "--model", "NAME", "A name of `t2v models`.", default_text="all that are there")
@weights_option
@option(TRANSFER, "--full", None, "Read every byte and compare digests, not only headers and sizes.")
@talk_options
def verify(model: str | None, weights: Path, full: bool, json: bool, debug: bool) -> None:
    """Check the files of models: sizes and headers, or with --full every byte."""
    from entrypoint import transfer
    from runtime.errors import WeightsError
    from runtime.weights import shelf

    directory = weights.expanduser()
    if model is not None:
        chosen = _named(model)
    else:
        there = {one.model for one in shelf(_all(), directory) if one.state != "absent"}
        chosen = [one for one in _all() if one.name in there and one.embedded is None]
    if not chosen:
        raise WeightsError(
            f"No model lies in {directory}; name another directory with --weights, or download one: "
            f"t2v weights pull --model {DEFAULT_MODEL}-fp8 --weights {directory}"
        )
    transfer.check(chosen, directory, full=full, as_json=json)


@weights.command(name="list", cls=SectionedCommand)
@weights_option
@talk_options
def list_models(weights: Path, json: bool, debug: bool) -> None:
    """List which models are there: present, partial or absent."""
    from entrypoint import transfer

    transfer.show_shelf(_all(), weights.expanduser(), as_json=json)


def _all() -> "list[ModelManifest]":
    from runtime.profiles import list_manifests, load_manifest

    return [load_manifest(name) for name in list_manifests()]


def _named(name: str) -> "list[ModelManifest]":
    """The manifest of this name, or those of the family; RequestError."""
    from runtime.profiles import load_profile, resolve_model

    exact = [manifest for manifest in _all() if manifest.name == name]
    family = exact or [manifest for manifest in _all() if manifest.family == name]
    return family or [resolve_model(name, load_profile("cpu"))]  # which says what is near


def _one(name: str, profile: str) -> "ModelManifest":
    """The manifest to download; of a family, the variant that suits the card that is here or was named."""
    from runtime.device import select_device
    from runtime.errors import RequestError
    from runtime.profiles import load_profile, resolve_model

    variants = _named(name)
    if len(variants) == 1:
        return variants[0]
    chosen, device = (
        select_device("auto", load_profile(profile)) if profile == "auto" else (load_profile(profile), "")
    )
    if device == "cpu":
        names = ", ".join(manifest.name for manifest in variants)
        raise RequestError(
            f"{name} has several variants and there is no GPU here to choose by; expected --model {names}, "
            "or the --profile of a card."
        )
    return resolve_model(name, chosen)
