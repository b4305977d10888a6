"""One video from the shell: the cheap checks, the pipeline, the files; latents outlive a late failure."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoint import output
from entrypoint.events import Peak, Reporter, Result
from entrypoint.failures import RunFailedError
from entrypoint.latents import keep_latents
from entrypoint.progress import make_reporter
from entrypoint.table import count
from runtime.device import select_device
from runtime.errors import OutputCheckError, OutputError
from runtime.memory.meter import host_peak
from runtime.profiles import DEFAULT_MODEL, DIRECTORY_MODEL, find_model, load_profile, manifest_of
from runtime.request import CheckedRequest, Request, check
from runtime.schema import ModelManifest, Profile

if TYPE_CHECKING:
    from torch import Tensor

    from runtime.pipeline import Pipeline, Stage
    from runtime.tokenizer import Tokens
    from runtime.video import Video

UNKNOWN_SHOWN = 5  # words of a prompt that the vocabulary lacks; more would bury the sentence


@dataclass(frozen=True)
class Where:
    """Which model runs, on what, and where its files go."""

    model: str | None  # None: the default, or for latents that which made them
    weights: Path | None
    profile: str
    device: str
    output: Path | None
    overwrite: bool
    contact_sheet: bool
    profile_changes: Mapping[str, Any] = field(default_factory=dict)  # by a --config: dotted field -> value
    notes: tuple[str, ...] = ()  # on the --config, told before the run

    def machine(self) -> tuple[Profile, str]:
        """Profile and device; RequestError, DeviceError."""
        profile, device = select_device(self.device, load_profile(self.profile))
        if self.profile_changes:
            from runtime.lightx2v.config import changed_profile

            profile = changed_profile(profile, self.profile_changes)
        return profile, device

    def choose(self) -> tuple[Profile, str, ModelManifest, Path]:
        """Profile, device, model and the directory of its files; RequestError, DeviceError, WeightsError."""
        profile, device = self.machine()
        manifest, directory = find_model(self.model or DEFAULT_MODEL, profile, self.weights)
        return profile, device, manifest, directory


@dataclass
class Account:
    """What a run has cost so far, phase by phase, and whom to tell."""

    reporter: Reporter
    begun: float = field(default_factory=time.perf_counter)
    timings: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, Peak] = field(default_factory=dict)

    def stage(self, stage: "Stage") -> None:
        """Take note of a piece of work, and tell of it."""
        self.timings[stage.phase] = stage.seconds
        self.peaks[stage.phase] = Peak(host_peak(), _vram_peak(forget=stage.step == stage.steps))
        self.reporter.stage(stage)

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.begun


def _vram_peak(*, forget: bool) -> int | None:
    """The peak since it was last forgotten, of the GPU that has the highest; None if none is in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    devices = range(torch.cuda.device_count())
    peak = max(torch.cuda.max_memory_reserved(device) for device in devices)
    for device in devices if forget else ():
        torch.cuda.reset_peak_memory_stats(device)
    return peak


@dataclass
class Keeper:
    """The last latents of a run, and where they go if they are asked for or if what follows them fails."""

    path: Path
    metadata: dict[str, str]
    latents: "Tensor | None" = None
    step: int = 0
    steps: int = 0
    kept: Path | None = None

    def take(self, stage: "Stage") -> None:
        """Remember the latents of a denoise step."""
        if stage.latents is not None:
            self.latents, self.step, self.steps = stage.latents, stage.step, stage.steps

    @property
    def finished(self) -> bool:
        """Whether all denoise steps are done."""
        return self.latents is not None and self.step == self.steps

    def keep(self) -> Path | None:
        """Save them, once; None if there are none, or no place for them."""
        if self.latents is not None and self.kept is None:
            metadata = self.metadata | {"step": str(self.step), "steps": str(self.steps)}
            self.kept = keep_latents(self.latents, self.path, metadata)
        return self.kept

    @contextmanager
    def rescuing(self) -> Iterator[None]:
        """Keep the latents if the block fails when they are finished, or if its output failed its check."""
        try:
            yield
        except Exception as error:
            if (self.finished or isinstance(error, OutputCheckError)) and (kept := self.keep()):
                raise RunFailedError(kept, self.step, self.steps) from error
            raise


def generate(
    request: Request, where: Where, *, save_latents: bool, as_json: bool, stem: str | None = None
) -> None:
    """Run `request` from checks to files and tell of it; raises what went wrong.

    `stem` names the video where no file is asked for; None: its prompt and seed.
    """
    checked, summary = _check(request, where)
    stem = stem or f"{output.slug(checked.prompt)}-{checked.seed}"
    target = output.choose(where.output, stem, where.overwrite)
    phases = {"load": 100, "text": 1, "denoise": checked.steps, "decode": checked.latent_shape[1], "save": 1}
    reporter = make_reporter(phases, as_json=as_json)
    reporter.start(summary)
    for note in where.notes:
        reporter.warn(note)
    with reporter:
        account = Account(reporter)
        pipe = _load(where, account)
        keeper = Keeper(target.latents, _describe(checked, where, pipe))
        with keeper.rescuing():
            video = _run(pipe, request, keeper, account, save_latents=save_latents)
            target = target.now()
            saved, sheet = save_video(video, target, account, contact_sheet=where.contact_sheet)
        result = Result(
            path=saved,
            model=pipe.manifest.name,
            seed=checked.seed,
            width=checked.width,
            height=checked.height,
            frames=checked.frames,
            fps=checked.fps,
            seconds=account.seconds,
            timings=account.timings,
            peak_memory=account.peaks,
            latents=keeper.kept,
            contact_sheet=sheet,
        )
    reporter.result(result)


def save_video(
    video: "Video", target: output.Target, account: Account, *, contact_sheet: bool
) -> tuple[Path, Path | None]:
    """Write the mp4 and, if asked for, the contact sheet; returns both paths."""
    from runtime.pipeline import Stage

    begun = time.perf_counter()
    sheet_path = target.contact_sheet  # before the video has its name, so that both get the same number
    path = video.save(target.path, overwrite=target.overwrite)
    sheet = _save_sheet(video, sheet_path, account.reporter) if contact_sheet else None
    account.stage(Stage("save", 1, 1, time.perf_counter() - begun, path.stat().st_size))
    return path, sheet


def _save_sheet(video: "Video", path: Path, reporter: Reporter) -> Path | None:
    from runtime.video import contact_sheet

    try:
        return contact_sheet(video.frames, path)
    except OutputError as error:  # the video is there, which is what was asked for first
        reporter.warn(f"there is no contact sheet: {error}")
        return None


def _check(request: Request, where: Where) -> tuple[CheckedRequest, str]:
    """Refuse what can be refused without torch and weights; else the request, and in a line what it makes."""
    profile, device = where.machine()
    model = where.model or DEFAULT_MODEL
    checked = check(request, manifest_of(model, profile), device)  # a wrong size before missing weights
    manifest, _ = find_model(model, profile, where.weights)
    size = f"{checked.width}x{checked.height}, {count(checked.frames, 'frame')}, seed {checked.seed}"
    return checked, f"{size}; model {manifest.name} on {device} with profile {profile.name}"


def _load(where: Where, account: Account) -> "Pipeline":
    from runtime.pipeline import Pipeline

    if where.profile_changes:
        from runtime.lightx2v.pipeline import load_pipeline

        profile, device = where.machine()
        model, wanted = where.model or DEFAULT_MODEL, where.profile_changes.get("quantization")
        return load_pipeline(model, where.weights, profile, device, wanted, account.stage)
    return Pipeline.load(
        where.weights,
        model=where.model or DEFAULT_MODEL,
        profile=where.profile,
        device=where.device,
        on_stage=account.stage,
    )


def _run(
    pipe: "Pipeline", request: Request, keeper: Keeper, account: Account, *, save_latents: bool
) -> "Video":
    for stage in pipe.stages(request):
        if stage.video is not None:
            return stage.video
        if stage.tokens is not None:
            _warn_about_prompt(stage.tokens, account.reporter)
        keeper.take(stage)
        if save_latents and stage.phase == "denoise" and keeper.finished:
            _save_asked(keeper, account.reporter)
        account.stage(stage)
    raise AssertionError("the pipeline ended without a video")


def _save_asked(keeper: Keeper, reporter: Reporter) -> None:
    """--save-latents: at once, so that whatever happens to the decode they are there."""
    kept = keeper.keep()
    if kept is None:
        reporter.warn(
            f"the latents could not be saved, neither as {keeper.path} nor in the temporary directory."
        )
    elif kept != keeper.path:
        reporter.warn(f"{keeper.path} could not be written, so the latents are in {kept}.")


def _describe(checked: CheckedRequest, where: Where, pipe: "Pipeline") -> dict[str, str]:
    """Metadata for the latents: with it, `t2v decode` needs no options."""
    directory = where.model if pipe.manifest.family == DIRECTORY_MODEL else None
    return {
        "prompt": checked.prompt,
        "seed": str(checked.seed),
        "fps": str(checked.fps),
        "sampler": checked.sampler,
        "model": pipe.manifest.name if directory is None else str(Path(directory).expanduser().absolute()),
    }


def _warn_about_prompt(tokens: "Tokens", reporter: Reporter) -> None:
    if tokens.truncated:
        reporter.warn(
            f"the prompt has {tokens.total} tokens and the model reads {tokens.n}: the rest is ignored; "
            "put what matters first, or shorten it."
        )
    if tokens.unknown:
        more = len(tokens.unknown) - UNKNOWN_SHOWN
        words = ", ".join(tokens.unknown[:UNKNOWN_SHOWN]) + (f" and {more} more" if more > 0 else "")
        reporter.warn(f"the model does not know: {words}; other words may serve better.")
