"""What the parts of the bench share: one model on one device, its pipeline, and how often to repeat."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from runtime.bench.following import following
from runtime.bench.gauge import Reading
from runtime.bench.samples import Row, Sample
from runtime.bench.sizes import Size
from runtime.loading import DTYPES, ModelFiles, open_files
from runtime.memory.planning import job_of
from runtime.pipeline import Pipeline
from runtime.profiles import DIRECTORY_MODEL
from runtime.request import check
from runtime.schema import ModelManifest, Profile
from runtime.transformer import Condition

Rows = Iterator[Row]
Watch = Callable[[], AbstractContextManager[Sequence[Reading]]]
"""Watches the card in its block; the readings are whole afterwards, as those of `Gauge.during`."""


@dataclass(frozen=True)
class Where:
    """Which model, where its files are, and where it computes; `vram` and `ram` are ceilings in GiB.

    profile_name: what --profile has, for a process of its own.
    """

    manifest: ModelManifest
    directory: Path
    profile: Profile
    profile_name: str
    device: str
    vram: float | None = None
    ram: float | None = None

    @property
    def model(self) -> str | Path:
        """As `Pipeline.load` and `--model` take it."""
        return self.directory if self.manifest.family == DIRECTORY_MODEL else self.manifest.name


class Scene:
    """One model that is measured. A context manager: `close` frees what it loaded.

    warm_decodes: of whole runs, for what compares itself with them later.
    """

    def __init__(
        self, where: Where, repeats: int, attention: str = "auto", watch: Watch | None = None
    ) -> None:
        self.where, self.repeats, self.attention = where, repeats, attention
        self.device = torch.device(where.device)
        self.warm_decodes: dict[Size, Sample] = {}
        self._watch: Watch = watch or (lambda: nullcontext(()))
        self._readings: list[Reading] = []
        self._pipe: Pipeline | None = None

    def __enter__(self) -> "Scene":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Around what is measured: the card is watched there, and not while a part loads and prepares."""
        with self._watch() as readings:
            yield
        self._readings += readings

    def take_readings(self) -> list[Reading]:
        """What the card said since the last time; [] for a part that does not use `measuring`."""
        taken, self._readings = self._readings, []
        return taken

    def close(self) -> None:
        """Free the pipeline; the next part that needs one loads it again."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def pipe(self, size: Size) -> Pipeline:
        """The pipeline, placed by the plan for a video of `size` of which nothing is known yet.

        As in a run, attention is what that plan has room for.
        """
        if self._pipe is None:
            where = self.where
            self._pipe = Pipeline.load(
                where.directory,
                model=where.model,
                profile=where.profile,
                device=where.device,
                vram=where.vram,
                ram=where.ram,
                attention=self.attention,
                request=size.request(),
            )
        else:
            checked = check(size.request(), self.where.manifest, self.where.device)
            self._pipe.fitting.prepare(job_of(checked))
        self._pipe.ways.keep_to(self._pipe.plan)
        return self._pipe

    @property
    def files(self) -> ModelFiles:
        """The opened files."""
        return open_files(self.where.manifest, self.where.directory)

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return DTYPES[self.where.profile.dtype]

    def row(self, part: str, what: str, size: Size | None = None) -> Row:
        """A row of this model, to be filled."""
        manifest = self.where.manifest
        return Row(
            part,
            what,
            model=manifest.name,
            format=manifest.quantization or "",
            family=manifest.family,
            size="" if size is None else str(size),
        )

    def latents(self, size: Size, seed: int = 2) -> Tensor:
        """Random latents (1, 16, T, h, w) fp32 on the device."""
        shape = check(size.request(), self.where.manifest, self.where.device).latent_shape
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn((1, *shape), device=self.device, generator=generator)


@torch.inference_mode()
def condition_of(pipe: Pipeline, device: torch.device, dtype: torch.dtype) -> Condition:
    """The condition of a random text of full length at the second of four steps."""
    config = pipe.parts.transformer.config
    generator = torch.Generator(device).manual_seed(3)
    shape = (1, config.text_len, config.text_dim)
    text = torch.randn(shape, device=device, generator=generator).to(dtype)
    times = torch.tensor([[937.5]], device=device)  # (1, 1)
    return pipe.fitting.within("denoise", lambda: pipe.parts.conditions(times, [text]))[0][0]


def warm_forward(pipe: Pipeline, latents: Tensor, condition: Condition) -> None:
    """One forward, with a leaner plan where memory runs out: the measured ones have what they need."""
    pipe.parts.expect(1)

    def run() -> None:
        pipe.ways.keep_to(pipe.plan)  # a leaner one than before, after a shortage
        with following(pipe.parts.transformer, pipe.ways):
            pipe.parts.transformer.velocity(latents, condition)

    with torch.inference_mode():
        pipe.fitting.within("denoise", run)


def placed(pipe: Pipeline) -> str:
    """Where the blocks are, in words."""
    plan = pipe.plan
    if plan is None:
        return "all resident"
    count, blocks = plan.inputs.sizes.blocks.count, plan.blocks
    if len(blocks.resident) == count:
        return "all resident"
    return f"{len(blocks.resident)} of {count} blocks resident, {len(blocks.cached)} cached"
