"""The umT5 text encoder: token ids in, one text state for each token out.

Parameter names are those of the original Wan checkpoint of the encoder. Attention scores are not scaled by
the head width; instead every layer has its own table of biases, looked up by the distance between two tokens.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.layers.activation import gelu_for
from runtime.layers.attention import attention
from runtime.layers.norm import RMSNorm, Rows, add_norm, norm_of

# Biases lie in rows of a multiple of so many keys: others are copied before attention with biases takes them.
ALIGNED_KEYS = 16

# What torch may compute attention with. cuDNN's would be planned anew for each length of a prompt, and before
# its version 9.15.1 torch does not trust it with lengths that are no multiple of 128.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class TextEncoderConfig:
    """The sizes of one encoder; umT5-XXL is (256384, 4096, 4096, 10240, 64, 24)."""

    vocab_size: int
    dim: int
    dim_attn: int
    dim_ffn: int
    num_heads: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim_attn % self.num_heads:
            raise ValueError(f"dim_attn {self.dim_attn} must split into {self.num_heads} heads")
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"num_buckets {self.num_buckets} must be a multiple of 4, and max_distance "
                f"{self.max_distance} more than a quarter of it"
            )


class Attention(nn.Module):
    """Attention of all tokens to all tokens, with a bias on the scores and no scale."""

    def __init__(self, dim: int, dim_attn: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim_attn, bias=False)
        self.k = nn.Linear(dim, dim_attn, bias=False)
        self.v = nn.Linear(dim, dim_attn, bias=False)
        self.o = nn.Linear(dim_attn, dim, bias=False)

    def forward(self, x: Rows, bias: Tensor) -> Tensor:
        """x (B, L, D), as q, k and v take it; bias (1 or B, H, L, L) in its dtype -> (B, L, D)."""
        q, k, v = (linear(x).unflatten(-1, (self.num_heads, -1)) for linear in (self.q, self.k, self.v))
        return self.o(attention(q, k, v, scale=1.0, bias=bias))  # (B, L, D)


class FeedForward(nn.Module):
    """fc2(fc1(x)·gelu(gate(x)))."""

    def __init__(self, dim: int, dim_ffn: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False), nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(dim, dim_ffn, bias=False)
        self.fc2 = nn.Linear(dim_ffn, dim, bias=False)

    def forward(self, x: Rows) -> Tensor:
        """x (B, L, D), as fc1 and the gate take it -> (B, L, D)."""
        return self.fc2(gelu_for(self.gate[0](x), self.fc2, self.fc1(x)))


class RelativeBias(nn.Module):
    """One learnt number for each bucket of distance and each head."""

    def __init__(self, num_buckets: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, buckets: Tensor, dtype: torch.dtype) -> Tensor:
        """buckets (L, S) -> (1, H, L, S), the keys of a head side by side as attention reads them."""
        table = self.embedding.weight.to(dtype).t()  # (H, buckets)
        return table.index_select(1, buckets.flatten()).unflatten(1, buckets.shape).unsqueeze(0)


class Block(nn.Module):
    """Self attention and feed-forward, each on a normalised input and added back."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.eps)
        self.attn = Attention(config.dim, config.dim_attn, config.num_heads)
        self.norm2 = RMSNorm(config.dim, config.eps)
        self.ffn = FeedForward(config.dim, config.dim_ffn)
        self.pos_embedding = RelativeBias(config.num_buckets, config.num_heads)

    def forward(
        self, x: Tensor, branch: Tensor | None, buckets: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x and the branch that is still to be added, (B, L, D) each -> the same after this block.

        The sum is left to the next norm, which does both in one pass, and may be written to x's memory.
        branch None: nothing is to be added. buckets (L, S), of which the first L of each row count; hidden
        (B, 1, 1, L) bool, True for padding.
        """
        attn, ffn = self.attn, self.ffn
        into_attn, into_ffn = (attn.q, attn.k, attn.v), (ffn.fc1, ffn.gate[0])
        if branch is None:
            rows = norm_of(x, self.norm1.scaling, self.norm1.eps, *into_attn)
        else:
            x, rows = add_norm(x, branch, None, self.norm1.scaling, self.norm1.eps, *into_attn)
        branch = attn(rows, self.bias(x, buckets, hidden))
        x, rows = add_norm(x, branch, None, self.norm2.scaling, self.norm2.eps, *into_ffn)
        return x, ffn(rows)

    def bias(self, x: Tensor, buckets: Tensor, hidden: Tensor | None) -> Tensor:
        """What is added to the scores of x's tokens, (1 or B, H, L, L) in x's dtype."""
        bias = self.pos_embedding(buckets, x.dtype)[..., : x.shape[1]]
        # The most negative number rather than -inf: a row without any token stays finite.
        return bias if hidden is None else bias.masked_fill(hidden, torch.finfo(x.dtype).min)


class TextEncoder(nn.Module):
    """Encodes token ids, in the dtype of its token embedding."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.eps)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids (B, L) int64, mask (B, L) bool, True for real tokens -> text states (B, L, dim).

        Without a mask every token is real. Padding influences nothing: a prompt gives the same states with
        and without it. Rows of padding come out as zeros, which is what the transformer expects there. Raises
        ValueError when the shapes differ.
        """
        if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
            masked = "" if mask is None else f" and the mask {tuple(mask.shape)}"
            raise ValueError(f"ids have shape {tuple(ids.shape)}{masked}, expected one (B, L)")
        hidden = None if mask is None else ~mask[:, None, None, :]  # (B, 1, 1, L)
        buckets = self._buckets(ids)

        x, branch = self.token_embedding(ids), None  # (B, L, D), not scaled
        with sdpa_kernel(ATTENTION):
            for block in self.blocks:
                x, branch = block(x, branch, buckets, hidden)
        if branch is None:
            states = self.norm(x)
        else:
            _, states = add_norm(x, branch, None, self.norm.scaling, self.norm.eps)
        return states if mask is None else states.masked_fill(~mask[..., None], 0)

    def _buckets(self, ids: Tensor) -> Tensor:
        """The buckets of all pairs of tokens, (L, S): L keys and what fills the rows up to ALIGNED_KEYS."""
        length = ids.shape[1]
        keys = torch.arange(-(-length // ALIGNED_KEYS) * ALIGNED_KEYS).to(ids)
        distance = keys[None, :] - keys[:length, None]  # key minus query
        return distance_buckets(distance, self.config.num_buckets, self.config.max_distance)


def distance_buckets(distance: Tensor, num_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """The bucket of each distance (key position minus query position), any shape, int64.

    Half of the buckets are for keys after the query. Of each half, the first half are the distances 0, 1, 2
    ... themselves and the rest widen logarithmically up to max_distance; the last also takes all beyond it.
    """
    half = num_buckets // 2
    thresholds = torch.tensor(_thresholds(half, max_distance)).to(distance)
    return torch.bucketize(distance.abs(), thresholds, right=True) + (distance > 0) * half


@lru_cache(maxsize=4)
def _thresholds(buckets: int, max_distance: int) -> tuple[int, ...]:
    """The smallest distance of each bucket from 1 on: 1..7, 8, 12, 16, 23, 32, 46, 64, 91 for 16 and 128.

    A distance a reaches bucket exact+i when exact·(max_distance/exact)^(i/steps) <= a. Both sides are raised
    to the power `steps` and compared as integers: a rounded power would miss the exact ones (16, 32, 64).
    """
    exact = buckets // 2
    steps = buckets - exact
    starts = [
        next(a for a in range(exact, max_distance + 1) if a**steps >= max_distance**i * exact ** (steps - i))
        for i in range(steps)
    ]
    return (*range(1, exact), *starts)
