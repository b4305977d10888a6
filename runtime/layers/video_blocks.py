"""The building blocks of the video VAE, each in two forms that give the same numbers.

`forward` takes a whole video or its next chunk (B, C, T, H, W) and can be differentiated: what training, the
encoder and every comparison use. `frame_steps` are the same layer for one frame (B, C, H, W) after another,
without gradients and with little memory: what a decode runs on. A step is so small that its caller can drop
the input before the next one begins, and it says how far to the sides it looks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.kernels.interleave import interleave
from runtime.kernels.launch import fused
from runtime.kernels.norm_silu import norm_silu
from runtime.kernels.residual_add import residual_add
from runtime.layers.attention import attention
from runtime.layers.causal_conv import CausalConv3d, CausalSequential, History, Rings
from runtime.layers.tiles import EVERYWHERE, band_rows


@dataclass(frozen=True)
class FrameStep:
    """A layer, or a part of one, on the next frame of a video.

    Attributes:
        run: frame (B, C, H, W) and rings -> the output frames (B, C', scale*H, scale*W), one or two. The
            input is not written to.
        reach: pixels of the output that it looks to each side.
        scale: output pixels for each input pixel, along height and along width.
    """

    run: Callable[[Tensor, Rings], tuple[Tensor, ...]]
    reach: int
    scale: int = 1


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or the given dtype where that is wider (float64)."""
    return torch.promote_types(dtype, torch.float32)


def one_pass(x: Tensor) -> bool:
    """Whether the kernels run for x: each goes through memory once and adds a bias on its way.

    Torch's convolution on a GPU makes a pass of its own for the bias, on a CPU it does not: so where the
    kernels run they take it over from the convolution.
    """
    return x.dtype != torch.float64 and fused(x)


class ChannelNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma, with |x| the Euclidean norm over channels; in fp32 inside."""

    def __init__(self, dim: int, position_dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * position_dims))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, ...) -> the same shape and dtype."""
        wide = accumulation_dtype(x.dtype)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)  # (B, 1, ...)
        scale = math.sqrt(x.shape[1]) / norm.clamp_min(1e-12)
        return (x * scale * self.gamma.to(wide)).to(x.dtype)

    def silu_into(self, x: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        """SiLU of the norm of x + bias, written to `out`.

        x (B, C, H, W), bias (C,) or none, out a view of any tensor, (B, C, H, W).
        """
        if one_pass(x):
            norm_silu(x, self.gamma, out=out, bias=bias)
            return
        if bias is not None:
            x = x + bias.view(-1, 1, 1)
        wide = accumulation_dtype(x.dtype)
        batch, channels, _, width = x.shape
        scale = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)  # (B, 1, H, W)
        scale.clamp_min_(1e-12).reciprocal_()
        gamma = self.gamma.to(wide).view(-1, 1, 1) * math.sqrt(channels)
        rows = band_rows(batch * channels * width * wide.itemsize)
        for band, factor, target in zip(*(t.split(rows, dim=2) for t in (x, scale, out)), strict=True):
            y = (band * factor).mul_(gamma)  # (B, C, rows, W), wide
            target.copy_(F.silu(y, inplace=True))
            del y  # before the next band makes its own


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, causal conv; plus the input, through a pointwise conv where the channels change."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.residual = CausalSequential(
            ChannelNorm(dim_in),
            nn.SiLU(),
            CausalConv3d(dim_in, dim_out),
            ChannelNorm(dim_out),
            nn.SiLU(),
            nn.Identity(),  # a dropout in the published model; holds place 5, so that the names agree
            CausalConv3d(dim_out, dim_out),
        )
        self.shortcut = nn.Conv3d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """x (B, dim_in, T, H, W) -> (B, dim_out, T, H, W)."""
        return self.residual(x, history) + self.shortcut(x)

    def frame_steps(self) -> list[FrameStep]:
        """The block for one frame after another."""
        convs = (norm_and_conv(self.residual, place)[1] for place in (0, 3))
        return [FrameStep(self.next_frame, reach=sum(map(pixels_beside, convs)))]

    def next_frame(self, x: Tensor, rings: Rings) -> tuple[Tensor]:
        """x (B, dim_in, H, W) -> (B, dim_out, H, W)."""
        apart = one_pass(x)  # the biases are added by the kernels that follow the convolutions
        norm, conv = norm_and_conv(self.residual, 0)
        norm.silu_into(x, rings.slot(conv, x))
        y, bias = rings.convolve(conv, bias=not apart), conv.bias
        norm, conv = norm_and_conv(self.residual, 3)
        norm.silu_into(y, rings.slot(conv, y), bias if apart else None)
        del y  # two frames are alive at a time beside the rings, not three
        y, bias = rings.convolve(conv, bias=not apart), conv.bias
        assert bias is not None
        if isinstance(self.shortcut, nn.Conv3d):
            shortcut = self.shortcut.bias
            assert shortcut is not None
            x = F.conv2d(x, self.shortcut.weight.squeeze(2), None if apart else shortcut)
            bias = bias + shortcut
        return (residual_add(y, x, bias) if apart else y.add_(x),)


class FrameAttention(nn.Module):
    """Attention of one head among the positions of each frame, by itself; plus the input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, position_dims=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """x (B, C, T, H, W) -> the same shape. Frames do not meet here, so the history is not used."""
        frames = frames_to_batch(x)  # (B*T, C, H, W)
        # Contiguous channels: without them the fused kernels of attention refuse, and the scores are stored.
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).contiguous()  # (B*T, H*W, 3C)
        q, k, v = qkv.unsqueeze(2).chunk(3, dim=-1)  # (B*T, H*W, 1, C)
        mixed = attention(q, k, v).transpose(1, 2).unflatten(2, frames.shape[2:])  # (B*T, C, H, W)
        return x + batch_to_frames(self.proj(mixed), x.shape[0])

    def frame_steps(self) -> list[FrameStep]:
        """The same, a frame at a time."""
        return [FrameStep(lambda x, _: (self(x.unsqueeze(2)).squeeze(2),), reach=EVERYWHERE)]


class Downsample(nn.Module):
    """Halves height and width, and with `temporal` the frame rate, where the first frame stays as it is."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """x (B, C, T, H, W) -> (B, C, T', H/2, W/2).

        With `temporal`, T' = (T + 1) / 2 for a chunk that starts the video (T odd), T / 2 for a later one.
        """
        y = batch_to_frames(self.resample(frames_to_batch(x)), x.shape[0])
        return y if self.time_conv is None else self.halve_rate(self.time_conv, y, history)

    def halve_rate(self, time_conv: nn.Module, y: Tensor, history: History | None) -> Tensor:
        """The first frame, then one frame for each window of frames (0,1,2), (2,3,4), ... of the video."""
        past = None if history is None else history.recall(self)
        if history is not None:
            history.remember(self, y, 1)
        if past is not None:  # the last window's last frame is the next window's first
            return time_conv(torch.cat([past, y], dim=2))
        if y.shape[2] == 1:
            return y
        return torch.cat([y[:, :, :1], time_conv(y)], dim=2)


class Upsample(nn.Module):
    """Doubles height and width and halves the channels; with `temporal`, doubles all frames but the first."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution of the enlarged frames."""
        conv = self.resample[1]
        assert isinstance(conv, nn.Conv2d)
        return conv

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """x (B, C, T, H, W) -> (B, C/2, T', 2H, 2W).

        With `temporal`, T' = 2T - 1 for a chunk that starts the video, 2T for a later one.
        """
        if self.time_conv is not None:
            x = self.double_rate(self.time_conv, x, history)
        return batch_to_frames(self.resample(frames_to_batch(x)), x.shape[0])

    def double_rate(self, time_conv: nn.Module, x: Tensor, history: History | None) -> Tensor:
        """The first frame as it is, then two frames for each frame.

        The convolution never sees the first frame: for it, the video begins with the second.
        """
        if history is not None and history.started:
            return interleave_halves(time_conv(x, history))
        if x.shape[2] == 1:
            return x
        later = interleave_halves(time_conv(x[:, :, 1:], history))
        return torch.cat([x[:, :, :1], later], dim=2)

    def frame_steps(self) -> list[FrameStep]:
        """The same for one frame after another: first the frame rate, then height and width."""
        steps = [] if self.time_conv is None else [FrameStep(self.double_next, reach=0)]
        return [*steps, FrameStep(self.enlarge, reach=pixels_beside(self.conv), scale=2)]

    def double_next(self, x: Tensor, rings: Rings) -> tuple[Tensor, ...]:
        """x (B, C, H, W), the next frame -> two frames of its shape; of the video's first frame, itself."""
        if rings.begins(self):
            return (x,)
        assert self.time_conv is not None  # frame_steps has looked
        return self.time_conv.next_frame(x, rings).chunk(2, dim=1)

    def enlarge(self, x: Tensor, rings: Rings) -> tuple[Tensor]:
        """x (B, C, H, W) -> (B, C/2, 2H, 2W): nearest and the convolution, without the enlarged picture.

        Along one axis an even output sees w0 of the pixel before and w1 + w2 of its own, an odd one w0 + w1
        of its own and w2 of the next. So each of the four outputs of a pixel is a 2x2 convolution of the
        small picture: 4/9 of the multiplications, exact but for the rounding of the sums of weights.
        """
        conv = self.conv
        assert conv.bias is not None
        weight = rings.once(conv, self.corners)
        if one_pass(x):
            return (interleave(F.conv2d(x, weight, padding=1), conv.bias),)
        return (interleave(F.conv2d(x, weight, conv.bias.repeat(4), padding=1)),)

    def corners(self) -> Tensor:
        """The convolution's weights (C/2, C, 3, 3) as (4 * C/2, C, 2, 2).

        They are those of a pixel's outputs (0, 0), (0, 1), (1, 0) and (1, 1), one after the other.
        """
        weight = self.conv.weight
        even, odd = ([1, 0, 0], [0, 1, 1]), ([1, 1, 0], [0, 0, 1])
        sums = weight.new_tensor(
            [even, odd], dtype=accumulation_dtype(weight.dtype)
        )  # (output, tap, of three)
        corners = torch.einsum("upa,ocab,vqb->uvocpq", sums, weight.to(sums.dtype), sums).flatten(0, 2)
        return corners.to(weight.dtype).contiguous(memory_format=torch.channels_last)


def middle_blocks(dim: int) -> nn.ModuleList:
    """What encoder and decoder both have at the lowest resolution: the only attention is here."""
    return nn.ModuleList([ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim)])


def interleave_halves(x: Tensor) -> Tensor:
    """(B, 2C, T, H, W) -> (B, C, 2T, H, W): frame t becomes its first half of channels, then its second."""
    return x.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)


def frames_to_batch(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W), for layers that know no time."""
    return x.transpose(1, 2).flatten(0, 1)


def batch_to_frames(x: Tensor, batch: int) -> Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W)."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def norm_and_conv(layers: CausalSequential, place: int) -> tuple[ChannelNorm, CausalConv3d]:
    """The norm at `place` of a sequence, and the first convolution after it."""
    following = [layer for layer in list(layers)[place:] if isinstance(layer, CausalConv3d)]
    norm, conv = layers[place], following[0]
    assert isinstance(norm, ChannelNorm)
    return norm, conv


def norm_silu_conv(norm: ChannelNorm, conv: CausalConv3d, x: Tensor, rings: Rings) -> Tensor:
    """The next frame x (B, C_in, H, W) through norm, SiLU and convolution -> (B, C_out, H, W)."""
    norm.silu_into(x, rings.slot(conv, x))
    return rings.convolve(conv)


def pixels_beside(conv: nn.Conv2d | nn.Conv3d) -> int:
    """Pixels that a convolution of stride 1 looks to each side: as many along height as along width."""
    height, width = conv.kernel_size[-2:]
    assert height == width
    return height // 2
