"""The training code, on networks so small that they train in seconds; and the files that it writes."""

import json

import pytest
import torch

from demo import train
from demo.export import export
from demo.optimizer import Clock, Muon, orthogonalise
from demo.scenes import ALL_SCENES, TRAIN_SCENES, scene_indices
from demo.train_transformer import (
    LATENT_SHAPE,
    SIGMAS,
    Generator,
    Pool,
    initialise,
    noise_for_start,
    plain_loss,
    start_from_noise,
    train_generator,
)
from demo.train_vae import build_vae, fold_statistics
from runtime.checkpoint import open_checkpoint

TINY = train.SMOKE.sizes


@pytest.fixture(scope="module")
def pool() -> Pool:
    torch.manual_seed(0)
    return Pool(build_vae(2), torch.device("cpu"), 4, TRAIN_SCENES[:2])


@pytest.fixture(scope="module")
def model() -> Generator:
    torch.manual_seed(1)
    generator = Generator(TINY)
    initialise(generator)
    return generator


def test_noise_and_starting_point_belong_together():
    torch.manual_seed(2)
    start = torch.rand(64, 2)
    noise = noise_for_start(start)
    assert torch.allclose(start_from_noise(noise), start, atol=2e-3)
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    free = start_from_noise(torch.randn(2000, *LATENT_SHAPE))
    assert abs(float(free.mean()) - 0.5) < 0.03  # uniform: mean 1/2, variance 1/12
    assert abs(float(free.var()) - 1 / 12) < 0.01


def test_the_untrained_transformer_hands_its_input_through(model):
    latents = torch.randn(2, *LATENT_SHAPE)
    with torch.no_grad():
        velocity = model(latents, torch.ones(2), model.text_states(torch.ones(2, 32, dtype=torch.int64)))
    assert float((velocity - latents).std()) < 0.3


def test_padding_has_no_text_state(model):
    ids = torch.zeros(1, 32, dtype=torch.int64)
    ids[0, :4] = torch.tensor([5, 6, 7, 1])
    states = model.text_states(ids)
    assert states[:, 4:].abs().max() == 0
    assert states[:, :4].abs().min() > 0


def test_the_likeliest_clip_is_the_one_under_the_noise(pool):
    torch.manual_seed(3)
    pick = torch.arange(8)
    clean, _ = pool.clips(pick)
    for sigma in SIGMAS[2:4]:
        noisy = (1 - sigma) * clean + sigma * torch.randn_like(clean)
        level = torch.full((8,), sigma)
        assert torch.equal(pool.likeliest(noisy, level, pick), pick)
        # Told a wrong clip of the same scene, it goes to the one that the state shows.
        neighbour = pick // 4 * 4 + (pick + 1) % 4
        assert torch.equal(pool.likeliest(noisy, level, neighbour), pick)


def test_training_reduces_the_loss(pool):
    torch.manual_seed(4)
    generator = Generator(TINY)
    initialise(generator)
    with torch.no_grad():
        before = torch.stack([plain_loss(generator, pool, 8) for _ in range(4)]).mean()
    train_generator(generator, pool, Clock(1, 25), batch=8, rollout_batch=2, rollout_from=0.8)
    with torch.no_grad():
        after = torch.stack([plain_loss(generator, pool, 8) for _ in range(4)]).mean()
    print(f"velocity error {before:.3f} -> {after:.3f}")
    assert after < 0.85 * before


def test_folding_makes_latents_standard_and_keeps_the_frames():
    torch.manual_seed(5)
    vae = build_vae(2).requires_grad_(False)
    table = scene_indices(list(ALL_SCENES))
    frames = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    before = vae.decode(vae.encode(frames, chunked=False), chunked=False, clamp=False)
    fold_statistics(vae, table, 3)
    after = vae.decode(vae.encode(frames, chunked=False), chunked=False, clamp=False)
    assert torch.allclose(before, after, atol=1e-3)
    vae_again = build_vae(2).requires_grad_(False)
    vae_again.load_state_dict(vae.state_dict())
    fold_statistics(vae_again, table, 3)  # nothing is left to fold
    assert torch.allclose(vae_again.conv1.weight, vae.conv1.weight, rtol=1e-2, atol=1e-4)


def test_muon_updates_have_equal_singular_values():
    torch.manual_seed(6)
    singular = torch.linalg.svdvals(orthogonalise(torch.randn(2, 24, 48)))
    assert singular.min() > 0.5
    assert singular.max() < 1.5
    matrix = torch.nn.Parameter(torch.randn(8, 8))
    target = torch.randn(8, 8)
    muon = Muon([matrix], rate=0.05)
    before = float((matrix.detach() - target).square().mean())
    for _ in range(100):
        matrix.grad = None
        (matrix - target).square().sum().backward()
        muon.step(1.0)
    assert float((matrix.detach() - target).square().mean()) < 0.3 * before


def test_smoke_run_writes_every_variant_and_goes_on_from_its_files(tmp_path, capsys):
    arguments = ["--smoke", "--device", "cpu", "--out", str(tmp_path / "weights"), "--work", str(tmp_path)]
    train.main(arguments)
    assert "generator: 2 steps" in capsys.readouterr().out
    for variant, form in {"models/distill_model.safetensors": None, "fp8": "fp8", "int8": "int8"}.items():
        checkpoint = open_checkpoint(tmp_path / "weights" / f"distill_{variant}", "transformer")
        assert set(checkpoint.quantized_linears().values()) == ({form} if form else set())
        assert checkpoint.sizes()["dim"] == TINY.dim
    config = json.loads((tmp_path / "weights" / "config.json").read_text())
    assert config["_class_name"] == "WanModel"
    assert config["text_len"] == 32
    train.main(arguments)
    assert "steps" not in capsys.readouterr().out.split("\n", 1)[1]


def test_export_reports_its_size(tmp_path, model):
    total = export(model, build_vae(2), tmp_path)
    assert total == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
