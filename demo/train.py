"""Train the demo checkpoint from nothing: VAE, its decoder, text encoder with transformer; then the files.

    python -m demo.train --out demo/weights

Each stage ends with a file in the working directory (build/demo); a later run goes on from those that are
there. `--smoke` walks through everything in seconds on a CPU, with tiny networks, and learns nothing.
"""

import argparse
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from demo.export import export
from demo.optimizer import Clock
from demo.sampling import score_table
from demo.scenes import TRAIN_SCENES, scene_indices
from demo.score import table
from demo.train_transformer import Generator, Pool, Sizes, initialise, train_generator
from demo.train_vae import (
    between_clips,
    build_vae,
    score_reconstructions,
    set_layout,
    train_decoder,
    train_vae,
)
from runtime.vae import VAE


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    vae_minutes: float = 3.7
    decoder_minutes: float = 7.8
    minutes: float = 7.4  # text encoder and transformer
    starts: int = 160  # encoded starting points for each training scene
    batch: int = 256
    rollout_batch: int = 160
    rate: float = 0.022
    rollout_from: float = 0.4  # share of the time after which half of the updates are rollouts
    vae_rate: float = 1.5e-3
    crop_share: float = 0.5  # of the VAE's time that goes to small crops
    measured: int = 96  # clips that the latents' statistics are measured on
    vae_width: int = 16
    sizes: Sizes = field(default_factory=Sizes)
    steps: int | None = None  # instead of minutes
    scenes: int = len(TRAIN_SCENES)
    crops: int = 48
    clips: int = 10
    repeats: int = 8  # noises for each held-out scene in the final table; 0 for no table


SMOKE = Plan(
    starts=1,
    batch=2,
    rollout_batch=2,
    vae_width=2,
    sizes=Sizes(text_dim=16, text_ffn=16, text_layers=1, dim=128, ffn_dim=32, heads=1, layers=1),
    steps=2,
    scenes=2,
    crops=1,
    clips=1,
    repeats=0,
    measured=2,
)


def stage_vae(plan: Plan, work: Path, device: torch.device) -> VAE:
    """The trained VAE, from its file or from training."""
    path = work / "vae.pt"
    vae = build_vae(plan.vae_width).to(device)
    if path.exists():
        vae.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        if device.type == "cuda":
            set_layout(vae, torch.channels_last_3d)
        return vae.eval().requires_grad_(False)
    clock = Clock(plan.vae_minutes, plan.steps)
    vae = train_vae(
        vae,
        clock,
        device,
        rate=plan.vae_rate,
        crop_share=plan.crop_share,
        crops=plan.crops,
        clips=plan.clips,
        measured=plan.measured,
        saved=work / "vae.partial.pt",
    )
    torch.save(vae.state_dict(), path)
    spread = between_clips(vae, scene_indices(list(TRAIN_SCENES), device), plan.measured // 3 + 2)
    print(
        f"vae: {clock.step} steps, {clock.elapsed():.0f} s, variance between clips {spread:.2f}", flush=True
    )
    report_reconstructions(plan, vae, device)
    return vae


def report_reconstructions(plan: Plan, vae: VAE, device: torch.device) -> None:
    """Print the ceiling that the VAE sets."""
    if plan.repeats:
        scores, decibel = score_reconstructions(vae, device)
        print(table({f"reconstruction, {decibel:.1f} dB": scores}), flush=True)


def stage_decoder(plan: Plan, work: Path, device: torch.device, vae: VAE) -> VAE:
    """The VAE with its decoder trained further, from its file or from training."""
    path = work / "decoder.pt"
    if path.exists():
        vae.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        return vae
    clock = Clock(plan.decoder_minutes, plan.steps)
    if clock.fraction() >= 1:
        return vae
    vae = train_decoder(vae, clock, device, clips=plan.clips, saved=work / "decoder.partial.pt")
    torch.save(vae.state_dict(), path)
    print(f"decoder: {clock.step} steps, {clock.elapsed():.0f} s", flush=True)
    report_reconstructions(plan, vae, device)
    return vae


def stage_generator(plan: Plan, work: Path, device: torch.device, vae: VAE) -> Generator:
    """The trained text encoder and transformer, from their file or from training."""
    path = work / "generator.pt"
    model = Generator(plan.sizes).to(device)
    if path.exists():
        model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        return model.eval().requires_grad_(False)
    started = time.monotonic()
    pool = Pool(vae, device, plan.starts, TRAIN_SCENES[: plan.scenes])
    print(f"pool: {len(pool.indices)} clips, {time.monotonic() - started:.0f} s", flush=True)
    initialise(model)
    clock = Clock(plan.minutes, plan.steps)
    model = train_generator(
        model,
        pool,
        clock,
        batch=plan.batch,
        rollout_batch=plan.rollout_batch,
        rate=plan.rate,
        rollout_from=plan.rollout_from,
        saved=work / "generator.partial.pt",
    )
    torch.save(model.state_dict(), path)
    print(f"generator: {clock.step} steps, {clock.elapsed():.0f} s", flush=True)
    return model


def run(plan: Plan, out: Path, work: Path, device: torch.device, seed: int, until: str = "all") -> None:
    """Train what is not there yet, score it, write the shipped files."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)  # each stage has its own, so that it does not depend on which ones ran before
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    print(f"plan: {asdict(plan)}, seed {seed}, device {device}", flush=True)
    vae = stage_vae(plan, work, device)
    if until == "vae":
        return
    torch.manual_seed(seed + 1)
    vae = stage_decoder(plan, work, device, vae)
    if until == "decoder":
        return
    torch.manual_seed(seed + 3)
    model = stage_generator(plan, work, device, vae)
    if until == "generator":
        return
    if plan.repeats:
        print(table(score_table(model, vae, device, plan.repeats)), flush=True)
    total = export(model, vae, out)
    print(f"{out}: {total / 1e6:.1f} MB", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the shipped files go")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="where the stages keep theirs")
    parser.add_argument("--vae-minutes", type=float, default=Plan.vae_minutes)
    parser.add_argument("--decoder-minutes", type=float, default=Plan.decoder_minutes)
    parser.add_argument("--minutes", type=float, default=Plan.minutes, help="text encoder and transformer")
    parser.add_argument("--starts", type=int, default=Plan.starts)
    parser.add_argument("--rate", type=float, default=Plan.rate)
    parser.add_argument("--repeats", type=int, default=Plan.repeats)
    parser.add_argument(
        "--until", choices=("vae", "decoder", "generator", "all"), default="all", help="the last stage to run"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="a few steps of tiny networks")
    given = parser.parse_args(arguments)
    chosen = (
        SMOKE
        if given.smoke
        else Plan(
            vae_minutes=given.vae_minutes,
            decoder_minutes=given.decoder_minutes,
            minutes=given.minutes,
            starts=given.starts,
            rate=given.rate,
            repeats=given.repeats,
        )
    )
    run(chosen, given.out, given.work, torch.device(given.device), given.seed, given.until)


if __name__ == "__main__":
    main()
