"""`t2v weights synth`: a random checkpoint in a model's published layout, for measuring without a download.

With --json, stdout has one object a line:

    {"event": "progress", "bytes": int, "total": int, "files_done": int, "files": int,
                          "rate": float|null, "eta": float|null}      bytes/s, seconds
    {"event": "result",   "model": str, "directory": str, "seed": int, "seconds": float, "bytes": int,
                          "files": [{"name": str, "bytes": int}], "kept": int}     kept: of an earlier run
"""

import shlex
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from entrypoint.events import emit, tell
from entrypoint.options import MODEL, PATH, SectionedCommand, option, talk_options
from entrypoint.table import count, duration
from runtime.errors import RequestError

if TYPE_CHECKING:
    from runtime.checkpoint.published import Shapes
    from runtime.checkpoint.synth import Synthesized
    from runtime.schema import ModelManifest

DEFAULT = "wan2.1-t2v-14b-4step-fp8"
PARTS = ("transformer", "text_encoder", "vae")
TELL_SECONDS = 0.2


@click.command(cls=SectionedCommand, context_settings={"auto_envvar_prefix": "T2V"})
@click.argument("directory", type=PATH)
@option(MODEL, "--model", "NAME", "A name of `t2v models`.", default=DEFAULT)
@option(MODEL, "--parts", "LIST", "Of transformer, text_encoder, vae.", default=",".join(PARTS))
@option(
    *(MODEL, "--seed", "N", "The same seed gives the same bytes on every machine."),
    type=click.IntRange(0, 2**63 - 1),
    default=0,
)
@talk_options
def synth(directory: Path, model: str, parts: str, seed: int, json: bool, debug: bool) -> None:
    """Write random weights in a model's published layout.

    Files, names, shapes and dtypes are those of the model, so times and memory are too; videos are noise.
    What an earlier run with the same seed has finished is kept. Never among other weights.
    """
    from runtime.profiles import load_profile, resolve_model

    wanted = _parts(parts)
    manifest = resolve_model(model, load_profile("auto"))
    target = directory.expanduser()
    begun = time.perf_counter()
    made = write(manifest, target, wanted, seed, as_json=json)
    _tell_result(manifest, target, seed, made, time.perf_counter() - begun, as_json=json)


def write(
    manifest: "ModelManifest", target: Path, parts: tuple[str, ...] = PARTS, seed: int = 0, *, as_json: bool
) -> "Synthesized":
    """Write random weights of a model into `target`, showing progress; RequestError, OutputError."""
    from runtime.checkpoint.published import plan_synth
    from runtime.checkpoint.synth import synthesize
    from runtime.schema import project_root

    plan = plan_synth(manifest, shapes_of(manifest, parts))
    tokenizer = project_root() / "demo" / "weights" / "google" / "umt5-xxl" / "tokenizer.json"
    with _Show(plan.model, target, as_json=as_json) as show:
        return synthesize(
            *(plan, target),
            tokenizer=tokenizer,
            seed=seed,
            on_start=show.start,
            on_bytes=show.advance,
            on_file=show.file_done,
        )


def _parts(text: str) -> tuple[str, ...]:
    """`transformer,vae` -> ("transformer", "vae"); RequestError."""
    given = [part.strip() for part in text.split(",") if part.strip()]
    strangers = [part for part in given if part not in PARTS]
    if strangers or not given:
        raise RequestError(
            f"--parts is {text!r}; expected one or more of {', '.join(PARTS)}, with commas between them."
        )
    return tuple(part for part in PARTS if part in given)


def shapes_of(manifest: "ModelManifest", parts: tuple[str, ...]) -> "Shapes":
    """The tensors of the parts as the model's classes have them, on meta; RequestError without sizes."""
    import torch

    from runtime.text_encoder import TextEncoder, TextEncoderConfig
    from runtime.transformer import Transformer, TransformerConfig
    from runtime.vae import VAE, VAEConfig

    classes: dict[str, tuple[Any, Any]] = {
        "transformer": (Transformer, TransformerConfig),
        "text_encoder": (TextEncoder, TextEncoderConfig),
        "vae": (VAE, VAEConfig),
    }
    shapes: Any = {}
    for part in parts:
        sizes = getattr(manifest, part)
        if sizes is None:
            raise RequestError(
                f"{manifest.name} does not state the sizes of its {part}; choose another of `t2v models`."
            )
        model, config = classes[part]
        with torch.device("meta"):
            shapes[part] = dict(model(config(**sizes.model_dump())).state_dict())
    return shapes


class _Show:
    """Progress on stderr, or as events: a bar on a terminal, a line now and then in a log."""

    def __init__(self, model: str, directory: Path, *, as_json: bool) -> None:
        from entrypoint.transfer import make_reporter

        self.model = model
        self.directory = directory
        self.as_json = as_json
        self.reporter = make_reporter(as_json=as_json, dry_run=False)
        self.meter: Any = None
        self._guard = threading.Lock()
        self._told = 0.0

    def __enter__(self) -> "_Show":
        self.reporter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.reporter.__exit__(*error)

    def start(self, missing: int, files: int) -> None:
        """The work begins: bytes and files that are to be made."""
        from runtime.weights.plan import decimal
        from runtime.weights.progress import Meter

        self.meter = Meter(missing, files)
        if files and not self.as_json:
            tell(f"{self.model}: {count(files, 'file')}, {decimal(missing)} to write into {self.directory}")

    def advance(self, nbytes: int) -> None:
        """Bytes are written; called from several threads."""
        self.meter.add(nbytes)
        with self._guard:
            now = time.monotonic()
            if now - self._told >= TELL_SECONDS:
                self._told = now
                self.reporter.progress(self.meter.progress())

    def file_done(self) -> None:
        """A file is whole."""
        self.meter.file_done()
        with self._guard:
            self.reporter.progress(self.meter.progress())


def _tell_result(
    manifest: "ModelManifest", target: Path, seed: int, made: "Synthesized", seconds: float, *, as_json: bool
) -> None:
    from runtime.weights.plan import decimal

    nbytes = sum(made.files.values())
    if as_json:
        emit(
            "result",
            model=manifest.name,
            directory=str(target.absolute()),
            seed=seed,
            seconds=round(seconds, 3),
            bytes=nbytes,
            files=[{"name": name, "bytes": size} for name, size in made.files.items()],
            kept=len(made.kept),
        )
        return
    written = nbytes - sum(made.files[name] for name in made.kept)
    pace = f", {decimal(written / max(seconds, 1e-6))}/s" if written else ""
    before = f", {len(made.kept)} of them there before" if made.kept else ""
    tell(f"{count(len(made.files), 'file')}, {decimal(nbytes)}{before}; {duration(seconds)}{pace}")
    place = shlex.quote(str(target))
    how = f"--weights {place} --model {manifest.name}"
    if manifest.embedded is not None:  # its name means the weights that ship
        how = f"--model {place}"
    tell(f"noise in the layout of {manifest.name}; to run it: t2v {how}")
    click.echo(target)
