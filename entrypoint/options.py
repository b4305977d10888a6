"""The options of all verbs, in sections, so that --help reads like a page and not like a heap."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

DEFAULT_MODEL = "wan2.1-t2v-14b-4step"

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Function], Function]


class SectionedOption(click.Option):
    """An option that knows its section of the help page, and its default in words if it has no value."""

    def __init__(self, *args: Any, section: str, default_text: str | None = None, **attributes: Any) -> None:
        self.section = section
        self.default_text = default_text
        super().__init__(*args, **attributes)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """The option with its metavar; its help, default and environment variable."""
        default = self.default_text
        if default is None and not self.is_flag and isinstance(self.default, (str, int, float)):
            default = str(self.default)
        extra = [f"default: {default}"] if default else []
        extra.append(f"{ctx.auto_envvar_prefix}_{self.name}".upper())
        metavar = "" if self.is_flag else f" {self.make_metavar(ctx)}"
        return f"{self.opts[0]}{metavar}", f"{self.help} [{'; '.join(extra)}]"


class SectionedCommand(click.Command):
    """A command whose --help groups options by section, all with the same columns."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One definition list for each section, in the order of their first option."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = None if isinstance(parameter, click.Argument) else parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Help"), []).append(record)
        widest = max(len(left) for records in sections.values() for left, _ in records)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl([(left.ljust(widest), right) for left, right in records], col_max=widest)


def option(section: str, name: str, metavar: str | None, help: str, **attributes: Any) -> Decorator:
    """A click option of `section`; without a metavar it is a flag, or a choice that names its values."""
    flag = metavar is None and "type" not in attributes
    attributes |= {"is_flag": True} if flag else {"metavar": metavar}
    return click.option(name, cls=SectionedOption, section=section, help=help, **attributes)


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator; they appear in their order here."""

    def decorate(function: Function) -> Function:
        for one in reversed(options):
            function = one(function)
        return function

    return decorate


def models_own(value: object) -> dict[str, Any]:
    """A default that the model's manifest sets; `value` is that of the 14B model."""
    return {"default_text": f"the model's ({value})"}


FILE = click.File("r", encoding="utf-8")
PATH = click.Path(path_type=Path)
SHOW, SIZE, SAMPLE, MODEL, OUTPUT = "What to show", "Size", "Sampling", "Model", "Output"


config_option = option(
    *(SHOW, "--config", "FILE", "A JSON configuration of LightX2V's, which `t2v explain` shows."), type=PATH
)


def fps_option(default: str = "the model's (16)") -> Decorator:
    """Frames per second; `default` says in words how many."""
    return option(SIZE, "--fps", "N", "Frames shown in a second.", type=int, default_text=default)


# What each accepts, and why, is told by runtime.request, which refuses the rest.
request_options = together(
    option(SHOW, "--prompt", "TEXT", "The video in a sentence.", default_text="the model's example"),
    option(SHOW, "--prompt-file", "FILE", "Read the prompt from a file; - is stdin.", type=FILE),
    option(SHOW, "--negative-prompt", "TEXT", "Only for models that run with guidance."),
    option(SHOW, "--seed", "N", "The same seed gives the same video.", type=int, default=42),
    option(SIZE, "--height", "PIXELS", "A multiple of 16.", type=int, **models_own(480)),
    option(SIZE, "--width", "PIXELS", "A multiple of 16.", type=int, **models_own(832)),
    option(SIZE, "--frames", "N", "4n+1: 17, 49, 81 ...", type=int, **models_own(81)),
    fps_option(),
    option(SAMPLE, "--steps", "N", "Denoise steps.", type=int, **models_own(4)),
    option(
        *(SAMPLE, "--sampler", None, "lcm draws new noise after each step, euler keeps the first."),
        type=click.Choice(["lcm", "euler"]),
        **models_own("lcm"),
    ),
    option(SAMPLE, "--guidance", "SCALE", "Only for models that are not distilled.", type=float),
    option(SAMPLE, "--accept-nonstandard", None, "Run what the model was not made for."),
    option(
        *(
            SAMPLE,
            "--noise-device",
            None,
            "cpu draws the same noise on every machine, cuda that of LightX2V.",
        ),
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
    ),
)


def model_options(default: str = DEFAULT_MODEL, others: str | None = None) -> Decorator:
    """Which model runs and where; `default` says in words which one if none is named, `others` the rest."""
    return together(
        option(
            *(MODEL, "--model", "NAME|DIR", "A name of `t2v models`, or a directory of weights."),
            default_text=default,
        ),
        option(
            MODEL, "--weights", "DIR", "Where its files are.", type=PATH, default_text=others or "/weights"
        ),
        option(
            *(MODEL, "--profile", "NAME|FILE", "A name of `t2v profiles`, or a YAML file of your own."),
            default="auto",
            default_text=others,
        ),
        option(
            *(MODEL, "--device", "auto|cuda:N|cpu", "Where to compute."), default="auto", default_text=others
        ),
    )


class _Gigabytes(click.ParamType):
    """A finite number above 0."""

    name = "gigabytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; a usage error for text, 0, less, nan and inf."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            self.fail(f"{value!r} is not a number above 0, like 7.5.", param, ctx)
        return number


memory_options = together(
    option(
        *(MODEL, "--vram", "GB", "Use at most so much memory of the GPU (GB of 2^30 bytes)."),
        type=_Gigabytes(),
        default_text="what is free, up to the profile's",
    ),
    option(
        *(MODEL, "--ram", "GB", "Use at most so much memory of the machine (GB of 2^30 bytes)."),
        type=_Gigabytes(),
        default_text="what is free",
    ),
)
"""Ceilings for the plan; as `vram` and `ram`, float or None."""

attention_option = option(
    *(MODEL, "--attention", "auto|NAME", "The attention to begin with; `t2v doctor` lists what works here."),
    default="auto",
)
"""As `attention`, checked where the backends are known (`runtime.layers.backends.check_name`)."""

cache_option = option(
    *(MODEL, "--cache", "DIR|none", "Where text states and measurements are kept for the next run."),
    default_text="/cache, or fourstep in the user's cache",
)

text_states_option = option(
    *(SHOW, "--text-states", "FILE", "Take the prompt's states from FILE, or write them there if it is new."),
    type=PATH,
)

output_options = together(
    option(
        *(OUTPUT, "--output", "PATH", "An .mp4 file, or a directory."),
        type=PATH,
        default_text="a new name in /outputs or ./outputs",
    ),
    option(OUTPUT, "--overwrite", None, "Replace an --output that exists."),
    option(OUTPUT, "--contact-sheet", None, "Also write some frames as one PNG, beside the video."),
)

latents_option = option(OUTPUT, "--save-latents", None, "Also keep the latents, for `t2v decode`.")

talk_options = together(
    option(OUTPUT, "--json", None, "Print JSON, one object a line, for programs."),
    option(OUTPUT, "--debug", None, "Show the traceback of an error."),
)
