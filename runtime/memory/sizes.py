"""Bytes of a model's parts as they will lie on the GPU: from a manifest alone, or from the headers of its
files.

A block is its matrices, which may stream, and its small tensors (biases, scales, norms, modulation), which
stay on the GPU. Sizes follow the names and shapes of the published checkpoints (wan21-spec 2.1, 3.3, 5) and
the dtypes that loading gives them: 8-bit matrices as stored, scales and the transformer's norms, modulation,
time embedding and head in fp32, the bias of an 8-bit Linear as stored, everything else in the compute dtype.

No torch here: opened files are seen through the few attributes of `Header` alone.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from runtime.errors import RequestError
from runtime.schema import ModelManifest

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1, "int8": 1}
ALIGNMENT = 256
"""Each matrix begins at a multiple of this in a slot or a resident block's buffer: what CUDA's own memory
has."""

STORED_BIAS = 4
"""Bytes of one bias of an 8-bit Linear where no file tells: published files have fp32, none has more."""

KEPT_ROWS = 4096
"""Rows of the token embedding for one prompt after another: those of their words, 512 a prompt at most."""

_FP32 = ("time_embedding", "time_projection", "modulation", "norm", "head")  # Transformer.FP32_PARAMETERS
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_TRANSFORMER_MATRIX = re.compile(r"((self|cross)_attn\.[qkvo]|ffn\.[02])\.weight")
_OF_TEXT = re.compile(r"cross_attn\.[kv]\.weight")  # Transformer.OF_TEXT
_TEXT_MATRIX = re.compile(r"(attn\.[qkvo]|ffn\.(gate\.0|fc1|fc2))\.weight")
_ENTRY = ("time_embedding.", "time_projection.", "text_embedding.")

Shapes = Mapping[str, tuple[int, ...]]


class TensorHeader(Protocol):
    """What a header says of one tensor; `dtype` has an `itemsize` in bytes."""

    @property
    def dtype(self) -> Any: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


class Header(Protocol):
    """An opened checkpoint as `runtime.checkpoint` makes it; only what its headers say is used."""

    @property
    def tensors(self) -> Mapping[str, Any]: ...
    @property
    def quantization(self) -> str: ...
    def quantized_linears(self) -> Mapping[str, str]: ...
    def sizes(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class BlocksSize:
    """The repeated blocks of one model, in bytes.

    count: how many. matrices: ONE block's streamed matrices on the GPU, padding included, of the largest
    block. small: the small tensors of ALL blocks. stored: what is read from the disk for one block's
    matrices. text_matrices, text_stored: of those two the part that sees the text alone, in the transformer.
    """

    count: int
    matrices: int
    small: int
    stored: int
    text_matrices: int = 0
    text_stored: int = 0


@dataclass(frozen=True)
class ModelSizes:
    """What the plan must know of a model.

    quantization: fp8, int8, bf16 ... of the transformer's matrices. dim, ffn_dim, num_heads, text_len,
    text_dim: of the transformer; text_ffn, text_heads: of the text encoder, whose width is text_dim. entry:
    the time and text embeddings, which visit before the first step, bytes; entry_host: RAM that the largest
    of their tensors takes on its way. ends: patch embedding and head, bytes. text: the text encoder's
    blocks; token_rows: the rows of its token embedding that are kept where it is resident, the table itself
    stays in its file. rest: bytes of the files that are read beside the blocks (entry, ends, small, VAE).
    itemsize, vae_itemsize: bytes of an activation.
    """

    quantization: str
    dim: int
    ffn_dim: int
    num_heads: int
    text_len: int
    blocks: BlocksSize
    entry: int
    entry_host: int
    ends: int
    text: BlocksSize
    text_quantization: str
    text_dim: int
    text_ffn: int
    text_heads: int
    token_rows: int
    vae_base_dim: int
    itemsize: int
    vae_itemsize: int
    rest: int

    @property
    def quantized(self) -> bool:
        """Whether the transformer's matrices are multiplied as 8 bit."""
        return self.quantization in ("fp8", "int8")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads


# ------------------------------------------------------------------------------------------- from a manifest


def sizes_of_manifest(manifest: ModelManifest, dtype: str, vae_dtype: str = "bf16") -> ModelSizes:
    """Sizes from the numbers in `manifest`, computing in `dtype`; no file is needed.

    Raises RequestError for the manifest of a bare directory, whose sizes only its files tell.
    """
    transformer, text, vae = manifest.transformer, manifest.text_encoder, manifest.vae
    if transformer is None or text is None or vae is None or manifest.quantization is None:
        raise RequestError(
            f"The sizes of {manifest.name} are known from its files alone; expected them, or a name of "
            "`t2v models`."
        )
    text_format = _text_format(manifest)
    itemsize = ITEMSIZE[dtype]
    shapes = _as_lying(_transformer_shapes(transformer.model_dump()), manifest.quantization)
    blocks, entry, entry_host, ends = _transformer(shapes, itemsize, transformer.num_layers)
    text_blocks = _text(_as_lying(_text_shapes(text.model_dump()), text_format), itemsize, text.num_layers)
    decoder = 4 * decoder_parameters(vae.base_dim)  # published in fp32
    return ModelSizes(
        quantization=manifest.quantization,
        dim=transformer.dim,
        ffn_dim=transformer.ffn_dim,
        num_heads=transformer.num_heads,
        text_len=transformer.text_len,
        blocks=blocks,
        entry=entry,
        entry_host=entry_host,
        ends=ends,
        text=text_blocks,
        text_quantization=text_format,
        text_dim=text.dim,
        text_ffn=text.dim_ffn,
        text_heads=text.num_heads,
        token_rows=min(text.vocab_size, KEPT_ROWS) * text.dim * itemsize,
        vae_base_dim=vae.base_dim,
        itemsize=itemsize,
        vae_itemsize=ITEMSIZE[vae_dtype],
        rest=entry + ends + blocks.small + text_blocks.small + decoder,
    )


def _text_format(manifest: ModelManifest) -> str:
    """What the best candidate of the text encoder is, by its published name (`...-enc-fp8.pth`)."""
    named = re.search(r"(fp8|int8|bf16)", manifest.files.text_encoder[0])
    return named[1] if named else "bf16"


def _transformer_shapes(sizes: dict[str, Any]) -> Shapes:
    """name -> shape of the tensors of a transformer with one block (wan21-spec 2.1)."""
    dim, ffn = sizes["dim"], sizes["ffn_dim"]
    patch = 4 * sizes["in_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (dim, patch),
        "patch_embedding.bias": (dim,),
        "text_embedding.0.weight": (dim, sizes["text_dim"]),
        "text_embedding.2.weight": (dim, dim),
        "time_embedding.0.weight": (dim, sizes["freq_dim"]),
        "time_embedding.2.weight": (dim, dim),
        "time_projection.1.weight": (6 * dim, dim),
        "head.modulation": (1, 2, dim),
        "head.head.weight": (4 * sizes["out_dim"], dim),
    }
    for name in [name for name in shapes if name.endswith(".weight")]:
        shapes[name.removesuffix("weight") + "bias"] = (shapes[name][0],)
    block: dict[str, tuple[int, ...]] = {"modulation": (1, 6, dim)}
    for attention in ("self_attn", "cross_attn"):
        for letter in "qkvo":
            block |= {f"{attention}.{letter}.weight": (dim, dim), f"{attention}.{letter}.bias": (dim,)}
        block |= {f"{attention}.norm_q.weight": (dim,), f"{attention}.norm_k.weight": (dim,)}
    block |= {"norm3.weight": (dim,), "norm3.bias": (dim,)}
    block |= {"ffn.0.weight": (ffn, dim), "ffn.0.bias": (ffn,)}
    block |= {"ffn.2.weight": (dim, ffn), "ffn.2.bias": (dim,)}
    return shapes | {f"blocks.0.{leaf}": shape for leaf, shape in block.items()}


def _text_shapes(sizes: dict[str, Any]) -> Shapes:
    """name -> shape of the tensors of a text encoder with one block (wan21-spec 5)."""
    dim, attn, ffn = sizes["dim"], sizes["dim_attn"], sizes["dim_ffn"]
    block: dict[str, tuple[int, ...]] = {f"attn.{letter}.weight": (attn, dim) for letter in "qkv"}
    block |= {"attn.o.weight": (dim, attn), "norm1.weight": (dim,), "norm2.weight": (dim,)}
    block |= {"ffn.gate.0.weight": (ffn, dim), "ffn.fc1.weight": (ffn, dim), "ffn.fc2.weight": (dim, ffn)}
    block |= {"pos_embedding.embedding.weight": (sizes["num_buckets"], sizes["num_heads"])}
    shapes = {f"blocks.0.{leaf}": shape for leaf, shape in block.items()}
    return shapes | {"token_embedding.weight": (sizes["vocab_size"], dim), "norm.weight": (dim,)}


@dataclass(frozen=True)
class _Lying:
    """One tensor: how many numbers, bytes of one in the file, and whether it is stored in 8 bit."""

    numbers: int
    stored: int
    quantized: bool


def _as_lying(shapes: Shapes, form: str) -> dict[str, _Lying]:
    """The tensors of a file whose block matrices are in `form`, with the scales that 8 bit adds."""
    lying: dict[str, _Lying] = {}
    for name, shape in shapes.items():
        numbers = 1
        for extent in shape:
            numbers *= extent
        block = _BLOCK.fullmatch(name)
        matrix = block is not None and (
            _TRANSFORMER_MATRIX.fullmatch(block[2]) or _TEXT_MATRIX.fullmatch(block[2])
        )
        quantized = form in ("fp8", "int8")
        if matrix:
            lying[name] = _Lying(numbers, ITEMSIZE[form], quantized)
            if quantized:
                lying[name + "_scale"] = _Lying(shape[0], 4, False)
        else:
            # Next to 8-bit matrices the rest is often fp32 in published files; of bf16 files it is bf16.
            lying[name] = _Lying(numbers, STORED_BIAS if quantized else 2, False)
    return lying


def decoder_parameters(base_dim: int) -> int:
    """Numbers in the matrices of the VAE's decoder: 73.3 million at base_dim 96 (wan21-spec 6.2)."""
    d = base_dim
    wide, half = 4 * d, 2 * d
    residual = 27 * 2  # two 3x3x3 convolutions of a residual block
    same = 27 * 16 * wide + residual * wide * wide * 2 + 4 * wide * wide  # conv1, middle (2 res, attention)
    level0 = 3 * residual * wide * wide + 6 * wide * wide + 9 * wide * half
    level1 = 27 * (half * wide + wide * wide) + half * wide + 2 * residual * wide * wide
    level1 += 6 * wide * wide + 9 * wide * half
    level2 = 3 * residual * half * half + 9 * half * d
    level3 = 3 * residual * d * d + 27 * 3 * d
    return same + level0 + level1 + level2 + level3


# ---------------------------------------------------------------------------------------------- from headers


def sizes_of_files(
    transformer: Header,
    text_encoder: Header,
    vae: Header,
    *,
    text_len: int,
    num_heads: int | None = None,
    dtype: str,
    vae_dtype: str = "bf16",
) -> ModelSizes:
    """Sizes from opened files: exact, whatever their layout and dtypes. Only headers are looked at.

    `text_len` and `num_heads` stand in where neither tensors nor config.json tell.
    """
    shown, text_shown = transformer.sizes(), text_encoder.sizes()
    itemsize = ITEMSIZE[dtype]
    blocks, entry, entry_host, ends = _transformer(_of_headers(transformer), itemsize)
    text_blocks = _text(_of_headers(text_encoder), itemsize)
    decoder = sum(info.nbytes for name, info in vae.tensors.items() if not name.startswith("encoder."))
    outside = sum(info.nbytes for name, info in transformer.tensors.items() if not _is_matrix(name))
    text_outside = sum(
        info.nbytes
        for name, info in text_encoder.tensors.items()
        if not _is_matrix(name) and name != "token_embedding.weight"
    )
    heads = shown.get("num_heads") or num_heads
    if heads is None:
        raise RequestError("The number of attention heads is in no file; expected config.json beside it.")
    return ModelSizes(
        quantization=transformer.quantization,
        dim=shown["dim"],
        ffn_dim=shown["ffn_dim"],
        num_heads=heads,
        text_len=shown.get("text_len", text_len),
        blocks=blocks,
        entry=entry,
        entry_host=entry_host,
        ends=ends,
        text=text_blocks,
        text_quantization=text_encoder.quantization,
        text_dim=text_shown["dim"],
        text_ffn=text_shown["dim_ffn"],
        text_heads=text_shown["num_heads"],
        token_rows=min(text_shown["vocab_size"], KEPT_ROWS) * text_shown["dim"] * itemsize,
        vae_base_dim=vae.sizes()["base_dim"],
        itemsize=itemsize,
        vae_itemsize=ITEMSIZE[vae_dtype],
        rest=outside + text_outside + decoder,
    )


def _of_headers(opened: Header) -> dict[str, _Lying]:
    quantized = opened.quantized_linears()
    lying = {}
    for name, info in opened.tensors.items():
        shape = info.shape
        if name.endswith(".weight_scale"):  # one number for a tensor becomes one for each row
            shape = (opened.tensors[name.removesuffix("_scale")].shape[0],)
        numbers = 1
        for extent in shape:
            numbers *= extent
        is_quantized = name.removesuffix(".weight") in quantized and name.endswith(".weight")
        lying[name] = _Lying(numbers, int(info.dtype.itemsize), is_quantized)
    return lying


# ------------------------------------------------------------------------------------------------- summed up


def _is_matrix(name: str) -> bool:
    block = _BLOCK.fullmatch(name)
    if block is None:
        return False
    return bool(_TRANSFORMER_MATRIX.fullmatch(block[2]) or _TEXT_MATRIX.fullmatch(block[2]))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _width(name: str, tensor: _Lying, lying: Mapping[str, _Lying], itemsize: int, fp32: Iterable[str]) -> int:
    """Bytes of one number of a tensor on the GPU, as `load_weights` decides."""
    module, _, leaf = name.rpartition(".")
    weight = lying.get(f"{module}.weight")
    if leaf in ("weight", "bias") and weight is not None and weight.quantized:
        return tensor.stored
    if leaf == "weight_scale" or any(fragment in name for fragment in fp32):
        return 4
    return itemsize


def _blocks(lying: Mapping[str, _Lying], itemsize: int, fp32: tuple[str, ...], alike: int = 1) -> BlocksSize:
    """The blocks of `lying`; each of them stands for `alike` of its kind."""
    matrices: dict[int, int] = {}
    stored: dict[int, int] = {}
    of_text: dict[int, tuple[int, int]] = {}
    small = 0
    for name, tensor in lying.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            continue
        number = int(block[1])
        nbytes = tensor.numbers * _width(name, tensor, lying, itemsize, fp32)
        if _is_matrix(name):
            matrices[number] = matrices.get(number, 0) + _aligned(nbytes)
            stored[number] = stored.get(number, 0) + tensor.numbers * tensor.stored
            if _OF_TEXT.fullmatch(block[2]):
                so_far = of_text.get(number, (0, 0))
                of_text[number] = so_far[0] + _aligned(nbytes), so_far[1] + tensor.numbers * tensor.stored
        else:
            small += nbytes
    return BlocksSize(
        alike * len(matrices),
        max(matrices.values()),
        alike * small,
        max(stored.values()),
        *(min(pair) for pair in zip(*of_text.values(), strict=True)),
    )


def _transformer(
    lying: Mapping[str, _Lying], itemsize: int, alike: int = 1
) -> tuple[BlocksSize, int, int, int]:
    """(blocks, entry, entry_host, ends), bytes. A tensor is read as stored, and then converted."""
    blocks = _blocks(lying, itemsize, _FP32, alike)
    entry = entry_host = ends = 0
    for name, tensor in lying.items():
        if name.startswith("blocks."):
            continue
        width = _width(name, tensor, lying, itemsize, _FP32)
        if name.startswith(_ENTRY):
            entry += tensor.numbers * width
            on_the_way = tensor.stored + (width if width != tensor.stored else 0)
            entry_host = max(entry_host, tensor.numbers * on_the_way)
        else:
            ends += tensor.numbers * width
    return blocks, entry, entry_host, ends


def _text(lying: Mapping[str, _Lying], itemsize: int, alike: int = 1) -> BlocksSize:
    """The text encoder's blocks; its final norm counts as small, its token embedding as neither."""
    blocks = _blocks(lying, itemsize, (), alike)
    norm = lying["norm.weight"].numbers * itemsize
    return replace(blocks, small=blocks.small + norm)
