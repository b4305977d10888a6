"""The Wan2.1 video transformer: noisy latents, a time and text states in; the flow velocity out.

Parameter names are those of the original Wan checkpoints. Tokens are patches of 1x2x2 latents, frames slowest
and columns fastest, and every token attends to every token. The time enters each block as six modulation rows
(shift, scale and gate of self attention, then of the feed-forward); the text enters through cross attention.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.layers.activation import gelu_for
from runtime.layers.attention import Attend, attend
from runtime.layers.compact_qk import (
    FEWEST,
    KnownLevels,
    QKScales,
    center_of,
    compact_of,
    compact_rows,
    some_tokens,
    workspace,
)
from runtime.layers.kept_text import KeptText, KeysValues
from runtime.layers.norm import Affine, Modulation, RMSNorm, Rows, add_norm, gated_add, norm_of
from runtime.layers.rope import RopeTable, norm_rope, rope_table
from runtime.layers.slices import in_slices, same_place


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of one transformer; 14B is (5120, 13824, 40, 40), 1.3B is (1536, 8960, 12, 30)."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"dim {self.dim} must split into {self.num_heads} heads of an even width")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim {self.freq_dim} must be even: half cosines, half sines")

    @property
    def head_dim(self) -> int:
        """Width of one attention head; 128 in the published models."""
        return self.dim // self.num_heads


class SelfAttention(nn.Module):
    """The linears around attention of all tokens to all; q and k are normalised over the full width."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mix: Attend = attend
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        self._levels = KnownLevels()

    def scales(self, x: Tensor, rope: RopeTable, normed: Callable[[Tensor], Rows]) -> QKScales | None:
        """How `mix` takes the queries and keys of tokens x (B, L, D); None: as they are.

        normed: what stands before q and k.
        """
        if compact_of(self.mix) is None or x.shape[1] < FEWEST:
            return None
        some = some_tokens(x.shape[1])
        k = self.k(normed(x[:, some].contiguous()))
        keys = norm_rope(k, self.norm_k, self.num_heads, (rope[0][:, some], rope[1][:, some]))
        levels = self._levels.of(self.norm_q.weight, self.norm_k.weight, self.num_heads)
        return QKScales(levels, center_of(keys))

    def project(
        self,
        x: Rows,
        rope: RopeTable,
        into: Sequence[Tensor] | None = None,
        scales: QKScales | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens x (B, L, D), each (B, L, H, D/H), the first two rotated.

        With `scales` the first two are compact. Of `into`, three tensors of that shape, those are used that
        can be written at once.
        """
        for_q, for_k, for_v = (None, None, None) if into is None else into
        if scales is None:
            q = norm_rope(self.q(x), self.norm_q, self.num_heads, rope, for_q)
            k = norm_rope(self.k(x), self.norm_k, self.num_heads, rope, for_k)
        else:
            by_q, by_k, _ = scales.levels
            q = compact_rows(self.q(x), self.norm_q, self.num_heads, rope, by_q, into=for_q)
            k = compact_rows(self.k(x), self.norm_k, self.num_heads, rope, by_k, scales.center, for_k)
        v = self.v(x) if for_v is None or isinstance(x, Tensor) else self.v(x, for_v)
        return q, k, v.unflatten(-1, (self.num_heads, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scales: QKScales | None) -> Tensor:
        """`mix` of what `project` gave: (B, L, H, D/H)."""
        compact = compact_of(self.mix)
        if scales is None or compact is None:
            return self.mix(q, k, v)
        return compact(q, k, v, scales)


class CrossAttention(nn.Module):
    """Attention of all tokens to all text rows, padding included, as the model was trained."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mix: Attend = attend
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def keys_values(self, text: Tensor) -> KeysValues:
        """Keys and values of text (B, S, D), each (B, S, H, D/H); they depend on neither time nor latents."""
        keys = norm_rope(self.k(text), self.norm_k, self.num_heads)
        return keys, self.v(text).unflatten(-1, (self.num_heads, -1))

    def forward(self, x: Rows, keys: Tensor, values: Tensor) -> Tensor:
        """x (B, L, D) and what `keys_values` gave -> (B, L, D)."""
        q = norm_rope(self.q(x), self.norm_q, self.num_heads)  # (B, L, H, D/H)
        return self.o(self.mix(q, keys, values).flatten(2))  # (B, L, D)


class AffineNorm(nn.Module):
    """The weight and the bias of a LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    @property
    def scaling(self) -> Affine:
        """As `norm_of` takes it."""
        return Affine(self.weight, self.bias)


class Block(nn.Module):
    """Self attention, cross attention, feed-forward; the first and the last modulated and gated by time."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 6, dim).normal_(std=dim**-0.5))
        self.self_attn = SelfAttention(dim, config.num_heads, config.eps)
        self.norm3 = AffineNorm(dim)
        self.cross_attn = CrossAttention(dim, config.num_heads, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: Tensor | KeysValues,
        rope: RopeTable,
        step: int | None = None,
        qkv: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """x (B, L, D), time (B, 6, D) fp32, text (B, S, D) -> (B, L, D), in x's dtype.

        In place of the text may be what `cross_attn.keys_values` makes of it.
        Tokens meet in the self attention alone: before and after it they go through `step` at a time. The
        result then takes x's memory, and queries, keys and values take that of `qkv`, (B, L, H, D/H) each, in
        the form that the attention takes them.
        """
        rows = (self.modulation.float() + time).chunk(6, dim=1)  # six of (B, 1, D)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = rows
        # (B, S, H, D/H) each
        keys, values = text if isinstance(text, tuple) else self.cross_attn.keys_values(text)

        into_attn, into_ffn = Modulation(shift_attn, scale_attn), Modulation(shift_ffn, scale_ffn)

        def normed(x: Tensor) -> Rows:
            return norm_of(x, into_attn, self.eps, self.self_attn.q)

        def before(
            x: Tensor, cos: Tensor, sin: Tensor, into: Sequence[Tensor] | None = None
        ) -> tuple[Tensor, ...]:
            return self.self_attn.project(normed(x), (cos, sin), into, scales)

        def after(x: Tensor, mixed: Tensor) -> Tensor:
            out, cross, ffn = self.self_attn.o, self.cross_attn, self.ffn
            x, y = add_norm(x, out(mixed.flatten(2)), gate_attn, self.norm3.scaling, self.eps, cross.q)
            # The cross attention is neither modulated nor gated.
            x, y = add_norm(x, cross(y, keys, values), None, into_ffn, self.eps, ffn[0])
            h = ffn[0](y)
            del y
            h = gelu_for(h, ffn[2])
            h = ffn[2](h)  # under one name, so that what is done with is freed
            return gated_add(x, h, gate_ffn)

        scales = self.self_attn.scales(x, rope, normed)
        q, k, v = in_slices(before, x, *rope, step=step, into=qkv)  # (B, L, H, D/H) each
        mixed = self.self_attn.attend(q, k, v, scales)  # (B, L, H, D/H)
        if qkv is not None and not (same_place(mixed, q) or same_place(mixed, v)):
            mixed = v.copy_(mixed)
        del q, k, v
        return in_slices(after, x, mixed, step=step, into=x)


class Head(nn.Module):
    """The last norm, modulated by time, and the linear from tokens to patches, all in fp32."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        pt, ph, pw = config.patch_size
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim).normal_(std=config.dim**-0.5))
        self.head = nn.Linear(config.dim, pt * ph * pw * config.out_dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, L, D), time (B, 1, D) fp32 -> (B, L, patch·channels)."""
        shift, scale = (self.modulation.float() + time).chunk(2, dim=1)  # the same time on both rows
        return self.head(norm_of(x.float(), Modulation(shift, scale), self.eps))


@dataclass(frozen=True)
class Condition:
    """What a time and a text give to every block: the same for all latents of a step."""

    time: Tensor  # (B, D) fp32, for the head
    rows: Tensor  # (B, 6, D) fp32, for the blocks
    text: Tensor  # (B, text_len, D)
    kept: KeptText | None = None  # one for all times of a text


class Transformer(nn.Module):
    """Predicts the flow velocity (noise minus clean latents) of video latents at a time, given text states.

    Parameters whose name contains one of FP32_PARAMETERS are meant to be fp32; all others share one compute
    dtype, that of `patch_embedding`, which is also the dtype of the residual stream.

    `conditions` needs the modules of ENTRY and `velocity` all the others, so the two need not be in memory
    together. `token_slice` bounds the memory of a forward: see `Block.forward`. With `keep_text` the
    conditions of a text keep its keys and values: forwards after its first need no module of OF_TEXT.
    """

    ENTRY: ClassVar[tuple[str, ...]] = ("text_embedding", "time_embedding", "time_projection")

    FP32_PARAMETERS: ClassVar[tuple[str, ...]] = (
        "time_embedding",
        "time_projection",
        "modulation",
        "norm",
        "head",
    )

    OF_TEXT: ClassVar[tuple[str, ...]] = ("cross_attn.k", "cross_attn.v")

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_slice: int | None = None
        self.keep_text = False
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def use_attention(self, of_tokens: Attend, on_text: Attend) -> None:
        """From now on tokens meet each other by `of_tokens` and the text by `on_text`; `attend` at first."""
        for block in self.blocks.children():
            assert isinstance(block, Block)
            block.self_attn.mix, block.cross_attn.mix = of_tokens, on_text

    def forward(self, latents: Tensor, timestep: Tensor, text_states: Tensor) -> Tensor:
        """Velocity of latents (B, in_dim, T, h, w) -> (B, out_dim, T, h, w) fp32.

        timestep (B,): 0..1000, may be fractional. text_states (B, text_len, text_dim): zero rows after the
        last token. Any float dtypes. h and w must be multiples of the patch size (even), and no axis may have
        more than 1024 patches. Raises ValueError for any other shape.
        """
        self._check(latents)
        if timestep.shape != latents.shape[:1]:
            raise ValueError(
                f"timestep is {tuple(timestep.shape)}, expected ({latents.shape[0]},): one for each latent"
            )
        (condition,) = self.conditions(timestep[None], text_states)
        return self.velocity(latents, condition)

    def conditions(self, timesteps: Tensor, text_states: Tensor) -> list[Condition]:
        """What each step needs of its time and the text: timesteps (S, B), text_states as for `forward`."""
        config = self.config
        if text_states.shape != (timesteps.shape[1], config.text_len, config.text_dim):
            raise ValueError(
                f"text states are {tuple(text_states.shape)}, expected "
                f"{(timesteps.shape[1], config.text_len, config.text_dim)}: pad with zero rows to text_len"
            )
        text = self.text_embedding(text_states.to(self.patch_embedding.weight.dtype))  # (B, text_len, D)
        sinusoid = timestep_embedding(timesteps.flatten(), config.freq_dim)  # (S·B, freq_dim)
        time = self.time_embedding(sinusoid)  # (S·B, D)
        rows = self.time_projection(time).unflatten(-1, (6, -1)).float()  # (S·B, 6, D)
        time, rows = (tensor.unflatten(0, timesteps.shape) for tensor in (time.float(), rows))
        kept = KeptText(config.num_layers) if self.keep_text else None
        return [Condition(*of_step, text, kept) for of_step in zip(time, rows, strict=True)]

    def velocity(self, latents: Tensor, condition: Condition) -> Tensor:
        """`forward` where the time and the text are already a condition."""
        grid = self._check(latents)
        rope = rope_table(grid, self.config.head_dim, latents)
        if condition.kept is not None:  # before anything that ends with this forward, as it outlives it
            condition.kept.make_room(condition.text, self.config.num_heads)
        x = self._patchify(latents.to(self.patch_embedding.weight.dtype))  # (B, L, D)
        qkv = self._workspace(x)
        for number, block in enumerate(self.blocks):
            text = self._text(number, block, condition)
            x = block(x, condition.rows, text, rope, self.token_slice, qkv)
            del text
        del qkv

        def head(x: Tensor) -> Tensor:
            return self.head(x, condition.time.unsqueeze(1)).float()

        patches = in_slices(head, x, step=self.token_slice)  # (B, L, pt·ph·pw·C)
        del x  # before anything that outlives this forward is made: it would lie in the middle of free memory
        return self._unpatchify(patches, grid)

    def _text(self, number: int, block: nn.Module, condition: Condition) -> Tensor | KeysValues:
        """What block `number` takes of the text: keys and values where they are kept."""
        if condition.kept is None:
            return condition.text
        assert isinstance(block, Block)
        return condition.kept.of(number, partial(block.cross_attn.keys_values, condition.text))

    def _workspace(self, x: Tensor) -> Sequence[Tensor] | None:
        """Queries, keys and values of all blocks in turn; None where each makes its own.

        Made once, before anything short-lived: memory that comes and goes then lies in one piece behind it.
        """
        if self.token_slice is None or self.token_slice >= x.shape[1]:
            return None
        heads = self.config.num_heads
        first = next(self.blocks.children())
        assert isinstance(first, Block)
        if compact_of(first.self_attn.mix) is not None and x.shape[1] >= FEWEST:
            return workspace(x, heads)
        return x.new_empty((3, *x.shape)).unflatten(-1, (heads, -1)).unbind(0)

    def _patchify(self, latents: Tensor) -> Tensor:
        """(B, C, T, h, w) -> tokens (B, L, D); within a patch the channel is slowest, the column fastest."""
        pt, ph, pw = self.config.patch_size
        patches = latents.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pt))
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # (B, L, C·pt·ph·pw)
        # The same as the convolution, whose stride is its kernel, but the tokens come out contiguous.
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, L, pt·ph·pw·C) -> (B, C, T, h, w); unlike in the input, here the channel is fastest."""
        patches = x.unflatten(-1, (*self.config.patch_size, -1)).unflatten(1, grid)  # (B, *grid, *patch, C)
        video = patches.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, T, pt, h, ph, w, pw)
        return video.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _check(self, latents: Tensor) -> tuple[int, int, int]:
        """The grid of patches (frames, rows, columns); ValueError for latents that do not fit the model."""
        config = self.config
        if latents.ndim != 5 or latents.shape[1] != config.in_dim:
            raise ValueError(f"latents are {tuple(latents.shape)}, expected (B, {config.in_dim}, T, h, w)")
        _, _, frames, height, width = latents.shape
        pt, ph, pw = config.patch_size
        if frames % pt or height % ph or width % pw:
            raise ValueError(
                f"latents of {frames} frames, {height} rows and {width} columns do not split into patches of "
                f"{pt}x{ph}x{pw}: each must be a multiple of the patch"
            )
        return frames // pt, height // ph, width // pw


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """[cos a_0.., sin a_0..] with a_j = t·10000^(-2j/dim), j < dim/2: timestep (B,) -> (B, dim) fp32.

    The angles are float64: with t up to 1000, an fp32 angle would be off by 3e-5.
    """
    t = timestep.double()
    exponents = torch.arange(0, dim, 2).to(t) / dim
    angles = torch.outer(t, 10000.0**-exponents)  # (B, dim/2)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()
