"""What a profile and a manifest may say: every field, its type, and which values exclude each other.

A *profile* (profiles/gpus/NAME.yaml) says what one card should be used for: ceilings and preferences.
A *manifest* (profiles/models/NAME.yaml) says what one checkpoint is: its files in every published layout, its
sizes, how it must be sampled and what a request defaults to. `runtime.profiles` reads them.
"""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

Quantization = Literal["fp8", "int8", "bf16"]
Dtype = Literal["bf16", "fp16", "fp32"]


def project_root() -> Path:
    """The directory that holds `profiles/` and `demo/`: a source checkout, or site-packages."""
    return Path(str(files("profiles"))).parent


# ------------------------------------------------------------------------------------------------ field types


def _listed(value: object) -> object:
    """YAML has lists where a frozen model wants tuples; strict mode would refuse them."""
    return tuple(value) if isinstance(value, list) else value


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if not value[0] < value[1]:
        raise ValueError("a range, the smaller number first")
    return value


def _inside(path: str, *, parents: int = 0) -> str:
    """Refuse a path that is not relative, or that climbs more than `parents` directories up."""
    parts = path.split("/")
    if not path or path.startswith("/") or "\\" in path or ":" in parts[0] or ".." in parts[parents:]:
        raise ValueError("a path relative to its directory, with forward slashes and without '..'")
    return path


def _inside_root(value: object) -> object:
    return _inside(value) if isinstance(value, str) else value


def _inside_weights(value: object) -> object:
    # One level up is allowed: the tokenizer lies beside the variant directories, which may be given alone.
    return _inside(value, parents=1) if isinstance(value, str) else value


Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
Count = Annotated[int, Field(gt=0, le=1 << 24)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
RootPath = Annotated[str, BeforeValidator(_inside_root)]
# No part of it begins with a dot, so neither "..", nor the directory that downloads keep their notes in.
PublishedPath = Annotated[
    str, StringConstraints(pattern=r"^\w[\w.+-]*(/\w[\w.+-]*)*$", max_length=200, strict=True)
]
Range = Annotated[tuple[Positive, Positive], BeforeValidator(_listed), AfterValidator(_rising)]
Directories = Annotated[tuple[RootPath, ...], BeforeValidator(_listed)]
Candidates = Annotated[
    tuple[Annotated[str, BeforeValidator(_inside_weights)], ...],
    BeforeValidator(_listed),
    Field(min_length=1),
]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# --------------------------------------------------------------------------------------------------- profiles


class TextEncoderPlacement(_Data):
    """`stay_on_gpu` is a wish for the next prompt of a warm process; the memory plan has the last word.

    Without room on the GPU the encoder stays in RAM, where that has room when everything else has its own.
    """

    stay_on_gpu: bool


class VAEPlacement(_Data):
    """As for the text encoder; `dtype` is what the decode computes in (fp32 is the reference)."""

    stay_on_gpu: bool
    dtype: Dtype


class CardSpeeds(_Data):
    """What a card sustains: 10^12 operations a second (a multiply and an add are two), 10^9 bytes a second.

    fp8_tflops: with fp32 accumulation; None where the card has no units for it. int8_tflops: None likewise.
    attention_tflops: of the attention kernel; None to derive it from bf16. memory_gbps: of the card's own
    memory, reading and writing. measured: on such a card; else derived, and `source` says how.
    """

    fp8_tflops: Positive | None
    int8_tflops: Positive | None
    bf16_tflops: Positive
    attention_tflops: Positive | None = None
    memory_gbps: Positive
    measured: bool
    source: Text


class Profile(_Data):
    """What one card is used for.

    `vram_gb` is a ceiling in GiB (a card sold as "12 GB" has 12 GiB); None means whatever is free.
    `quantization` is the variant of a model family that suits the card; a manifest named in full beats it.
    `pcie_gbps` is what a copy from pinned memory to the card sustains, 10^9 bytes a second. It and `speeds`
    serve the plan's predicted times alone; None takes those of `runtime.memory.speeds` by compute
    capability.
    """

    name: Name
    description: Text
    device: Literal["auto", "cuda", "cpu"]
    dtype: Dtype
    quantization: Quantization
    vram_gb: Annotated[float, Field(ge=1, le=1024, allow_inf_nan=False)] | None
    compute_capability: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,2}\.[0-9]$")] | None
    text_encoder: TextEncoderPlacement
    vae: VAEPlacement
    pcie_gbps: Positive | None = None
    speeds: CardSpeeds | None = None

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability as numbers that compare, e.g. (8, 9)."""
        if self.compute_capability is None:
            return None
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)

    @property
    def vram_bytes(self) -> int | None:
        """The ceiling in bytes, or None for whatever is free."""
        return None if self.vram_gb is None else int(self.vram_gb * 2**30)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.device == "cpu" and self.vram_gb is not None:
            raise ValueError(
                f"vram_gb is {self.vram_gb:g} with device cpu, which has none; write vram_gb: null"
            )
        if self.device == "cpu" and self.compute_capability is not None:
            raise ValueError(f"compute_capability is {self.compute_capability!r} with device cpu; write null")
        capability = self.capability
        if capability is None:
            return self
        if capability < (8, 9) and self.quantization == "fp8":
            # No fp8 matrix units below Ada, and Triton has no fp8e4nv there; int8 has twice the bf16 peak.
            raise ValueError(
                f"quantization is fp8 with compute_capability {self.compute_capability!r}; fp8 needs '8.9', "
                "so expected int8 (which such cards multiply fast) or bf16"
            )
        if capability < (8, 0):
            for field, dtype in (("dtype", self.dtype), ("vae.dtype", self.vae.dtype)):
                if dtype == "bf16":
                    raise ValueError(
                        f"{field} is bf16 with compute_capability {self.compute_capability!r}; "
                        "bf16 needs '8.0', so expected fp16 or fp32"
                    )
        return self


# -------------------------------------------------------------------------------------------------- manifests


class PublishedFile(_Data):
    """One file of a repository that a model needs, and what is known of its content.

    path: in the repository. to: below the weights directory; None for the same path.
    about_gb: size in 10^9 bytes as a page or a formula tells it, for planning before the publisher answers.
    bytes, sha256: exact, and `known` says how: "published" on the publisher's pages, "recorded" from a
    verified download; "unknown" means neither is: the first verified download pins them where it lies.
    optional: the engine does without, where the repository has no such file.
    """

    path: PublishedPath
    to: PublishedPath | None = None
    about_gb: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = None
    bytes: Annotated[int, Field(gt=0, le=1 << 40)] | None = None
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    known: Literal["published", "recorded", "unknown"] = "unknown"
    optional: bool = False

    @property
    def target(self) -> str:
        """Where it belongs, relative to the weights directory."""
        return self.to or self.path

    @property
    def about_bytes(self) -> int:
        """The size in bytes, as well as it is known; 0 for a file too small to matter."""
        return self.bytes if self.bytes is not None else round((self.about_gb or 0) * 1e9)

    @model_validator(mode="after")
    def _known(self) -> Self:
        both = self.bytes is not None and self.sha256 is not None
        if self.known == "unknown" and (self.bytes is not None or self.sha256 is not None):
            raise ValueError(
                f"{self.path} has bytes or sha256 with known: unknown; expected published or recorded"
            )
        if self.known != "unknown" and not both:
            raise ValueError(f"{self.path} is {self.known}; expected both bytes and sha256")
        return self


class Source(_Data):
    """Where files are published: a repository id (not an address) and a revision, None for its newest."""

    repository: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]
    revision: str | None = None
    files: Annotated[tuple[PublishedFile, ...], BeforeValidator(_listed)] = ()


class ModelFiles(_Data):
    """Candidates for each part, best first, relative to the directories of `ModelManifest.directories`.

    A transformer candidate "." is the directory itself: block files, or shards with an index.
    """

    transformer: Candidates
    text_encoder: Candidates
    vae: Candidates
    tokenizer: Candidates


class TransformerSizes(_Data):
    """The arguments of `TransformerConfig`: `TransformerConfig(**sizes.model_dump())`."""

    dim: Count
    ffn_dim: Count
    num_heads: Count
    num_layers: Count
    in_dim: Count
    out_dim: Count
    freq_dim: Count
    text_dim: Count
    text_len: Count
    eps: Positive

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.dim % self.num_heads or self.dim // self.num_heads % 2:
            raise ValueError(
                f"dim is {self.dim} with {self.num_heads} heads; expected an even number per head"
            )
        return self


class TextEncoderSizes(_Data):
    """The arguments of `TextEncoderConfig`."""

    vocab_size: Count
    dim: Count
    dim_attn: Count
    dim_ffn: Count
    num_heads: Count
    num_layers: Count
    num_buckets: Count
    max_distance: Count
    eps: Positive

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.dim_attn % self.num_heads:
            raise ValueError(f"dim_attn is {self.dim_attn} with {self.num_heads} heads; expected a multiple")
        return self


class VAESizes(_Data):
    """The arguments of `VAEConfig` that differ between checkpoints."""

    base_dim: Count
    z_dim: Count


class Sampling(_Data):
    """How the checkpoint was made to be sampled. `text_len`: how many tokens a prompt may have."""

    distilled: bool
    steps: Annotated[int, Field(ge=1, le=1000)]
    shift: Positive
    sampler: Literal["lcm", "euler"]
    guidance: Positive
    text_len: Count

    @model_validator(mode="after")
    def _one_pass(self) -> Self:
        if self.distilled and self.guidance != 1:
            raise ValueError(f"guidance is {self.guidance:g} for distilled weights; expected 1 (no guidance)")
        return self


class Envelope(_Data):
    """What each denoise step of right weights stays in, measured and widened (docs/guard.md).

    velocity: standard deviation of the model's output; clean: of what a step takes for the picture; noise: of
    what it takes for the noise, in every tile of 64 tokens; leak: the largest correlation of the two there.
    Holds for videos of the model's own size, frames and guidance.
    """

    velocity: Range
    clean: Range
    noise: Range
    leak: Positive


class Defaults(_Data):
    """What a request gets that says nothing: pixels, frames, frames per second, prompt."""

    height: Annotated[int, Field(gt=0, le=16384, multiple_of=16)]
    width: Annotated[int, Field(gt=0, le=16384, multiple_of=16)]
    frames: Annotated[int, Field(gt=0, le=4097)]
    fps: Annotated[int, Field(gt=0, le=120)]
    prompt: Text

    @model_validator(mode="after")
    def _causal(self) -> Self:
        if self.frames % 4 != 1:
            raise ValueError(f"frames is {self.frames}; expected 4n+1, e.g. 17 or 81")
        return self


class ModelManifest(_Data):
    """What one checkpoint is. None for a part's sizes, or for `quantization`: read it from the tensors.

    `embedded` is a directory that ships with the program, relative to the project root.
    `envelope`: None where nobody has measured it.
    `source` publishes the transformer; `companions` are further repositories that hold parts of the model.
    """

    name: Name
    family: Name
    title: Text
    licence: Text
    source: Source | None
    quantization: Quantization | None
    embedded: RootPath | None
    subdirectories: Directories
    files: ModelFiles
    transformer: TransformerSizes | None
    text_encoder: TextEncoderSizes | None
    vae: VAESizes | None
    sampling: Sampling
    defaults: Defaults
    envelope: Envelope | None = None
    companions: Annotated[tuple[Source, ...], BeforeValidator(_listed)] = ()

    def sources(self) -> tuple[Source, ...]:
        """The repositories that files come from, that of the transformer first."""
        return () if self.source is None else (self.source, *self.companions)

    def directories(self, weights: Path) -> list[Path]:
        """Where to look, in order: the variant's subdirectories, then `weights` itself.

        The first directory in which any candidate of a part exists decides; within it, the first candidate.
        """
        return [weights / name for name in self.subdirectories] + [weights]

    def embedded_directory(self) -> Path | None:
        """The absolute directory of the weights that ship with the program, or None."""
        return None if self.embedded is None else project_root() / self.embedded

    @model_validator(mode="after")
    def _one_file_a_place(self) -> Self:
        if self.companions and self.source is None:
            raise ValueError(
                "companions are given without source; expected the transformer's repository there"
            )
        targets = [file.target for source in self.sources() for file in source.files]
        twice = {target for target in targets if targets.count(target) > 1}
        if twice:
            raise ValueError(f"two published files go to {min(twice)}; expected a place of its own for each")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        transformer = self.transformer
        if transformer is None:
            return self
        if self.sampling.text_len != transformer.text_len:
            raise ValueError(
                f"sampling.text_len is {self.sampling.text_len}; "
                f"expected transformer.text_len, {transformer.text_len}"
            )
        if self.text_encoder is not None and self.text_encoder.dim != transformer.text_dim:
            raise ValueError(
                f"text_encoder.dim is {self.text_encoder.dim}; "
                f"expected transformer.text_dim, {transformer.text_dim}"
            )
        if self.vae is not None and {self.vae.z_dim} != {transformer.in_dim, transformer.out_dim}:
            raise ValueError(
                f"vae.z_dim is {self.vae.z_dim}; expected transformer.in_dim and out_dim, "
                f"{transformer.in_dim} and {transformer.out_dim}"
            )
        return self
