"""One video from the shell: the cheap checks, the pipeline, the files; latents outlive a late failure."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoint import failures, output, surroundings
from entrypoint.account import Account
from entrypoint.events import Reporter, Result
from entrypoint.interrupt import leaving_in_time
from entrypoint.latents import keep_latents, latents_metadata
from entrypoint.progress import make_reporter
from entrypoint.run_file import RUN_SUFFIX, Job, RunFile
from entrypoint.saving import Saving
from entrypoint.table import count
from entrypoint.text_file import GivenText
from runtime.device import select_device
from runtime.errors import OutputCheckError
from runtime.memory.exhausted import is_out_of_memory
from runtime.profiles import DEFAULT_MODEL, DIRECTORY_MODEL, find_model, load_profile, manifest_of
from runtime.request import CheckedRequest, Request, check
from runtime.schema import ModelManifest, Profile

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline
    from runtime.resume import ResumePoint
    from runtime.tokenizer import Tokens
    from runtime.video import Video

UNKNOWN_SHOWN = 5  # words of a prompt that the vocabulary lacks; more would bury the sentence


Chosen = tuple[Profile, str, ModelManifest, Path]
"""Profile, device, model and the directory of its files."""


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
    cache: Path | None = None  # of text states
    text_states: Path | None = None  # where they come from, or go to
    vram: float | None = None  # GiB, at most
    ram: float | None = None  # GiB, at most
    attention: str = "auto"  # or the backend to begin with
    as_before: Mapping[str, Any] | None = None  # the record of a run to compute like, where that works here

    def machine(self) -> tuple[Profile, str]:
        """Profile and device; RequestError, DeviceError."""
        profile, device = select_device(self.device, load_profile(self.profile))
        if self.profile_changes:
            from runtime.lightx2v.config import changed_profile

            profile = changed_profile(profile, self.profile_changes)
        return profile, device

    def choose(self) -> Chosen:
        """Profile, device, model and the directory of its files; RequestError, DeviceError, WeightsError."""
        profile, device = self.machine()
        manifest, directory = find_model(self.model or DEFAULT_MODEL, profile, self.weights)
        return profile, device, manifest, directory


@dataclass
class Kept:
    """Whether a run that fails shall leave its run file behind."""

    worth: bool = False


@contextmanager
def rescuing(run: RunFile, *, as_json: bool) -> Iterator[Kept]:
    """Whatever ends the block, the run can go on: raises RunFailedError from it, which names the run file.

    A run that fails before it was `worth` keeping leaves none, unless it was interrupted or out of memory.
    """

    def failed(run_file: Path, error: BaseException) -> failures.RunFailedError:
        steps = run.job.steps
        latents = run.step == steps or (run.step > 0 and isinstance(error, OutputCheckError))
        return failures.RunFailedError(run_file, run.step, steps, latents)

    def last_words() -> int:
        interrupt: BaseException = KeyboardInterrupt()
        if run.path is not None:
            told = failed(run.path, interrupt)
            told.__cause__ = interrupt
            interrupt = told
        run.reporter.__exit__(None, None, None)  # a live display hides the cursor
        return failures.report(interrupt, as_json=as_json, debug=False)

    kept = Kept()
    try:
        with leaving_in_time(last_words):
            yield kept
    except (Exception, KeyboardInterrupt) as error:
        if not kept.worth and isinstance(error, Exception) and not is_out_of_memory(error):
            run.remove()
            raise
        path = run.rescue()
        run.release()
        if path is None:
            raise
        raise failed(path, error) from error


def generate(
    request: Request, where: Where, *, save_latents: bool, as_json: bool, stem: str | None = None
) -> None:
    """Run `request` from checks to files and tell of it; raises what went wrong.

    `stem` names the video where no file is asked for; None: its prompt and seed.
    """
    given = GivenText.of(where.text_states)
    request = given.prompted(request)
    checked, chosen, summary = _check(request, where)
    stem = stem or f"{output.slug(checked.prompt)}-{checked.seed}"
    target = output.choose(where.output, stem, where.overwrite)
    phases = {"load": 100, "text": 1, "denoise": checked.steps}
    phases |= {"decode": checked.latent_shape[1], "save": checked.frames}
    reporter = make_reporter(phases, as_json=as_json)
    reporter.start(summary)
    for note in where.notes:
        reporter.warn(note)
    with reporter:
        account = Account(reporter)
        run = RunFile(_job(checked, chosen, where, target, given, save_latents=save_latents), reporter)
        run.begin(target.path.with_suffix(RUN_SUFFIX))
        with rescuing(run, as_json=as_json) as kept, Saving(target, checked.fps, account) as saving:
            with load(where, request, given.point(), account) as pipe:
                kept.worth = True
                video, latents = run_stages(pipe, request, run, saving, given.point(), given)
            result = save_result(video, saving, run.job, latents)
        run.remove()
    reporter.result(result)


def save_result(video: "Video", saving: Saving, job: Job, latents: Path | None) -> Result:
    """Write the files of a finished run, and say what there is."""
    path, sheet = saving.save(video, contact_sheet=job.contact_sheet)
    account = saving.account
    frames, height, width, _ = video.frames.shape
    return Result(
        path=path,
        model=job.record["model"],
        seed=job.record["seed"],
        width=width,
        height=height,
        frames=frames,
        fps=video.fps,
        seconds=account.seconds,
        timings=account.timings,
        peak_memory=account.peaks,
        latents=latents,
        contact_sheet=sheet,
    )


def _check(request: Request, where: Where) -> tuple[CheckedRequest, Chosen, str]:
    """Refuse what can be refused without torch and weights; else what runs, and in a line what it makes."""
    profile, device = where.machine()
    model = where.model or DEFAULT_MODEL
    checked = check(request, manifest_of(model, profile), device)  # a wrong size before missing weights
    surroundings.check(surroundings.need_of(where, device, manifest_of(model, profile)))
    manifest, directory = find_model(model, profile, where.weights)
    size = f"{checked.width}x{checked.height}, {count(checked.frames, 'frame')}, seed {checked.seed}"
    summary = f"{size}; model {manifest.name} on {device} with profile {profile.name}"
    return checked, (profile, device, manifest, directory), summary


def _job(
    checked: CheckedRequest,
    chosen: Chosen,
    where: Where,
    target: output.Target,
    given: GivenText,
    *,
    save_latents: bool,
) -> Job:
    """All that another process would need; WeightsError for files that are missing or wrong."""
    from runtime.loading import open_files
    from runtime.provenance import fingerprints, versions

    profile, device, manifest, directory = chosen
    files = open_files(manifest, directory)
    given.check_encoder(list(files.text_encoder.files))
    record = asdict(checked) | {
        "model": manifest.name,
        "quantization": manifest.quantization,
        "profile": profile.name,
        "device": device,
        "dtype": profile.dtype,
        "vae_dtype": profile.vae.dtype,
        "files": fingerprints(files.paths),
        "versions": versions(),
    }
    named = manifest.family != DIRECTORY_MODEL
    own_profile = Path(where.profile).expanduser()
    return Job(
        model=manifest.name if named else str(Path(where.model or DEFAULT_MODEL).expanduser().absolute()),
        weights=None if where.weights is None else str(where.weights.expanduser().absolute()),
        profile=str(own_profile.absolute()) if own_profile.is_file() else where.profile,
        device=where.device,
        cache=None if where.cache is None else str(where.cache),
        vram=where.vram,
        ram=where.ram,
        attention=where.attention,
        profile_changes=dict(where.profile_changes),
        output=str(target.path.absolute()),
        beside=True,
        overwrite=target.overwrite,
        contact_sheet=where.contact_sheet,
        save_latents=save_latents,
        record=record,
    )


def load(where: Where, request: Request, start: "ResumePoint | None", account: Account) -> "Pipeline":
    """The pipeline of `where`, planned for `request` from `start`.

    Raises RequestError, WeightsError, DeviceError and PlanError.
    """
    from runtime.pipeline import Pipeline

    options: dict[str, Any] = {
        "cache": where.cache,
        "vram": where.vram,
        "ram": where.ram,
        "attention": where.attention,
        "as_before": where.as_before,
        "request": request,
        "text_known": start is not None,
        "on_plan": account.reporter.plan,
        "on_stage": account.stage,
    }
    model = where.model or DEFAULT_MODEL
    if where.profile_changes:
        from runtime.lightx2v.pipeline import load_pipeline

        profile, device = where.machine()
        wanted = where.profile_changes.get("quantization")
        return load_pipeline(model, where.weights, profile, device, wanted, **options)
    return Pipeline.load(where.weights, model=model, profile=where.profile, device=where.device, **options)


def run_stages(
    pipe: "Pipeline",
    request: Request,
    run: RunFile,
    saving: Saving,
    start: "ResumePoint | None",
    given: GivenText | None = None,
) -> "tuple[Video, Path | None]":
    """Run `request` from `start`, each point on the disk before the next; returns video and latents.

    The frames go to `saving` as they are decoded.
    """
    latents, checked, tokens = None, check(request, pipe.manifest, pipe.device), None
    account = saving.account
    for stage in pipe.stages(request, start):
        if stage.video is not None:
            return stage.video, latents
        for note in stage.notes:
            account.reporter.warn(note)
        if stage.tokens is not None and stage.point is not None:
            tokens = stage.tokens
            _warn_about_prompt(tokens, account.reporter)
            if given is not None:
                given.exchange(pipe, tokens, stage.point, checked.prompt)
        if stage.point is not None and tokens is not None:
            run.know(pipe.record(checked, tokens))
            run.take(stage.point)
        if run.job.save_latents and stage.phase == "denoise" and stage.step == stage.steps:
            latents = _save_asked(run, saving.target.latents, account.reporter)
        saving.take(stage)
        account.stage(stage)
    raise AssertionError("the pipeline ended without a video")


def _save_asked(run: RunFile, path: Path, reporter: Reporter) -> Path | None:
    """--save-latents: at once, so that whatever happens to the decode they are there."""
    assert run.point is not None and run.point.latents is not None
    kept = keep_latents(
        run.point.latents, path, latents_metadata(run.job.record, run.job.model, run.point.step)
    )
    if kept is None:
        reporter.warn(f"the latents could not be saved, neither as {path} nor in the temporary directory.")
    elif kept != path:
        reporter.warn(f"{path} could not be written, so the latents are in {kept}.")
    return kept


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
