"""Where a run stands, as it tells its caller."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from runtime.resume import ResumePoint
from runtime.tokenizer import Tokens
from runtime.video import Video


@dataclass(frozen=True)
class Stage:
    """Where a run stands: `step` of `steps` pieces of `phase` are done, `seconds` after the phase began."""

    phase: str  # load, text, denoise, decode, save, done
    step: int
    steps: int
    seconds: float
    bytes: int = 0  # that the phase has produced so far (weights read, for load)
    latents: Tensor | None = None  # (16, T, h, w) fp32, after each denoise step
    tokens: Tokens | None = None  # with the phase "text": whether the prompt was cut or has unknown words
    frames: np.ndarray | None = None  # (F, H, W, 3) uint8, with the phase "decode", of which
    whole: int = 0  # so many, from the first on, are there; another array: the decode has begun again
    video: Video | None = None  # with the phase "done"
    point: ResumePoint | None = None  # after text and each denoise step: what another process goes on from
    began: int = 0  # pieces of the phase that an earlier process had done
    notes: tuple[str, ...] = ()  # sentences that the user should read

    @property
    def eta(self) -> float | None:
        """Seconds until the phase ends at its pace so far; None before anything is known."""
        done = self.step - self.began
        return self.seconds / done * (self.steps - self.step) if done else None


OnStage = Callable[[Stage], None]


class PhaseClock:
    """Seconds of each phase, and the stages that tell of them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._phase, self._done, self._began = "", 0, 0.0

    def begin(self, phase: str, done: int = 0) -> None:
        """`phase` begins, `done` pieces of which an earlier process has done."""
        self._phase, self._done, self._began = phase, done, time.perf_counter()

    def stage(self, step: int, steps: int, nbytes: int) -> Stage:
        """The phase at this moment."""
        seconds = time.perf_counter() - self._began
        self.seconds[self._phase] = seconds
        return Stage(self._phase, step, steps, seconds, nbytes, began=self._done)


class LoadProgress:
    """Turns the bytes that loading reads, of `total`, into stages, a hundred at most."""

    def __init__(self, total: int, on_stage: OnStage | None) -> None:
        self.total, self.on_stage = max(total, 1), on_stage
        self.read, self.told = 0, 0
        self.began = time.perf_counter()

    def __call__(self, nbytes: int) -> None:
        """So many bytes more."""
        self.read += nbytes
        self._tell(min(99, 100 * self.read // self.total))

    def done(self) -> None:
        """Loading is over."""
        self._tell(100)

    def _tell(self, percent: int) -> None:
        if self.on_stage is not None and percent > self.told:
            self.told = percent
            self.on_stage(Stage("load", percent, 100, time.perf_counter() - self.began, self.read))
