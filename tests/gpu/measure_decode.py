"""Time and memory of the VAE decode on this card: the whole picture, its parts, rungs, and where time goes.

    python -m tests.gpu.measure_decode [--only whole|parts|kernels|rungs]

With random weights of the true shapes, bf16. `whole` is the quick look (20 s): 81 frames at both sizes into
checked bytes, first and warm, memory beside its prediction, the distance to the slow twin in fp32, then the
kernels that the card is busy with. `parts` times each fused kernel beside what it replaces. `rungs` decodes
in each rung of the ladder, 81 frames of 480x832 and 41 of 720x1280: what `LAUNCHES`, `OVERLAP` and
`WORKSPACE_SHARE` of `runtime/memory/decode_costs.py` were fitted to. Compare inside one run: a card at its
power limit changes its clocks.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before torch starts

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.frames import Decoding, frames_to_bytes
from runtime.kernels.interleave import interleave
from runtime.kernels.launch import trouble
from runtime.kernels.norm_silu import norm_silu, norm_silu_torch
from runtime.kernels.residual_add import residual_add
from runtime.layers.causal_conv import CausalConv3d, Rings
from runtime.layers.video_blocks import Upsample
from runtime.memory.costs import reserved
from runtime.memory.decode_costs import (
    WHOLE,
    Rung,
    decode_bytes,
    decode_time_factor,
    decode_workspace,
    rungs,
)
from runtime.vae import VAE, VAEConfig
from runtime.vae_tiles import decode_pieces
from runtime.video import frames_to_uint8

SIZES = [(480, 832, 81), (720, 1280, 41)]
TARGETS = {(480, 832, 81): 0.95, (720, 1280, 81): 2.3}  # seconds, warm, on an H200


def random_vae(dtype: torch.dtype, seed: int = 1) -> VAE:
    """The published decoder on the card, every tensor random, activations near 1 all the way through."""
    generator = torch.Generator("cuda").manual_seed(seed)
    with torch.device("cuda"):
        vae = VAE(VAEConfig(), encoder=False)
    for name, tensor in vae.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator, device="cuda")
        if name.endswith("gamma"):
            tensor.data = 1 + 0.1 * noise
        else:
            tensor.data = noise * (0.1 if name.endswith("bias") else tensor[0].numel() ** -0.5)
    # Pixels inside [-1, 1]: a clamped one would agree whatever came before.
    head = vae.decoder.head[2]
    assert isinstance(head, CausalConv3d)
    head.weight.data *= 0.3
    return vae.to(dtype).eval().requires_grad_(False)


def random_latents(height: int, width: int, frames: int) -> Tensor:
    """Latents of such a video, (1, 16, T, h, w) fp32."""
    generator = torch.Generator("cuda").manual_seed(2)
    shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    return torch.randn(shape, generator=generator, device="cuda")


def timed(run: Callable[[], object]) -> float:
    """Seconds of `run`, the card's work included."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.inference_mode():
        run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def drop_all(vae: VAE, latents: Tensor, rung: Rung = WHOLE) -> None:
    """Decode and keep nothing but the piece in hand."""
    for _ in decode_pieces(vae, latents, rung):
        pass


def into_bytes(vae: VAE, latents: Tensor, rung: Rung = WHOLE) -> None:
    """Decode as the pipeline does: every frame checked and fetched as bytes."""
    for _ in Decoding(vae, latents, rung):
        pass


def fresh() -> None:
    """Give cached memory back and begin to watch the peaks."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def beside_prediction(rung: Rung, height: int, width: int, frames: int) -> str:
    """Allocated (reserved) GB since `fresh`, live bytes as predicted, and what the plan says is reserved."""
    allocated, taken = (
        peak / 1e9 for peak in (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    )
    live = decode_bytes(rung, height, width, frames)
    total = live + decode_workspace(live)
    planned = (total + reserved(total)) / 1e9
    word = "ABOVE THE PLAN" if taken > planned else f"{planned / taken - 1:.1%} below the plan"
    return f"{allocated:.3f} ({taken:.3f}) | {live / 1e9:.3f} | {planned:.3f} | {word}"


def first_kernels() -> float:
    """Seconds until the decoder's kernels have run once: they are compiled, or read from Triton's cache."""
    began = time.perf_counter()
    for channels in (96, 192, 384):
        shape = (1, channels, 32, 64)
        x = torch.randn(shape, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
        ring = torch.empty(1, 3 * channels, 32, 64, device="cuda", dtype=x.dtype)
        slot = ring.contiguous(memory_format=torch.channels_last)[:, channels : 2 * channels]
        gamma = torch.ones(channels, 1, 1, 1, device="cuda", dtype=x.dtype)
        for bias in (None, gamma.flatten()):
            norm_silu(x, gamma, out=slot, bias=bias)
        residual_add(x, x.clone(), gamma.flatten())
        if channels < 384:
            wide = torch.randn(1, 4 * channels, 33, 65, device="cuda").bfloat16()
            interleave(wide.contiguous(memory_format=torch.channels_last), gamma.flatten())
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measure_whole() -> None:
    """Both sizes, whole: seconds, memory, the distance to the slow twin; then what the card is busy with."""
    trouble_found = trouble(torch.device("cuda", 0)) or "Triton works"
    print(f"\n{trouble_found}; the decoder's kernels compiled or read: {first_kernels():.2f} s")
    vae = random_vae(torch.bfloat16)
    print("\n| size | first s | warm s | without bytes | allocated (reserved) GB | predicted live | plan | |")
    print("|---|---|---|---|---|---|---|---|")
    for (height, width, frames), target in TARGETS.items():
        latents = random_latents(height, width, frames)
        fresh()
        first = timed(partial(into_bytes, vae, latents))
        warm = sorted(timed(partial(into_bytes, vae, latents)) for _ in range(3))[1]
        bare = sorted(timed(partial(drop_all, vae, latents)) for _ in range(3))[1]
        memory = beside_prediction(WHOLE, height, width, frames)
        seconds = f"{first:.3f} | {warm:.3f} (target {target}) | {bare:.3f}"
        print(f"| {height}x{width}x{frames} | {seconds} | {memory} |", flush=True)
        del latents
    measure_difference(vae)
    measure_kernels(vae)


def measure_difference(vae: VAE) -> None:
    """The fast decode and the slow twin, both in bf16, against the slow twin in fp32; 5 frames."""
    latents = random_latents(480, 832, 5)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        exact = random_vae(torch.float32).decode(latents)
        found = {
            "fast": torch.cat([piece.frames for piece in decode_pieces(vae, latents)], dim=2),
            "slow twin": vae.decode(latents),
        }
    print("\n480x832x5, difference to the slow twin in fp32 (frames in [-1, 1])")
    for name, frames in found.items():
        rms, most = (frames - exact).norm() / exact.norm(), (frames - exact).abs().max()
        print(f"  {name}: relative {float(rms):.2e}, largest {float(most):.2e}")


def measure_kernels(vae: VAE) -> None:
    """What the card spends its time on, whole picture, 480x832x9."""
    latents = random_latents(480, 832, 9)
    drop_all(vae, latents)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds = timed(partial(drop_all, vae, latents))
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    busy = sum(row.self_device_time_total for row in rows) / 1e6
    calls = sum(row.count for row in rows)
    print(f"\n480x832x9: {seconds:.3f} s, of which the card is busy {busy:.3f} s with {calls} kernels\n")
    print("| kernel | calls | ms | share |\n|---|---|---|---|")
    for row in rows[:12]:
        share = row.self_device_time_total / 1e6 / busy
        print(f"| {row.key[:90]} | {row.count} | {row.self_device_time_total / 1e3:.1f} | {share:.1%} |")


def per_call(run: Callable[[], object], repeats: int = 20) -> float:
    """Milliseconds of the card for one call, by its own clock."""
    run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


@torch.inference_mode()
def measure_parts() -> None:
    """Each fused kernel at the finest size of 480x832, beside what it stands for."""
    vae = random_vae(torch.bfloat16)
    conv = vae.decoder.head[2]
    assert isinstance(conv, CausalConv3d)
    gamma, bias = torch.rand(96, 1, 1, 1, device="cuda"), torch.rand(96, device="cuda").bfloat16()
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    x, y = (make(1, 96, 480, 832).contiguous(memory_format=torch.channels_last) for _ in range(2))
    small = make(1, 192, 240, 416).contiguous(memory_format=torch.channels_last)
    rings, frames = Rings(), torch.rand(3, 4, 480, 832, device="cuda") * 2 - 1
    slot = rings.slot(conv, x)
    upsample = [layer for layer in vae.decoder.upsamples if isinstance(layer, Upsample)][-1]
    enlarged = F.conv2d(small, upsample.corners(), padding=1)

    def through_nearest() -> Tensor:
        return upsample.conv(F.interpolate(small, scale_factor=2.0, mode="nearest"))

    parts: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "norm, SiLU, bias into a ring": (
            lambda: norm_silu(x, gamma, out=slot, bias=bias),
            lambda: norm_silu_torch(x, gamma, True, slot, bias),
        ),
        "residual and bias": (
            lambda: residual_add(y, x, bias),
            lambda: y.add_(bias.view(-1, 1, 1)).add_(x),
        ),
        "twice as large, and convolved": (lambda: upsample.enlarge(small, rings), through_nearest),
        "of which interleaving": (
            lambda: interleave(enlarged, bias),
            lambda: F.interpolate(small, scale_factor=2.0, mode="nearest"),
        ),
        "four frames to bytes": (lambda: frames_to_bytes(frames), lambda: frames_to_uint8(frames)),
    }
    print("\n480x832, a frame\n\n| part | ms | before, ms |\n|---|---|---|")
    for name, (fast, before) in parts.items():
        print(f"| {name} | {per_call(fast):.3f} | {per_call(before):.3f} |", flush=True)


def measure_rungs() -> None:
    """Each rung of both ladders, beside its prediction."""
    vae = random_vae(torch.bfloat16)
    first_kernels()
    print("\n| size | rung | s | to whole (predicted) | allocated (reserved) GB | predicted live | plan | |")
    print("|---|---|---|---|---|---|---|---|")
    for height, width, frames in SIZES:
        latents, whole_seconds = random_latents(height, width, frames), 0.0
        for rung in rungs(height, width):
            fresh()
            drop_all(vae, latents[:, :, :2], rung)  # every shape has been seen
            seconds = timed(partial(drop_all, vae, latents, rung))
            whole_seconds = whole_seconds or seconds
            factor = decode_time_factor(rung, height, width)
            print(
                f"| {height}x{width}x{frames} | {rung.name} | {seconds:.3f} | {seconds / whole_seconds:.3f} "
                f"({factor:.3f}) | {beside_prediction(rung, height, width, frames)} |",
                flush=True,
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["whole", "parts", "kernels", "rungs"])
    given = parser.parse_args()
    cudnn = torch.backends.cudnn.version()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {cudnn}, random weights, bf16")
    parts: dict[str, Callable[[], None]] = {
        "whole": measure_whole,
        "parts": measure_parts,
        "kernels": lambda: measure_kernels(random_vae(torch.bfloat16)),
        "rungs": measure_rungs,
    }
    for name, part in parts.items():
        if given.only == name or (given.only is None and name != "kernels"):  # `whole` ends with them
            part()
            fresh()


if __name__ == "__main__":
    main()
