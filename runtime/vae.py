"""The causal video VAE of Wan2.1: frames to latents and back, 8x smaller each way and 4x fewer in time.

The first frame of a video is a latent frame of its own; every later latent frame stands for four frames. All
layers are causal in time, so decoding may go all at once (`chunked=False`: what training differentiates) or
one latent frame at a time (`decode_chunks`: memory does not grow with the length of the video). The third way
is the decoder as steps of single frames (`Decoder.frame_steps`), which `runtime/vae_tiles.py` runs: the least
memory and time, no gradients. All give the same numbers. Tensor names are those of the published
`Wan2.1_VAE.pth`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runtime.layers.causal_conv import (
    CausalConv3d,
    CausalSequential,
    History,
    run_in_chunks,
)
from runtime.layers.video_blocks import (
    ChannelNorm,
    Downsample,
    FrameAttention,
    FrameStep,
    ResidualBlock,
    Upsample,
    accumulation_dtype,
    middle_blocks,
    norm_and_conv,
    norm_silu_conv,
    pixels_beside,
)

__all__ = ["VAE", "ChannelNorm", "Downsample", "FrameAttention", "ResidualBlock", "Upsample", "VAEConfig"]

# Statistics of the published VAE's latents over its training videos, channel by channel.
LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE; the defaults are the published model.

    Attributes:
        base_dim: channels at full resolution; even.
        dim_mult: channels of each resolution over base_dim, from full resolution down; between two of them
            height and width are halved.
        num_res_blocks: residual blocks per resolution in the encoder; the decoder has one more.
        z_dim: channels of the latents.
        temporal_downsample: for each halving of height and width, whether it halves the frame rate too.
        latents_mean, latents_std: z_dim numbers each; the latents outside are (z - mean) / std.
    """

    base_dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_dim: int = 16
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD

    def __post_init__(self) -> None:
        """Raises ValueError where the sizes contradict each other."""
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries, expected "
                f"{len(self.dim_mult) - 1}: one between each two of dim_mult {self.dim_mult}"
            )
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if len(values) != self.z_dim:
                raise ValueError(f"{name} has {len(values)} entries, expected z_dim = {self.z_dim}")
        if self.base_dim % 2:
            raise ValueError(f"base_dim is {self.base_dim}, expected an even number")

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent position along height and along width."""
        return 2 ** len(self.temporal_downsample)

    @property
    def temporal_scale(self) -> int:
        """Frames per latent frame, from the second latent frame on; the first stands for one frame."""
        return 2 ** sum(self.temporal_downsample)


class Encoder(nn.Module):
    """Frames to the features that the distribution of the latents is read from."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.base_dim * mult for mult in config.dim_mult]
        self.conv1 = CausalConv3d(3, dims[0])
        layers: list[nn.Module] = []
        dim = dims[0]
        for level, dim_out in enumerate(dims):
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(dim, dim_out))
                dim = dim_out
            if level < len(config.temporal_downsample):
                layers.append(Downsample(dim, config.temporal_downsample[level]))
        self.downsamples = nn.ModuleList(layers)
        self.middle = middle_blocks(dim)
        self.head = CausalSequential(ChannelNorm(dim), nn.SiLU(), CausalConv3d(dim, 2 * config.z_dim))

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """x (B, 3, F, H, W), a whole video or its next chunk -> (B, 2 * z_dim, T, H/8, W/8)."""
        x = self.conv1(x, history)
        for layer in self.downsamples:
            x = layer(x, history)
        for layer in self.middle:
            x = layer(x, history)
        return self.head(x, history)


class Decoder(nn.Module):
    """Latents, as the network has them inside, to frames that are not yet clamped."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.base_dim * mult for mult in reversed(config.dim_mult)]
        rates = tuple(reversed(config.temporal_downsample))
        self.conv1 = CausalConv3d(config.z_dim, dims[0])
        self.middle = middle_blocks(dims[0])
        layers: list[nn.Module] = []
        dim = dims[0]
        for level, dim_out in enumerate(dims):
            for _ in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(dim, dim_out))
                dim = dim_out
            if level < len(rates):
                layers.append(Upsample(dim, rates[level]))
                dim //= 2
        self.upsamples = nn.ModuleList(layers)
        self.head = CausalSequential(ChannelNorm(dim), nn.SiLU(), CausalConv3d(dim, 3))

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """x (B, z_dim, T, h, w), a whole video or its next chunk -> (B, 3, F, 8h, 8w)."""
        x = self.conv1(x, history)
        for layer in self.middle:
            x = layer(x, history)
        for layer in self.upsamples:
            x = layer(x, history)
        return self.head(x, history)

    def frame_steps(self, split: int | None = None) -> tuple[list[FrameStep], list[FrameStep]]:
        """The decoder for one latent frame after another, in two parts: up to Upsample `split`, and the rest.

        Latent frames (B, z_dim, h, w) enter the first; its outputs enter the second, whose outputs are frames
        (B, 3, 8h, 8w). Without `split` everything is in the second. From Upsample 0 on all steps are local.
        """
        enter = FrameStep(lambda x, rings: (self.conv1.next_frame(x, rings),), pixels_beside(self.conv1))
        norm, conv = norm_and_conv(self.head, 0)
        leave = FrameStep(lambda x, rings: (norm_silu_conv(norm, conv, x, rings),), pixels_beside(conv))
        layers = [*self.middle, *self.upsamples]
        starts = [number for number, layer in enumerate(layers) if isinstance(layer, Upsample)]
        cut = 0 if split is None else starts[split]
        first, second = (
            [step for layer in part for step in layer.frame_steps()] for part in (layers[:cut], layers[cut:])
        )
        return ([], [enter, *second, leave]) if split is None else ([enter, *first], [*second, leave])


class VAE(nn.Module):
    """Encoder and decoder of video.

    Frames are (B, 3, F, H, W) in [-1, 1], F = 4n + 1, H and W multiples of 8. Latents are (B, 16, T, h, w),
    T = n + 1, h = H / 8, w = W / 8, normalised channel by channel. Inputs of any floating dtype are brought
    to the parameters' dtype; outputs are fp32 (float64 where the inputs are). `chunked` goes through the
    video one latent frame at a time, so that working memory does not grow with its length; otherwise the
    whole video goes at once. Same numbers.

    With `encoder=False` it only decodes and has none of the tensors whose names begin with one of
    `ENCODER_PREFIXES`.
    """

    ENCODER_PREFIXES = ("encoder.", "conv1.")

    def __init__(self, config: VAEConfig, *, encoder: bool = True) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config) if encoder else None
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1) if encoder else None
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def encode(self, frames: Tensor, *, chunked: bool = True) -> Tensor:
        """Frames -> latents: the mean of the distribution, no sampling.

        Raises:
            ValueError: frames of a shape that the VAE cannot encode.
        """
        return self.encode_distribution(frames, chunked=chunked)[0]

    def encode_distribution(self, frames: Tensor, *, chunked: bool = False) -> tuple[Tensor, Tensor]:
        """Frames -> (mean, log of the variance) of the normalised latents, each (B, z_dim, T, h, w).

        Raises:
            ValueError: frames of a shape that the VAE cannot encode.
            RuntimeError: this VAE was built without its encoder.
        """
        if self.encoder is None or self.conv1 is None:
            raise RuntimeError(
                "this VAE was built with encoder=False, so it only decodes: build it with its encoder"
            )
        self._check_frames(frames)
        x = frames.to(self.conv1.weight.dtype)
        if chunked:
            later = (frames.shape[2] - 1) // self.config.temporal_scale
            chunks = x.split([1, *[self.config.temporal_scale] * later], dim=2)
            features = torch.cat([*run_in_chunks(self.encoder, chunks)], dim=2)
        else:
            features = self.encoder(x)
        mu, logvar = self.conv1(features).to(accumulation_dtype(frames.dtype)).chunk(2, dim=1)
        mean, std = self._statistics(mu)
        return (mu - mean) / std, logvar - 2 * std.log()

    def decode(self, latents: Tensor, *, chunked: bool = True, clamp: bool = True) -> Tensor:
        """Latents -> frames.

        Args:
            clamp: bring the frames into [-1, 1]. False is for training: a clamped pixel has no gradient.

        Raises:
            ValueError: latents of a shape that the VAE cannot decode.
        """
        if chunked:
            return torch.cat([*self.decode_chunks(latents, clamp=clamp)], dim=2)
        frames = self.decoder(self.denormalise(latents)).to(accumulation_dtype(latents.dtype))
        return frames.clamp(-1, 1) if clamp else frames

    def decode_chunks(self, latents: Tensor, *, clamp: bool = True) -> Iterator[Tensor]:
        """Yield the frames of each latent frame in order: (B, 3, 1, H, W), then (B, 3, 4, H, W) each.

        Between chunks the iterator holds the last two input frames of each convolution, and none of the
        frames that it has handed out. Dropping it half way is fine.

        Raises:
            ValueError: at the call, for latents of a shape that the VAE cannot decode.
        """
        dtype = accumulation_dtype(latents.dtype)

        def decode_chunk(chunk: Tensor, history: History) -> Tensor:
            frames = self.decoder(chunk, history).to(dtype)
            return frames.clamp(-1, 1) if clamp else frames

        return run_in_chunks(decode_chunk, self.denormalise(latents).split(1, dim=2))

    def denormalise(self, latents: Tensor) -> Tensor:
        """Latents -> the decoder's input (B, z_dim, T, h, w), in the parameters' dtype.

        Raises:
            ValueError: latents of a shape that the VAE cannot decode.
        """
        z_dim = self.config.z_dim
        if latents.ndim != 5 or latents.shape[1] != z_dim or 0 in latents.shape:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, expected (B, {z_dim}, T, h, w), none of them 0"
            )
        latents = latents.to(accumulation_dtype(latents.dtype))
        mean, std = self._statistics(latents)
        return self.conv2((latents * std + mean).to(self.conv2.weight.dtype))

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The latents' mean and std, each (z_dim, 1, 1, 1).

        Made from the config at each call: buffers would be in the state dict, or stay on the meta device when
        the model is built there.
        """
        both = like.new_tensor([self.config.latents_mean, self.config.latents_std])
        mean, std = both.view(2, self.config.z_dim, 1, 1, 1)
        return mean, std

    def _check_frames(self, frames: Tensor) -> None:
        space, time = self.config.spatial_scale, self.config.temporal_scale
        if frames.ndim != 5 or frames.shape[1] != 3 or 0 in frames.shape:
            raise ValueError(
                f"frames have shape {tuple(frames.shape)}, expected (B, 3, F, H, W), none of them 0"
            )
        _, _, count, height, width = frames.shape
        if count % time != 1 % time:
            raise ValueError(f"there are {count} frames, expected a multiple of {time} plus 1")
        if height % space or width % space:
            raise ValueError(f"frames are {height}x{width} (HxW), expected both to be multiples of {space}")
