"""Latents that were kept become a video: the VAE alone, in the model that the latents name."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from entrypoint import output
from entrypoint.events import Result
from entrypoint.generate import Account, Where, save_video
from entrypoint.latents import LATENTS_SUFFIX, SavedLatents, read_latents
from entrypoint.progress import make_reporter
from runtime.device import confirm_device
from runtime.errors import RequestError

if TYPE_CHECKING:
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
    target = output.choose(where.output, path.name.removesuffix(LATENTS_SUFFIX), where.overwrite)
    phases = {"load": 100, "decode": saved.latents.shape[1], "save": 1}
    with make_reporter(phases, as_json=as_json) as reporter:
        account = Account(reporter)
        if saved.step != saved.steps:
            reporter.warn(f"{path} holds step {saved.step} of {saved.steps}: the video will show noise.")
        manifest, device, vae = _load(where, account)
        frames = _frames(vae, saved, device, account)
        video = _video(frames, saved, manifest, fps)
        video_path, sheet = save_video(video, target.now(), account, contact_sheet=where.contact_sheet)
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


def _load(where: Where, account: Account) -> "tuple[ModelManifest, str, VAE]":
    """The VAE of the model, at home; the other parts are not touched and need not be there."""
    profile, device, manifest, directory = where.choose()

    from runtime import loading
    from runtime.checkpoint import find_component, open_checkpoint
    from runtime.pipeline import Stage

    begun = time.perf_counter()
    checkpoint = open_checkpoint(
        find_component(directory, manifest.subdirectories, manifest.files.vae), "vae"
    )
    confirm_device(device)
    _, home = loading.home_devices(profile, device)
    vae = loading.load_vae(checkpoint, manifest, home, loading.DTYPES[profile.vae.dtype])
    account.stage(Stage("load", 100, 100, time.perf_counter() - begun, checkpoint.nbytes))
    return manifest, device, vae


def _frames(vae: "VAE", saved: SavedLatents, device: str, account: Account) -> np.ndarray:
    """All frames, uint8 (F, H, W, 3), checked."""
    from runtime.check import check_frames
    from runtime.pipeline import Stage, decode

    begun, steps, nbytes = time.perf_counter(), saved.latents.shape[1], 0
    pieces = []
    for piece in decode(vae, saved.latents[None], device):
        pieces.append(piece)
        nbytes += piece.nbytes
        account.stage(Stage("decode", len(pieces), steps, time.perf_counter() - begun, nbytes))
    frames = np.concatenate(pieces)
    check_frames(frames)
    return frames


def _video(frames: np.ndarray, saved: SavedLatents, manifest: "ModelManifest", fps: int | None) -> "Video":
    from runtime.provenance import versions
    from runtime.video import Video

    metadata = {
        "prompt": saved.prompt,
        "seed": saved.seed,
        "model": manifest.name,
        "decoded_from": saved.metadata,
        "versions": versions(),
    }
    recorded = saved.fps if saved.fps in range(1, MAX_FPS + 1) else None  # the file may say anything
    return Video(frames, fps or recorded or FALLBACK_FPS, metadata)
