"""From a manifest and a directory of weights to three models, each on its home device, strictly loaded.

All headers are read and compared before the first byte of weights is, so a missing VAE is told at once and
not after fourteen gigabytes of transformer. A model is built on the meta device, its quantized Linears are
swapped in as the file's headers say, and the tensors are assigned: nothing is initialised twice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from runtime.checkpoint import Checkpoint, expect_quantization, find_component, load_weights, open_checkpoint
from runtime.checkpoint.load import check_tensors
from runtime.errors import WeightsError
from runtime.linear import swap_linears
from runtime.memory.load import load_part, load_streamed
from runtime.memory.ring import Ring
from runtime.memory.rows import StoredEmbedding
from runtime.memory.stream import BlockStream, Placement
from runtime.profiles import pull_command
from runtime.schema import ModelManifest
from runtime.text_encoder import TextEncoder, TextEncoderConfig
from runtime.tokenizer import PromptTokenizer
from runtime.transformer import Transformer, TransformerConfig
from runtime.vae import VAE, VAEConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

OnBytes = Callable[[int], None]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class ModelFiles:
    """The opened files of one model: their headers are read and plausible, their weights not yet loaded."""

    transformer: Checkpoint
    text_encoder: Checkpoint
    vae: Checkpoint
    tokenizer: Path

    @property
    def nbytes(self) -> int:
        """Bytes of weights that loading will read."""
        return self.transformer.nbytes + self.text_encoder.nbytes + self.vae.nbytes

    @property
    def paths(self) -> list[Path]:
        """Every file that takes part, for the video's metadata."""
        opened = (self.transformer, self.text_encoder, self.vae)
        return [path for checkpoint in opened for path in checkpoint.files] + [self.tokenizer]


class _Undrawn(TorchFunctionMode):
    """Modules are made without drawing their first numbers.

    On meta nobody would see them, and drawing there makes torch import its compiler, which takes seconds.
    """

    DRAWS = (nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_, Tensor.uniform_, Tensor.normal_)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """Models that are built in the block are shapes and dtypes alone."""
    with torch.device("meta"), _Undrawn():
        yield


def open_files(manifest: ModelManifest, directory: Path) -> ModelFiles:
    """Find the four parts of a model under `directory` and read their headers.

    Raises WeightsError that names what is missing or wrong.
    """

    advice = "Download the model or name its directory."
    if manifest.source is not None:
        advice = f"Download them with `{pull_command(manifest, directory)}`, or name their directory."

    def find(names: tuple[str, ...]) -> Path:
        return find_component(directory, manifest.subdirectories, names, advice)

    files = ModelFiles(
        transformer=open_checkpoint(find(manifest.files.transformer), "transformer"),
        text_encoder=open_checkpoint(find(manifest.files.text_encoder), "text_encoder"),
        vae=open_checkpoint(find(manifest.files.vae), "vae"),
        tokenizer=find(manifest.files.tokenizer),
    )
    if manifest.quantization is not None:
        expect_quantization(files.transformer, manifest.quantization)
    return files


def load_text_encoder(
    checkpoint: Checkpoint,
    manifest: ModelManifest,
    device: str,
    dtype: torch.dtype,
    on_bytes: OnBytes | None = None,
) -> TextEncoder:
    """The umT5 encoder, on `device`."""
    sizes = _agreed_sizes(checkpoint, manifest.text_encoder)
    with on_meta():
        model = TextEncoder(TextEncoderConfig(**sizes))
    return _fill(model, checkpoint, device, dtype, on_bytes)


def load_vae(
    checkpoint: Checkpoint,
    manifest: ModelManifest,
    device: str,
    dtype: torch.dtype,
    on_bytes: OnBytes | None = None,
    *,
    encoder: bool = True,
) -> VAE:
    """The causal video VAE, on `device`; without `encoder` its half that decodes."""
    sizes = _agreed_sizes(checkpoint, manifest.vae)
    with on_meta():
        model = VAE(VAEConfig(**sizes), encoder=encoder)
    if encoder:
        return _fill(model, checkpoint, device, dtype, on_bytes)
    children = tuple(name for name, _ in model.named_children())
    with on_meta():
        check_tensors(VAE(VAEConfig(**sizes)).state_dict(), checkpoint)  # the whole file must be right
    load_part(model, children, checkpoint, dtype=dtype, device=device, on_bytes=on_bytes)
    return model.eval().requires_grad_(False)


def load_tokenizer(files: ModelFiles, manifest: ModelManifest) -> PromptTokenizer:
    """The prompt tokenizer with the model's text length."""
    # config.json beside the weights may say another length than the family's; the transformer will have it.
    length = files.transformer.sizes().get("text_len", manifest.sampling.text_len)
    vocab_size = files.text_encoder.sizes()["vocab_size"]
    return PromptTokenizer(files.tokenizer, max_length=length, vocab_size=vocab_size)


def stream_transformer(
    checkpoint: Checkpoint,
    manifest: ModelManifest,
    device: str,
    dtype: torch.dtype,
    placement: Placement,
    ring: Ring,
    on_bytes: OnBytes | None = None,
    *,
    preload: bool = True,
) -> tuple[Transformer, BlockStream]:
    """The denoiser with its blocks placed; its entry stays on meta until `load_entry`.

    Without `preload` the resident blocks come when the stream starts, or during the first forward.
    """
    sizes = _agreed_sizes(checkpoint, manifest.transformer)
    with on_meta():
        model = Transformer(TransformerConfig(**sizes))
    swap_linears(model, checkpoint.quantized_linears())
    stream = load_streamed(
        model,
        checkpoint,
        placement=placement,
        ring=ring,
        dtype=dtype,
        device=device,
        fp32_parameters=Transformer.FP32_PARAMETERS,
        on_bytes=on_bytes,
        later=Transformer.ENTRY,
        preload=preload,
    )
    return model, stream


def load_entry(model: Transformer, checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> None:
    """Bring the modules that `Transformer.conditions` needs to `device`."""
    load_part(
        model,
        Transformer.ENTRY,
        checkpoint,
        dtype=dtype,
        device=device,
        fp32_parameters=Transformer.FP32_PARAMETERS,
    )


def stream_text_encoder(
    checkpoint: Checkpoint,
    manifest: ModelManifest,
    device: str,
    dtype: torch.dtype,
    placement: Placement,
    ring: Ring,
    on_bytes: OnBytes | None = None,
    kept_rows: int = 0,
    rows_in_ram: bool = False,
) -> tuple[TextEncoder, BlockStream]:
    """The umT5 encoder whose blocks are placed, and whose table of tokens stays in its file.

    kept_rows: rows of that table which stay once a prompt has needed them, on the device or `rows_in_ram`.
    """
    sizes = _agreed_sizes(checkpoint, manifest.text_encoder)
    with on_meta():
        model = TextEncoder(TextEncoderConfig(**sizes))
    swap_linears(model, checkpoint.quantized_linears())
    stream = load_streamed(
        model, checkpoint, placement=placement, ring=ring, dtype=dtype, device=device, on_bytes=on_bytes
    )
    if isinstance(model.token_embedding, StoredEmbedding):
        model.token_embedding.keep(kept_rows, torch.device("cpu") if rows_in_ram else None)
    return model, stream


def _agreed_sizes(checkpoint: Checkpoint, pinned: Any | None) -> dict[str, Any]:
    """The sizes that the tensors show; what the manifest pins must be the same.

    What no tensor shows (eps, text_len) the manifest adds.
    """
    shown = checkpoint.sizes()
    expected = {} if pinned is None else {k: v for k, v in pinned.model_dump().items() if v is not None}
    for name, value in expected.items():
        if name in shown and shown[name] != value:
            raise WeightsError(
                f"{checkpoint.path} has {name} {shown[name]}; this model's manifest expects {value}. "
                "The file belongs to another model: point --weights or --model at the right one."
            )
    return expected | shown


def _fill(
    model: Model, checkpoint: Checkpoint, device: str, dtype: torch.dtype, on_bytes: OnBytes | None
) -> Model:
    swap_linears(model, checkpoint.quantized_linears())
    load_weights(model, checkpoint, dtype=dtype, device=device, on_bytes=on_bytes)
    return model.eval().requires_grad_(False)
