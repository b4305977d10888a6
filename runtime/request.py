"""One video as it is asked for, checked before anything loads (torch-free, so a typo costs no seconds)."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runtime.errors import RequestError

if TYPE_CHECKING:
    from runtime.schema import ModelManifest

SIZE_MULTIPLE = 16  # the VAE's 8 pixels a latent times the transformer's 2 latents a patch
FRAME_STRIDE = 4  # frames per latent frame, after the first
MAX_PROMPT = 100_000  # characters; some hundred times what a model reads
MAX_POSITIONS = 1024  # rotary table of the transformer, per axis of the patch grid


@dataclass(frozen=True)
class Request:
    """What to draw and how. A field left None takes the model's own default from its manifest."""

    prompt: str | None = None
    seed: int = 42
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    noise_device: str = "cpu"
    accept_nonstandard: bool = False


@dataclass(frozen=True)
class CheckedRequest:
    """A request that the model can run, every field filled in."""

    prompt: str
    seed: int
    height: int
    width: int
    frames: int
    fps: int
    steps: int
    sampler: str
    shift: float
    guidance: float  # 1: none, one forward a step; else two
    negative_prompt: str
    noise_device: str

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(16, T, h, w) of the latents."""
        return 16, (self.frames - 1) // FRAME_STRIDE + 1, self.height // 8, self.width // 8

    @property
    def tokens(self) -> int:
        """What the transformer makes of them: patches of 1x2x2."""
        _, length, height, width = self.latent_shape
        return length * (height // 2) * (width // 2)


def check(request: Request, manifest: "ModelManifest", device: str) -> CheckedRequest:
    """Fill `request` from the manifest's defaults and refuse what model and device cannot do (RequestError).

    `device` is where the video will be computed, `cpu` or `cuda:N`.
    """
    defaults, sampling = manifest.defaults, manifest.sampling
    filled = replace(
        request,
        prompt=defaults.prompt if request.prompt is None else request.prompt,
        height=defaults.height if request.height is None else request.height,
        width=defaults.width if request.width is None else request.width,
        frames=defaults.frames if request.frames is None else request.frames,
        fps=defaults.fps if request.fps is None else request.fps,
        steps=sampling.steps if request.steps is None else request.steps,
        sampler=request.sampler or sampling.sampler,
    )
    assert filled.prompt is not None and filled.height is not None and filled.width is not None
    assert (
        filled.frames is not None and filled.fps is not None and filled.steps is not None and filled.sampler
    )
    _check_prompt(filled.prompt)
    _check_size("height", filled.height)
    _check_size("width", filled.width)
    _check_frames(filled.frames)
    if not 1 <= filled.fps <= 120:
        raise RequestError(f"fps is {filled.fps}; expected 1 to 120 (the model was trained at 16).")
    if not 0 <= filled.seed < 2**63:
        raise RequestError(f"seed is {filled.seed}; expected 0 to {2**63 - 1}.")
    if filled.sampler not in ("lcm", "euler"):
        raise RequestError(f"sampler is {filled.sampler!r}; expected lcm or euler.")
    if filled.noise_device not in ("cpu", "cuda"):
        raise RequestError(f"noise device is {filled.noise_device!r}; expected cpu or cuda.")
    if filled.noise_device == "cuda" and device == "cpu":
        raise RequestError(
            "The noise device is cuda and the video is computed on the CPU; leave --noise-device out, or "
            "name a GPU with --device."
        )
    if not 1 <= filled.steps <= 1000:
        raise RequestError(
            f"steps is {filled.steps}; expected 1 to 1000 ({manifest.name} is made for {sampling.steps})."
        )
    if sampling.distilled:
        _check_distilled(filled, manifest)
    guidance = _guidance(filled, sampling.guidance)
    return CheckedRequest(
        prompt=filled.prompt,
        seed=filled.seed,
        height=filled.height,
        width=filled.width,
        frames=filled.frames,
        fps=filled.fps,
        steps=filled.steps,
        sampler=filled.sampler,
        shift=sampling.shift,
        guidance=guidance,
        negative_prompt=filled.negative_prompt or "",
        noise_device=filled.noise_device,
    )


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise RequestError("The prompt is empty; describe the video in a sentence with --prompt.")
    if len(prompt) > MAX_PROMPT:
        raise RequestError(
            f"The prompt has more than {MAX_PROMPT} characters, and a model reads the first few thousand; "
            "is it the right file? Describe the video in some sentences."
        )


def _check_size(name: str, value: int) -> None:
    limit = MAX_POSITIONS * SIZE_MULTIPLE
    if SIZE_MULTIPLE <= value <= limit and value % SIZE_MULTIPLE == 0:
        return
    lower = min(max(value // SIZE_MULTIPLE * SIZE_MULTIPLE, SIZE_MULTIPLE), limit)
    nearest = sorted({lower, min(lower + SIZE_MULTIPLE, limit)} if value > SIZE_MULTIPLE else {SIZE_MULTIPLE})
    raise RequestError(
        f"{name} is {value}; expected a multiple of {SIZE_MULTIPLE} from {SIZE_MULTIPLE} to {limit}. "
        f"Nearest: {' or '.join(map(str, nearest))}."
    )


def _check_frames(value: int) -> None:
    limit = (MAX_POSITIONS - 1) * FRAME_STRIDE + 1
    if 1 <= value <= limit and value % FRAME_STRIDE == 1:
        return
    lower = min(max((value - 1) // FRAME_STRIDE * FRAME_STRIDE + 1, 1), limit)
    nearest = sorted({lower, min(lower + FRAME_STRIDE, limit)} if value > 1 else {1})
    raise RequestError(
        f"frames is {value}; expected 4n+1 from 1 to {limit}. Nearest: {' or '.join(map(str, nearest))}."
    )


def _guidance(request: Request, usual: float) -> float:
    """The scale of classifier-free guidance, 1 for none."""
    guidance = usual if request.guidance is None else request.guidance
    if not 0 <= guidance <= 100:
        raise RequestError(f"guidance is {guidance:g}; expected 0 to 100 (1 is none, {usual:g} is usual).")
    if request.negative_prompt and guidance == 1:
        raise RequestError(
            "A negative prompt was given with guidance 1, which is none, so it would have no effect: leave "
            "it out, or ask for more --guidance."
        )
    return guidance


def _check_distilled(request: Request, manifest: "ModelManifest") -> None:
    """A distilled model has its steps and guidance trained in; others give blurred or burnt videos."""
    sampling = manifest.sampling
    if request.guidance is not None and request.guidance != sampling.guidance:
        raise RequestError(
            f"guidance is {request.guidance:g}; {manifest.name} is distilled to run without classifier-free "
            f"guidance, which is built into its weights: leave it out, or ask for {sampling.guidance:g}."
        )
    if request.negative_prompt:
        raise RequestError(
            f"A negative prompt was given, but {manifest.name} runs without guidance, so it would have no "
            "effect: leave it out, and say in the prompt what should be seen."
        )
    if request.steps != sampling.steps and not request.accept_nonstandard:
        raise RequestError(
            f"steps is {request.steps}; {manifest.name} is distilled for exactly {sampling.steps} steps, and "
            "more or fewer make its pictures worse: leave --steps out, or add --accept-nonstandard to try."
        )
