"""The page that tells the story: prompt -> tokens -> text states -> latents -> frames -> mp4.

    pipe = Pipeline.load(weights="/weights", profile="rtx4070")
    video = pipe("A man with short gray hair plays a red electric guitar.", seed=42)
    video.save("guitar.mp4")

`Pipeline.stages` is the same run as a generator: it stops after every piece of work, so that its caller can
report progress, keep the latents, or leave.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime import loading
from runtime.check import check_decoded, check_frames, check_latents
from runtime.device import confirm_device, select_device
from runtime.memory.visit import visiting
from runtime.profiles import DEFAULT_MODEL, DIRECTORY_MODEL, find_model, load_profile
from runtime.provenance import fingerprints, versions
from runtime.request import CheckedRequest, Request, check
from runtime.sampler import denoise, draw_noise, schedule
from runtime.schema import ModelManifest, Profile
from runtime.text_encoder import TextEncoder
from runtime.tokenizer import PromptTokenizer, Tokens
from runtime.transformer import Transformer
from runtime.vae import VAE
from runtime.video import RECORD_FORMAT, Video, frames_to_uint8


@dataclass(frozen=True)
class Stage:
    """Where a run stands: `step` of `steps` pieces of `phase` are done, `seconds` after the phase began."""

    phase: str  # load, text, denoise, decode, done
    step: int
    steps: int
    seconds: float
    bytes: int = 0  # that the phase has produced so far (weights read, for load)
    latents: Tensor | None = None  # (16, T, h, w) fp32, after each denoise step
    tokens: Tokens | None = None  # with the phase "text": whether the prompt was cut or has unknown words
    video: Video | None = None  # with the phase "done"

    @property
    def eta(self) -> float | None:
        """Seconds until the phase ends at its pace so far; None before anything is known."""
        return self.seconds / self.step * (self.steps - self.step) if self.step else None


class Pipeline:
    """One loaded model: text encoder, transformer, VAE and tokenizer, with the profile that placed them."""

    def __init__(
        self,
        manifest: ModelManifest,
        profile: Profile,
        device: str,
        tokenizer: PromptTokenizer,
        text_encoder: TextEncoder,
        transformer: Transformer,
        vae: VAE,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.manifest = manifest
        self.profile = profile
        self.device = device
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.vae = vae
        self.provenance = provenance or {}

    @classmethod
    def load(
        cls,
        weights: str | Path | None = None,
        *,
        model: str | Path = DEFAULT_MODEL,
        profile: str | Path | Profile = "auto",
        device: str = "auto",
        on_stage: Callable[[Stage], None] | None = None,
    ) -> "Pipeline":
        """Load a model's four parts onto the devices that `profile` names.

        `model` is a manifest's name, a family (the profile picks the variant) or a checkpoint directory;
        `weights` the directory that holds its files (default /weights; the demo model brings its own).
        Raises RequestError for unknown names, WeightsError for files, DeviceError for a missing GPU.
        """
        asked = profile if isinstance(profile, Profile) else load_profile(profile)
        chosen, device = select_device(device, asked)
        given = None if weights is None else Path(weights)
        manifest, directory = find_model(model, chosen, given)
        files = loading.open_files(manifest, directory)
        confirm_device(device)
        text_home, vae_home = loading.home_devices(chosen, device)
        dtype, vae_dtype = loading.DTYPES[chosen.dtype], loading.DTYPES[chosen.vae.dtype]
        read = _LoadProgress(files.nbytes, on_stage)
        return cls(
            manifest,
            chosen,
            device,
            tokenizer=loading.load_tokenizer(files, manifest),
            text_encoder=loading.load_text_encoder(files.text_encoder, manifest, text_home, dtype, read),
            transformer=loading.load_transformer(files.transformer, manifest, device, dtype, read),
            vae=loading.load_vae(files.vae, manifest, vae_home, vae_dtype, read),
            provenance={
                "family": manifest.family,
                # Only a model without a name needs its path: a video that is shown around should not tell it.
                **({"weights": str(directory.absolute())} if manifest.family == DIRECTORY_MODEL else {}),
                **({} if device == "cpu" else {"gpu": torch.cuda.get_device_name(device)}),
                "files": fingerprints(files.paths),
                "versions": versions(),
            },
        )

    def __call__(
        self,
        prompt: str,
        *,
        num_frames: int | None = None,
        on_stage: Callable[[Stage], None] | None = None,
        **options: Any,
    ) -> Video:
        """Make one video; `options` are the fields of `Request`: seed, height, width, steps, sampler..."""
        for stage in self.stages(Request(prompt=prompt, frames=num_frames, **options)):
            if on_stage is not None:
                on_stage(stage)
        assert stage.video is not None  # the last stage of a run that did not raise
        return stage.video

    def stages(self, request: Request) -> Iterator[Stage]:
        """Run `request` piece by piece. Raises RequestError first, OutputCheckError for a broken result."""
        checked = check(request, self.manifest, self.device)
        clock = _PhaseClock()

        clock.begin("text")
        tokens = self.tokenizer(checked.prompt)
        text_states = self.encode_text(tokens)  # (1, text_len, text_dim)
        negative_states = self.encode_negative(checked)
        yield replace(clock.stage(1, 1, text_states.nbytes), tokens=tokens)

        clock.begin("denoise")
        denoised = self.denoise(text_states, checked, negative_states)  # (1, 16, T, h, w) each
        for step, latents in enumerate(denoised, start=1):
            check_latents(latents, step, checked.steps)
            yield clock.stage(step, checked.steps, latents.nbytes, latents=latents[0].cpu())

        clock.begin("decode")
        pieces: list[np.ndarray] = []
        for piece in self.decode(latents):  # (1 or 4, H, W, 3)
            pieces.append(piece)
            yield clock.stage(len(pieces), latents.shape[2], sum(p.nbytes for p in pieces))
        frames = np.concatenate(pieces)  # (F, H, W, 3)
        check_frames(frames)

        video = Video(frames, checked.fps, self._metadata(checked, tokens, clock.seconds))
        yield Stage("done", 1, 1, sum(clock.seconds.values()), frames.nbytes, video=video)

    @torch.inference_mode()
    def encode_text(self, tokens: Tokens) -> Tensor:
        """Text states (1, text_len, text_dim): the encoder's rows for the prompt, then rows of zeros."""
        # Padding changes nothing in the rows before it, so it is not encoded at all.
        ids = torch.tensor([tokens.ids[: tokens.n]], device=self.device)  # (1, n)
        with visiting(self.text_encoder, self.device):
            states = self.text_encoder(ids, torch.ones_like(ids, dtype=torch.bool))  # (1, n, text_dim)
        return F.pad(states, (0, 0, 0, self.transformer.config.text_len - tokens.n))

    def encode_negative(self, request: CheckedRequest) -> Tensor | None:
        """Text states of what the video should move away from; None without guidance."""
        if request.guidance == 1:
            return None
        negative = request.negative_prompt
        return self.encode_text(self.tokenizer(negative) if negative.strip() else self.tokenizer.nothing())

    @torch.inference_mode()
    def denoise(
        self, text_states: Tensor, request: CheckedRequest, negative_states: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Latents (1, 16, T, h, w), fp32, after each step.

        With `negative_states`, classifier-free guidance: v = v_neg + guidance * (v_text - v_neg).
        """
        generator = torch.Generator(self.device if request.noise_device == "cuda" else "cpu")
        generator.manual_seed(request.seed)
        noise = draw_noise(request.latent_shape, generator)[None].to(self.device)

        def velocity_of(latents: Tensor, t: float) -> Tensor:
            time = torch.tensor([t], device=self.device)
            velocity = self.transformer(latents, time, text_states)
            if negative_states is None:
                return velocity
            away = self.transformer(latents, time, negative_states)
            return away + request.guidance * (velocity - away)

        sigmas = schedule(request.steps, request.shift)
        yield from denoise(velocity_of, noise, sigmas, request.sampler, generator)

    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Frames of each latent frame in turn, uint8 (1 or 4, H, W, 3), from latents (1, 16, T, h, w)."""
        return decode(self.vae, latents, self.device)

    def _metadata(self, request: CheckedRequest, tokens: Tokens, timings: dict[str, float]) -> dict[str, Any]:
        """What the mp4 says of its own making: enough to make it again, and to know with what."""
        return {
            "format": RECORD_FORMAT,
            **asdict(request),
            "tokens": tokens.n,
            "prompt_truncated": tokens.truncated,
            "model": self.manifest.name,
            "quantization": self.manifest.quantization,
            "profile": self.profile.name,
            "device": self.device,
            "dtype": self.profile.dtype,
            "vae_dtype": self.profile.vae.dtype,
            "timings": {phase: round(seconds, 3) for phase, seconds in timings.items()},
            **self.provenance,
        }


@torch.inference_mode()
def decode(vae: VAE, latents: Tensor, device: str) -> Iterator[np.ndarray]:
    """`Pipeline.decode` for a VAE alone, wherever it rests: latents that were kept need no transformer."""
    first_frame = 0
    with visiting(vae, device):
        for frames in vae.decode_chunks(latents.to(device)):  # (1, 3, f, H, W)
            check_decoded(frames, first_frame)
            first_frame += frames.shape[2]
            yield frames_to_uint8(frames[0])


class _PhaseClock:
    """Seconds of each phase, and the stages that tell of them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._phase, self._began = "", 0.0

    def begin(self, phase: str) -> None:
        self._phase, self._began = phase, time.perf_counter()

    def stage(self, step: int, steps: int, nbytes: int, latents: Tensor | None = None) -> Stage:
        seconds = time.perf_counter() - self._began
        self.seconds[self._phase] = seconds
        return Stage(self._phase, step, steps, seconds, nbytes, latents=latents)


class _LoadProgress:
    """Turns the bytes that loading reads into stages, a hundred at most."""

    def __init__(self, total: int, on_stage: Callable[[Stage], None] | None) -> None:
        self.total, self.on_stage = max(total, 1), on_stage
        self.read, self.told = 0, 0
        self.began = time.perf_counter()

    def __call__(self, nbytes: int) -> None:
        self.read += nbytes
        percent = min(100, 100 * self.read // self.total)
        if self.on_stage is not None and percent > self.told:
            self.told = percent
            self.on_stage(Stage("load", percent, 100, time.perf_counter() - self.began, self.read))
