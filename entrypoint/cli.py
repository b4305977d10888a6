"""`t2v`: the program that a shell or a container starts. It parses, calls the engine, and prints.

A first argument that is an option, or none at all, means `generate`. Every option may also come from the
environment as T2V_<OPTION>. stdout carries the result alone (a path, a table, or JSON), stderr the rest.
"""

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import click
from click.core import ParameterSource

from entrypoint import failures
from entrypoint.bench import bench
from entrypoint.cache import choose_cache
from entrypoint.convert import convert
from entrypoint.doctor import doctor
from entrypoint.explain import apply_config, explain
from entrypoint.options import (
    SectionedCommand,
    attention_option,
    cache_option,
    config_option,
    fps_option,
    latents_option,
    memory_options,
    model_options,
    output_options,
    request_options,
    talk_options,
    text_states_option,
)
from entrypoint.plan import plan
from entrypoint.rerun import rerun
from entrypoint.resume import resume
from entrypoint.synth import synth
from entrypoint.tune import tune
from entrypoint.version import version
from entrypoint.weights import weights
from runtime.errors import RequestError
from runtime.request import MAX_PROMPT, Request

DEFAULT_VERB = "generate"
ENVIRONMENT = "T2V"
OWN_OPTIONS = ("--help", "-h", "--version")  # of the program itself, not of `generate`
REQUEST_FIELDS = (
    *("seed", "height", "width", "frames", "fps", "steps", "sampler"),
    *("guidance", "negative_prompt", "noise_device", "accept_nonstandard"),
)

SETTINGS: dict[str, Any] = {
    "auto_envvar_prefix": ENVIRONMENT,  # for verbs too: T2V_PROFILE, not T2V_GENERATE_PROFILE
    "help_option_names": ["-h", "--help"],
    "max_content_width": 120,
}

EPILOG = """\b
Examples:
  t2v --model demo                          a small video in seconds, nothing to download
  t2v --prompt "A red fox runs in snow."    the 14B model, its weights in /weights
  t2v --prompt-file fox.txt --seed 7 --output fox.mp4
  t2v generate --help                       every option of generate, which is the default

\b
Exit codes: 0 done, 2 bad arguments, 3 weights missing or corrupt, 4 does not fit, 5 device or driver,
6 the output failed its check, 7 out of memory, 130 interrupted.
"""


class Program(click.Group):
    """A group with a default verb, whose errors are sentences and exit codes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the default verb where the first argument is none."""
        if not args or (args[0].startswith("-") and args[0] not in OWN_OPTIONS):
            args = [DEFAULT_VERB, *args]
        return super().parse_args(ctx, args)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Verbs of other files get the program's settings too."""
        cmd.context_settings = {**SETTINGS, **cmd.context_settings}
        super().add_command(cmd, name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of this file, which is that of use."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; a word that is no command may well be a prompt."""
        if args[0] not in self.commands:
            raise click.UsageError(
                f"{args[0]!r} is no command; expected {', '.join(self.commands)}, or "
                f"--prompt {shlex.quote(args[0])} for a video of it.",
                ctx,
            )
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> NoReturn:
        """Run the program and exit; whatever was raised is told here, once."""
        given = list(sys.argv[1:] if args is None else args)
        status: int | None
        try:
            status = super().main(given, *rest, **(extra | {"standalone_mode": False, "prog_name": "t2v"}))
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the edge: what passes here is a bare traceback
            status = failures.report(error, as_json=_wants("json", given), debug=_wants("debug", given))
        sys.exit(status or 0)


def _wants(flag: str, args: list[str]) -> bool:
    """Whether a flag is set; needed even when the arguments cannot be parsed."""
    setting = os.environ.get(f"{ENVIRONMENT}_{flag.upper()}", "").lower()
    return f"--{flag}" in args or setting in ("1", "true", "t", "yes", "y", "on")


@click.group(name="t2v", cls=Program, context_settings=SETTINGS, epilog=EPILOG)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    allow_from_autoenv=False,
    callback=lambda ctx, _, asked: _show_version(ctx, asked),
    help="Show the version and exit.",
)
def cli() -> None:
    """Text to video in four steps, on the GPU you have."""


@cli.command(cls=SectionedCommand, context_settings=SETTINGS)
@request_options
@text_states_option
@config_option
@model_options()
@attention_option
@memory_options
@cache_option
@output_options
@latents_option
@talk_options
@click.pass_context
def generate(ctx: click.Context, **given: Any) -> None:
    """Make one video from a prompt (the default)."""
    from entrypoint import generate as run

    given = apply_config(ctx, given)
    request = Request(
        prompt=_prompt(ctx, given["prompt"], given["prompt_file"]),
        **{name: given[name] for name in REQUEST_FIELDS},
    )
    run.generate(request, _where(given), save_latents=given["save_latents"], as_json=given["json"])


@cli.command(cls=SectionedCommand, context_settings=SETTINGS)
@click.argument("latents", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@fps_option(default="that of the latents")
@model_options(default="that of the latents")
@memory_options
@output_options
@talk_options
@click.pass_context
def decode(ctx: click.Context, latents: Path, **given: Any) -> None:
    """Make the video of kept latents.

    LATENTS is a file that --save-latents wrote, or a run that failed late.
    """
    from entrypoint import decode as run

    # A model set for the whole machine is a default; the latents know which one made them.
    standing = ctx.get_parameter_source("model") == ParameterSource.ENVIRONMENT
    run.decode(latents, _where(given), prefer_own_model=standing, fps=given["fps"], as_json=given["json"])


@cli.command(cls=SectionedCommand, context_settings=SETTINGS)
@click.argument("name", required=False)
@talk_options
def profiles(name: str | None, json: bool, debug: bool) -> None:
    """List the profiles of cards, or show one."""
    from entrypoint import shelves

    shelves.show_profiles(name, as_json=json)


@cli.command(cls=SectionedCommand, context_settings=SETTINGS)
@click.argument("name", required=False)
@talk_options
def models(name: str | None, json: bool, debug: bool) -> None:
    """List the models, or show one."""
    from entrypoint import shelves

    shelves.show_models(name, as_json=json)


cli.add_command(rerun)
cli.add_command(resume)
cli.add_command(weights)
weights.add_command(convert)
weights.add_command(synth)


cli.add_command(explain)
cli.add_command(plan)
cli.add_command(doctor)
cli.add_command(tune)
cli.add_command(bench)
cli.add_command(version)


def _show_version(ctx: click.Context, asked: bool) -> None:
    if not asked:
        return
    from entrypoint.version import program_version

    click.echo(f"t2v {program_version()}")
    ctx.exit()


def _where(given: dict[str, Any]) -> Any:
    from entrypoint.generate import Where

    names = ("model", "weights", "profile", "device", "output", "overwrite", "contact_sheet")
    # Not every verb has them.
    more = ("profile_changes", "notes", "text_states", "vram", "ram", "attention")
    fields = {name: given[name] for name in (*names, *more) if name in given}
    return Where(**fields, cache=choose_cache(given["cache"]) if "cache" in given else None)


def _prompt(ctx: click.Context, text: str | None, file: TextIO | None) -> str | None:
    """The prompt, from whichever option was given; the command line wins over the environment."""
    if text is not None:
        # An argument that is not UTF-8 comes with half surrogates, which neither JSON nor a video can hold.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if text is not None and file is not None:
        sources = {name: ctx.get_parameter_source(name) for name in ("prompt", "prompt_file")}
        if sources["prompt"] == sources["prompt_file"]:
            raise RequestError("Both --prompt and --prompt-file are given; leave one out.")
        if sources["prompt"] == ParameterSource.COMMANDLINE:
            return text
    return _read_prompt(file) if file is not None else text


def _read_prompt(file: TextIO) -> str:
    """The text of a prompt file, at most a character more than a prompt may have: stdin may never end."""
    try:
        text = file.read(MAX_PROMPT + 1)
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{file.name} is not UTF-8 text ({error.reason}); save the prompt as UTF-8."
        ) from error
    if "\0" in text:
        raise RequestError(f"{file.name} is not text (it holds NUL characters); save the prompt as UTF-8.")
    return text.removeprefix("\ufeff")  # the mark that Windows editors put before UTF-8


def main() -> NoReturn:
    """The console script."""
    signal.signal(signal.SIGTERM, _interrupt)  # `docker stop`: leave as cleanly as on Ctrl-C
    try:
        cli.main()
    except SystemExit as ended:
        if isinstance(ended.code, int):
            failures.leave_at_once(ended.code)
        raise


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
