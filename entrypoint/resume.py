"""`t2v resume`: a run that was ended goes on from its run file, to the same video."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from entrypoint import failures, output
from entrypoint.cache import choose_cache
from entrypoint.events import tell_warning
from entrypoint.options import (
    OUTPUT,
    SectionedCommand,
    attention_option,
    cache_option,
    memory_options,
    model_options,
    option,
    output_options,
    talk_options,
)
from entrypoint.run_file import RUN_SUFFIX, Job, RunFile, in_use
from runtime.errors import RequestError

if TYPE_CHECKING:
    from entrypoint.generate import Where
    from entrypoint.rerun import Chosen
    from entrypoint.saving import Saving
    from runtime.video import Video


@dataclass(frozen=True)
class Wishes:
    """What was typed; whatever was not is as the run file has it."""

    given: dict[str, Any]
    typed: frozenset[str]
    force: bool

    def of(self, name: str, kept: Any) -> Any:
        """The value of an option."""
        return self.given[name] if name in self.typed else kept


@click.command(cls=SectionedCommand)
@click.argument("path", metavar="FILE|DIRECTORY", type=click.Path(exists=True, path_type=Path))
@model_options(default="that of the run", others="that of the run")
@attention_option
@memory_options
@cache_option
@output_options
@option(OUTPUT, "--force", None, "Go on with other weights than those that the run began with.")
@talk_options
@click.pass_context
def resume(ctx: click.Context, path: Path, force: bool, json: bool, debug: bool, **given: Any) -> None:
    """Finish a run that was ended: interrupted, out of memory, or killed.

    FILE is what the run left, NAME.run.safetensors; of a DIRECTORY, all that are in it, one after the other.
    What was done is not done again, and the video is the same.
    """
    typed = {name for name in given if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    wishes = Wishes(given, frozenset(typed), force)
    if not path.is_dir():
        go_on(path, wishes, as_json=json)
        return
    files = list(_waiting(path))
    if not files:
        tell_warning(f"{path} has no run to go on with.")
    codes = [_one_of_many(file, wishes, as_json=json, debug=debug) for file in files]
    ctx.exit(max(codes, default=0))


def _waiting(directory: Path) -> Iterator[Path]:
    """The run files of `directory` that nobody works on, the oldest first."""
    for path in sorted(directory.glob(f"*{RUN_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns):
        if path.stat().st_size == 0:
            tell_warning(f"{path} is empty: its run ended before it had begun; nothing needs it.")
        elif in_use(path):
            tell_warning(f"{path} belongs to a run that is working, and is left to it.")
        else:
            yield path


def _one_of_many(path: Path, wishes: Wishes, *, as_json: bool, debug: bool) -> int:
    """The exit code; a run that fails does not keep the next from its video."""
    try:
        go_on(path, wishes, as_json=as_json)
    except Exception as error:  # noqa: BLE001 - told here, as at the edge, since other runs follow
        return failures.report(error, as_json=as_json, debug=debug)
    return 0


def go_on(path: Path, wishes: Wishes, *, as_json: bool) -> None:
    """Finish the run of `path`; raises what went wrong."""
    run = RunFile.take_over(path)
    try:
        _go_on(run, path, wishes, as_json=as_json)
    finally:
        run.release()


def _go_on(run: RunFile, path: Path, wishes: Wishes, *, as_json: bool) -> None:
    from entrypoint.account import Account
    from entrypoint.generate import load, rescuing, run_stages, save_result
    from entrypoint.progress import make_reporter
    from entrypoint.rerun import Chosen, changed_settings, request_of
    from entrypoint.saving import Saving
    from runtime.request import check

    job, step = run.job, run.step
    where, request = where_of(job, wishes), request_of(job.record)
    chosen = Chosen(*where.choose())
    checked = check(request, chosen.manifest, chosen.device)
    target = _target(job, path, wishes)
    _refuse_other_weights(path, job, chosen, decode_only=step == job.steps, force=wishes.force)

    phases = {"load": 100, "text": 1, "denoise": job.steps}
    phases |= {"decode": checked.latent_shape[1], "save": checked.frames}
    if step == job.steps:
        phases = {name: pieces for name, pieces in phases.items() if name not in ("text", "denoise")}
    run.reporter = reporter = make_reporter(phases, as_json=as_json)
    reporter.start(f"{path}: {step} of {job.steps} steps are done; model {job.model} on {chosen.device}")
    reporter.run_file(path)
    for message in changed_settings(job.record, chosen):
        reporter.warn(message)
    run.job = replace(
        job,
        model=where.model or job.model,
        weights=None if where.weights is None else str(where.weights.expanduser().absolute()),
        profile=where.profile,
        device=where.device,
        vram=where.vram,
        ram=where.ram,
        attention=where.attention,
        output=str(target.path.absolute()),
        overwrite=target.overwrite,
        contact_sheet=where.contact_sheet,
    )
    with reporter:
        account = Account(reporter)
        with rescuing(run, as_json=as_json) as kept, Saving(target, checked.fps, account) as saving:
            kept.worth = True
            if step == job.steps:
                video, latents = _decode(run, where, saving), None
            else:
                with load(where, request, run.point, account) as pipe:
                    video, latents = run_stages(pipe, request, run, saving, run.point)
            if step:
                video.metadata["resumed_after_step"] = step
            result = save_result(video, saving, run.job, latents)
        run.remove()
    reporter.result(result)


def _decode(run: RunFile, where: "Where", saving: "Saving") -> "Video":
    """The video of a run whose steps are done: the VAE is all that it needs."""
    from entrypoint.decode import decode_alone
    from runtime.video import Video

    assert run.point is not None and run.point.latents is not None
    record = run.job.record
    planned = record.get("plan")
    rung = planned.get("rung") if isinstance(planned, dict) else None  # another one has other pixels
    _, frames = decode_alone(run.point.latents, where, saving, rung)
    timings = {phase: round(seconds, 3) for phase, seconds in saving.account.timings.items()}
    return Video(frames, record["fps"], record | {"timings": timings})


def where_of(job: Job, wishes: Wishes) -> "Where":
    """Model, machine and files of the run, but for what was typed; RequestError if the model is gone."""
    from entrypoint.generate import Where

    model = wishes.of("model", job.model)
    if model == job.model and model.startswith("/") and not Path(model).is_dir():
        raise RequestError(
            f"The run was begun with the weights in {model}, which is no directory here; name theirs with "
            "--model DIR."
        )
    weights: Path | None = wishes.given["weights"]
    if "weights" not in wishes.typed and job.weights is not None and Path(job.weights).is_dir():
        weights = Path(job.weights)
    kept_cache = None if job.cache is None else Path(job.cache)
    return Where(
        model=model,
        weights=weights,
        profile=wishes.of("profile", job.profile),
        device=wishes.of("device", job.device),
        output=None,
        overwrite=False,
        contact_sheet=wishes.of("contact_sheet", job.contact_sheet),
        profile_changes=job.profile_changes,
        cache=choose_cache(wishes.given["cache"]) if "cache" in wishes.typed else kept_cache,
        vram=wishes.of("vram", job.vram),
        ram=wishes.of("ram", job.ram),
        attention=wishes.of("attention", job.attention),
        as_before=None if "attention" in wishes.typed else job.record,
    )


def _target(job: Job, path: Path, wishes: Wishes) -> output.Target:
    """Where the video goes: where it was to go, or the next free name; OutputError."""
    kept = Path(job.output)
    if "output" in wishes.typed:
        return output.choose(wishes.given["output"], kept.stem, wishes.of("overwrite", False))
    # A run file that lies beside its output may have moved with it, as from a container to its host; and it
    # replaces nothing anywhere else, whoever wrote it.
    original = path.parent / kept.name if job.beside else kept
    overwrite = wishes.of("overwrite", job.overwrite and job.beside)
    free = original if overwrite else output.free_name(original, output.SUFFIX)
    target = output.choose(free, kept.stem, overwrite)
    return output.Target(target.path, target.overwrite, explicit=False)


def _refuse_other_weights(path: Path, job: Job, chosen: "Chosen", *, decode_only: bool, force: bool) -> None:
    """RequestError unless every file that is still needed is the one that the run began with."""
    from entrypoint.rerun import named
    from runtime.checkpoint import find_component, open_checkpoint
    from runtime.loading import open_files
    from runtime.provenance import fingerprints

    manifest, directory = chosen.manifest, chosen.directory
    if decode_only:
        found = find_component(directory, manifest.subdirectories, manifest.files.vae)
        files = list(open_checkpoint(found, "vae").files)
    else:
        files = open_files(manifest, directory).paths
    known = set(job.record.get("files", {}).values())
    other = [name for name, digest in fingerprints(files).items() if digest not in known]
    if other and not force:
        raise RequestError(
            f"These weights are not those that the run of {path} began with: {named(other)}; name the others "
            "with --model or --weights, or add --force to go on with these."
        )
