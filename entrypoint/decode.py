"""Latents that were kept become a video: the VAE alone, in the model that the latents name."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from entrypoint import output
from entrypoint.account import Account
from entrypoint.events import Result
from entrypoint.generate import Where
from entrypoint.latents import LATENTS_SUFFIX, SavedLatents, read_latents
from entrypoint.progress import make_reporter
from entrypoint.run_file import RUN_SUFFIX
from entrypoint.saving import Saving
from runtime.device import confirm_device
from runtime.errors import OutputCheckError, RequestError
from runtime.memory.exhausted import is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

    from runtime.layers.tiles import Rung
    from runtime.schema import ModelManifest
    from runtime.vae import VAE
    from runtime.video import Video

FALLBACK_FPS = 16
MAX_FPS = 120  # as for a request


def decode(path: Path, where: Where, *, prefer_own_model: bool, fps: int | None, as_json: bool) -> None:
    """Decode the latents file `path` and write its video; raises what went wrong.

    `prefer_own_model`: the model that the latents name goes before that of `where`.
    """
    if fps is not None and not 1 <= fps <= MAX_FPS:
        raise RequestError(f"fps is {fps}; expected 1 to {MAX_FPS}.")
    saved = read_latents(path)
    models = (saved.model, where.model) if prefer_own_model else (where.model, saved.model)
    where = replace(where, model=models[0] or models[1] or None)
    stem = path.name.removesuffix(LATENTS_SUFFIX).removesuffix(RUN_SUFFIX)
    target = output.choose(where.output, stem, where.overwrite)
    length = saved.latents.shape[1]
    phases = {"load": 100, "decode": length, "save": 4 * (length - 1) + 1}
    with (
        make_reporter(phases, as_json=as_json) as reporter,
        Saving(target, fps or _recorded_fps(saved), Account(reporter)) as saving,
    ):
        account = saving.account
        if saved.step != saved.steps:
            reporter.warn(f"{path} holds step {saved.step} of {saved.steps}: the video will show noise.")
        manifest, frames = decode_alone(saved.latents, where, saving)
        video = _video(frames, saved, manifest, saving.fps)
        video_path, sheet = saving.save(video, contact_sheet=where.contact_sheet)
        result = Result(
            path=video_path,
            model=manifest.name,
            seed=saved.seed,
            width=frames.shape[2],
            height=frames.shape[1],
            frames=len(frames),
            fps=video.fps,
            seconds=account.seconds,
            timings=account.timings,
            peak_memory=account.peaks,
            contact_sheet=sheet,
        )
    reporter.result(result)


def decode_alone(
    latents: "Tensor", where: Where, saving: Saving, rung: str | None = None
) -> "tuple[ModelManifest, np.ndarray]":
    """The model of `where` and the frames, uint8 (F, H, W, 3), of `latents` (16, T, h, w).

    The VAE's decoder alone is loaded; the other parts are not touched and need not be there. `rung`: the name
    of that to decode on, else the fastest that fits. When memory runs out the next leaner one is taken. The
    frames go to `saving` as they are decoded.
    """
    account = saving.account
    manifest, device, vae = _load(where, account)
    ladder = _ladder(vae, latents, device, where.vram, rung)
    for number, one in enumerate(ladder, start=1):
        try:
            return manifest, _right_frames(vae, latents, device, one, saving)
        except Exception as error:
            if number == len(ladder) or not is_out_of_memory(error):
                raise
        # Outside of the handler, whose traceback would keep alive what the attempt had allocated.
        _give_back(device)
        account.reporter.warn(
            f"memory ran out in the decode; going on with smaller tiles ({one.name} failed)."
        )
    raise AssertionError("a ladder has a last rung")


def _load(where: Where, account: Account) -> "tuple[ModelManifest, str, VAE]":
    profile, device, manifest, directory = where.choose()

    from runtime import loading
    from runtime.checkpoint import find_component, open_checkpoint
    from runtime.memory import allocator
    from runtime.stages import Stage

    begun = time.perf_counter()
    checkpoint = open_checkpoint(
        find_component(directory, manifest.subdirectories, manifest.files.vae), "vae"
    )
    allocator.settle()
    confirm_device(device)
    dtype = loading.DTYPES[profile.vae.dtype]
    vae = loading.load_vae(checkpoint, manifest, device, dtype, encoder=False)
    account.stage(Stage("load", 100, 100, time.perf_counter() - begun, checkpoint.nbytes))
    return manifest, device, vae


def _ladder(
    vae: "VAE", latents: "Tensor", device: str, ceiling: float | None, wanted: str | None
) -> "list[Rung]":
    """The rungs to try, the first one first; `ceiling` in GiB."""
    from runtime.memory.costs import reserved
    from runtime.memory.decode_costs import WHOLE, decode_bytes, decode_workspace, rungs

    _, length, height, width = latents.shape
    sizes = height * 8, width * 8, (length - 1) * 4 + 1
    ladder = list(rungs(*sizes[:2]))
    names = [rung.name for rung in ladder]
    if wanted in names:
        return ladder[names.index(wanted) :]
    if device == "cpu":
        return [WHOLE]
    import torch

    room = torch.cuda.mem_get_info(device)[0]
    room = room if ceiling is None else min(room, int(ceiling * 2**30))
    itemsize = next(vae.parameters()).element_size()
    lives = [decode_bytes(rung, *sizes, vae.config.base_dim, itemsize) for rung in ladder]
    needs = [live + decode_workspace(live) for live in lives]
    fitting = (number for number, need in enumerate(needs) if need + reserved(need) <= room)
    first = next(fitting, len(ladder) - 1)
    return ladder[first:]


def _give_back(device: str) -> None:
    from runtime.memory.visit import give_back

    give_back(device)


def _right_frames(vae: "VAE", latents: "Tensor", device: str, rung: "Rung", saving: Saving) -> np.ndarray:
    """`_frames`, on a GPU once more with plain kernels where they fail their check."""
    from runtime.kernels.launch import twins

    try:
        return _frames(vae, latents, device, rung, saving)
    except OutputCheckError as error:
        if device == "cpu":  # there the kernels are plain
            raise
        saving.account.reporter.warn(f"{error} It is decoded again with plain kernels.")
    with twins():
        return _frames(vae, latents, device, rung, saving)


def _frames(vae: "VAE", latents: "Tensor", device: str, rung: "Rung", saving: Saving) -> np.ndarray:
    """All frames, uint8 (F, H, W, 3), checked."""
    from runtime.frames import Decoding
    from runtime.stages import Stage

    begun = time.perf_counter()
    decoding = Decoding(vae, latents[None].to(device), rung)
    for piece in decoding:
        seconds = time.perf_counter() - begun
        stage = Stage("decode", piece, decoding.pieces, seconds, decoding.nbytes)
        saving.take(replace(stage, frames=decoding.frames, whole=decoding.whole))
        saving.account.stage(stage)
    return decoding.frames


def _video(frames: np.ndarray, saved: SavedLatents, manifest: "ModelManifest", fps: int) -> "Video":
    from runtime.provenance import versions
    from runtime.video import Video

    metadata = {
        "prompt": saved.prompt,
        "seed": saved.seed,
        "model": manifest.name,
        "decoded_from": saved.metadata,
        "versions": versions(),
    }
    return Video(frames, fps, metadata)


def _recorded_fps(saved: SavedLatents) -> int:
    recorded = saved.fps if saved.fps in range(1, MAX_FPS + 1) else None  # the file may say anything
    return recorded or FALLBACK_FPS
