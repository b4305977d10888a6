"""The page that tells the story: prompt -> tokens -> text states -> latents -> frames -> mp4.

    pipe = Pipeline.load(weights="/weights", profile="rtx4070")
    video = pipe("A man with short gray hair plays a red electric guitar.", seed=42)
    video.save("guitar.mp4")

`Pipeline.stages` is the same run as a generator: it stops after every piece of work, so that its caller can
report progress, keep the latents, or leave.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from runtime import loading
from runtime.checkpoint.synth import NOTE_FILE
from runtime.denoising import Denoising
from runtime.device import confirm_device, gpu_of, select_device
from runtime.encoding import Encoding, text_cache
from runtime.errors import OutputCheckError, first_sentence
from runtime.fitting import Fitting, Planner
from runtime.frames import Decoding
from runtime.guard import Fault
from runtime.layers.backends import check_name
from runtime.layers.tiles import WHOLE, Rung
from runtime.memory import allocator
from runtime.memory.exhausted import is_out_of_memory
from runtime.memory.machine import look
from runtime.memory.plan import Plan
from runtime.memory.planning import job_of, plan_run, sizes_for
from runtime.memory.sizes import ModelSizes
from runtime.parts import Parts, PlannedParts
from runtime.profiles import DEFAULT_MODEL, DIRECTORY_MODEL, find_model, load_profile
from runtime.provenance import fingerprints, versions
from runtime.request import CheckedRequest, Request, check
from runtime.resume import ResumePoint, restore
from runtime.sampler import draw_noise
from runtime.schema import Envelope, ModelManifest, Profile
from runtime.stages import OnStage, PhaseClock, Stage
from runtime.text_states import TextCache
from runtime.tokenizer import PromptTokenizer, Tokens
from runtime.tuning import Store, apply_tiles, choose_attention, open_store
from runtime.video import RECORD_FORMAT, Video
from runtime.ways import Ways, choose_ways

__all__ = ["Pipeline", "Stage"]


class Pipeline:
    """One model, its parts placed by a plan, and the story of a run. A context manager: `close` frees all."""

    def __init__(
        self,
        manifest: ModelManifest,
        profile: Profile,
        device: str,
        tokenizer: PromptTokenizer,
        parts: Parts,
        provenance: dict[str, Any] | None = None,
        texts: TextCache | None = None,
        planner: Planner | None = None,
        ways: Ways | None = None,
        envelope: Envelope | None = None,
    ) -> None:
        """`texts` holds states that need no encoder; without `planner` the parts stay as they are, without
        `ways` torch's attention and plain kernels compute; `envelope` is that of the weights, if measured.
        """
        self.manifest = manifest
        self.profile = profile
        self.device = device
        self.tokenizer = tokenizer
        self.parts = parts
        self.provenance = provenance or {}
        self.texts = texts
        self.fitting = Fitting(parts, planner)
        self.ways = Ways(device) if ways is None else ways
        self.envelope = envelope
        self._begun = False
        self._earlier = 0, 0  # falls of the ways and steps down of the plan, told by the videos before

    @classmethod
    def load(
        cls,
        weights: str | Path | None = None,
        *,
        model: str | Path = DEFAULT_MODEL,
        profile: str | Path | Profile = "auto",
        device: str = "auto",
        cache: str | Path | None = None,
        vram: float | None = None,
        ram: float | None = None,
        attention: str = "auto",
        as_before: Mapping[str, Any] | None = None,
        request: Request | None = None,
        text_known: bool = False,
        on_plan: Callable[[Plan], None] | None = None,
        on_stage: OnStage | None = None,
    ) -> "Pipeline":
        """Plan the memory for `request` (a video of the model's usual size unless given), then load.

        `model` is a manifest's name, a family (the profile picks the variant) or a checkpoint directory;
        `weights` the directory that holds its files (default /weights; the demo model brings its own);
        `cache` a directory where text states are kept from one process to the next; `vram` and `ram`, in GiB,
        bound the memory below what the profile and the machine allow; `attention` is the backend to begin
        with, and `as_before` the record of a run to compute like, where that can be done here.
        Raises RequestError for unknown names, WeightsError for files, DeviceError for a missing GPU and
        PlanError, before anything is loaded, where it does not fit.
        """
        check_name(attention)
        asked = profile if isinstance(profile, Profile) else load_profile(profile)
        chosen, device = select_device(device, asked)
        given = None if weights is None else Path(weights)
        manifest, directory = find_model(model, chosen, given)
        checked = check(request or Request(), manifest, device)
        files = loading.open_files(manifest, directory)
        machine = look(directory, gpu_of(device), probe_pinning=False)
        plan_for = partial(
            plan_run,
            manifest,
            chosen,
            machine=machine,
            device=device,
            files=(files.transformer, files.text_encoder, files.vae),
            vram=vram,
            ram=ram,
            cuda_started=device != "cpu" and torch.cuda.is_initialized(),
        )
        allocator.settle()
        tokenizer = loading.load_tokenizer(files, manifest)
        confirm_device(device)
        sizes = sizes_for(manifest, chosen, (files.transformer, files.text_encoder, files.vae))
        store = open_store(None if cache is None else Path(cache), device)
        ways = _ways_for(checked, sizes, chosen, device, store, attention, as_before)
        texts = None if cache is None else text_cache(Path(cache), files.text_encoder, device, chosen)
        pipe = cls(
            manifest,
            chosen,
            device,
            tokenizer,
            parts=PlannedParts(files, manifest, chosen, device),
            provenance=_provenance(manifest, directory, files, device),
            texts=texts,
            planner=lambda job: plan_for(job, attention=ways.eight_bits),
            ways=ways,
            envelope=None if (directory / NOTE_FILE).exists() else manifest.envelope,
        )
        try:
            pipe._prepare(checked, on_plan, on_stage, text_known)
        except BaseException:
            pipe.close()
            raise
        return pipe

    def close(self) -> None:
        """Free memory, threads and files; idempotent."""
        self.parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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

    def stages(self, request: Request, start: ResumePoint | None = None) -> Iterator[Stage]:
        """Run `request` piece by piece. Raises RequestError first, OutputCheckError for a broken result.

        With `start`, the `point` of a stage of the same request, the run goes on from there, and ends with
        the same frames as the run that it comes from.
        """
        checked = check(request, self.manifest, self.device)
        self._begin_record()
        self._prepare(checked, text_known=start is not None)
        clock = PhaseClock()

        clock.begin("text")
        tokens = self.tokenizer(checked.prompt)
        text = self._encoding().begin(checked, tokens, start)
        stage = clock.stage(1, 1, text.point.text_states.nbytes)
        yield replace(stage, tokens=tokens, point=text.point, notes=self._take_notes())

        point = text.point
        clock.begin("denoise", point.step)
        for point in self.denoise(text.point, checked):
            assert point.latents is not None
            stage = clock.stage(point.step, checked.steps, point.latents.nbytes)
            yield replace(stage, latents=point.latents, point=point, notes=self._take_notes())
        assert point.latents is not None

        clock.begin("decode")
        for piece, decoding in self.decode(point.latents[None]):
            stage = clock.stage(piece, decoding.pieces, decoding.nbytes)
            notes = self._take_notes()
            yield replace(stage, frames=decoding.frames, whole=decoding.whole, notes=notes)
        frames = decoding.frames  # (F, H, W, 3)

        timings = {phase: round(seconds, 3) for phase, seconds in clock.seconds.items()}
        record = self.record(checked, tokens) | {"text_states": text.source, "timings": timings}
        video = Video(frames, checked.fps, record)
        notes, seconds = self._take_notes(), sum(clock.seconds.values())
        yield Stage("done", 1, 1, seconds, frames.nbytes, video=video, notes=notes)

    def _take_notes(self) -> tuple[str, ...]:
        of_texts = () if self.texts is None else self.texts.take_notes()
        return (*of_texts, *self.fitting.take_notes(), *self.ways.take_notes())

    @property
    def plan(self) -> Plan | None:
        """Where everything lies; None for parts that nobody planned."""
        return self.fitting.plan

    def _prepare(
        self,
        request: CheckedRequest,
        on_plan: Callable[[Plan], None] | None = None,
        on_stage: OnStage | None = None,
        text_known: bool = False,
    ) -> None:
        """Place the parts for `request`. With guidance the negative prompt may be unknown."""
        known = request.guidance == 1 and (text_known or self.known_text(request.prompt))
        self.fitting.prepare(job_of(request, encode_text=not known), on_plan, on_stage)

    # ------------------------------------------------------------------------------------------------ text

    def known_text(self, prompt: str) -> bool:
        """Whether the states of `prompt` are in the cache, so that its run needs no text encoder."""
        return self._encoding().known(self.tokenizer(prompt)) is not None

    def _encoding(self) -> Encoding:
        return Encoding(self.fitting, self.ways, self.tokenizer, self.texts)

    # --------------------------------------------------------------------------------------------- latents

    @torch.inference_mode()
    def denoise(self, start: ResumePoint, request: CheckedRequest) -> Iterator[ResumePoint]:
        """The point after each step that is left, with the latents (16, T, h, w).

        A step whose result is wrong is repeated from the same latents and noise, one way lower; raises
        OutputCheckError where there is none.
        """
        generator = torch.Generator(self.device if request.noise_device == "cuda" else "cpu")
        if start.latents is None or start.generator_state is None:
            generator.manual_seed(request.seed)
            latents = draw_noise(request.latent_shape, generator)
        else:
            restore(generator, start.generator_state)
            latents = start.latents
        latents = latents[None].to(self.device)  # (1, 16, T, h, w)
        dtype, envelope = loading.DTYPES[self.profile.dtype], self.envelope_of(request)
        denoising = Denoising(self.fitting, self.ways, start, request, dtype, envelope)
        for step in range(start.step + 1, request.steps + 1):
            latents = denoising.step(latents, generator)
            state = generator.get_state()
            yield replace(start, step=step, latents=latents[0].cpu(), generator_state=state)

    def envelope_of(self, request: CheckedRequest) -> Envelope | None:
        """What the steps of `request` must stay in: measured ranges hold for what was measured alone."""
        usual, sampling = self.manifest.defaults, self.manifest.sampling
        same = (request.height, request.width, request.frames) == (usual.height, usual.width, usual.frames)
        return self.envelope if same and request.guidance == sampling.guidance else None

    # ---------------------------------------------------------------------------------------------- frames

    @property
    def rung(self) -> Rung:
        """How the plan wants latents decoded."""
        return WHOLE if self.plan is None else self.plan.rung

    def decode(self, latents: Tensor) -> Iterator[tuple[int, Decoding]]:
        """Decode latents (1, 16, T, h, w): the number of pieces done, and the decoding they belong to."""
        while True:
            try:
                with self.ways.computing(), self.parts.vae() as vae:
                    decoding = Decoding(vae, latents.to(self.device), self.rung)
                    for piece in decoding:
                        yield piece, decoding
                self.ways.worked()
                return
            except OutputCheckError as error:
                if self.ways.lower_kernels(Fault(str(error).rstrip(".")), "decode") is None:
                    raise
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_sentence(error)
            self.fitting.step_down("decode", reason)

    def _begin_record(self) -> None:
        """What steps down from here on does so in the next video; while loading, it was in the first."""
        if self._begun:
            self._earlier = len(self.ways.fell_back), len(self.fitting.stepped_down)
        self._begun = True

    def record(self, request: CheckedRequest, tokens: Tokens) -> dict[str, Any]:
        """What the mp4 says of its own making: enough to make it again, and to know with what.

        The ways and the plan are those in use, wherever they come from; what fell back or stepped down is
        told by the video in which it did.
        """
        falls, steps = self._earlier
        fell_back, stepped_down = self.ways.fell_back[falls:], self.fitting.stepped_down[steps:]
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
            **({} if self.plan is None else {"plan": self.plan.as_dict()["placement"]}),
            **({"stepped_down": stepped_down} if stepped_down else {}),
            "ways": self.ways.as_dict(),
            **({"fell_back": fell_back} if fell_back else {}),
            **self.provenance,
        }


def _ways_for(
    request: CheckedRequest,
    sizes: ModelSizes,
    profile: Profile,
    device: str,
    store: Store,
    attention: str,
    as_before: Mapping[str, Any] | None,
) -> Ways:
    """What computes `request` fastest here, by what `store` knows or learns now; its tiles are in force then.

    Raises RequestError for an attention that is unknown or does not work here.
    """
    ways = choose_ways(
        device,
        request.tokens,
        sizes.text_len,
        sizes.num_heads,
        sizes.head_dim,
        loading.DTYPES[profile.dtype],
        attention,
        as_before,
        memory=store,
        chooser=partial(choose_attention, store),
    )
    apply_tiles(store, torch.device(device))
    return ways


def _provenance(
    manifest: ModelManifest, directory: Path, files: loading.ModelFiles, device: str
) -> dict[str, Any]:
    """What a record says of all videos of a pipeline: weights, card and versions."""
    return {
        "family": manifest.family,
        # Only a model without a name needs its path: a video that is shown around should not tell it.
        **({"weights": str(directory.absolute())} if manifest.family == DIRECTORY_MODEL else {}),
        **({} if device == "cpu" else {"gpu": torch.cuda.get_device_name(device)}),
        "files": fingerprints(files.paths),
        "versions": versions(),
    }
