"""The transformer against diffusers' WanTransformer3DModel and against the published sizes and numbers."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from runtime.layers.norm import Affine, Modulation, RMSNorm, gated_add, norm_of
from runtime.transformer import Transformer, TransformerConfig, timestep_embedding

TO_DIFFUSERS = [  # in order: what the original calls a part, what diffusers calls it
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.(attn[12])\.([qkv])\.", r".\1.to_\2."),
    (r"\.(attn[12])\.o\.", r".\1.to_out.0."),
    (r"\.norm3\.", ".norm2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
]

CONFIGS = {
    "2 heads of 128": TransformerConfig(256, 384, 2, 2, text_dim=48, text_len=20),
    "3 heads of 40": TransformerConfig(120, 200, 3, 3, text_dim=32, text_len=9),
    "5 heads of 24, freq 64": TransformerConfig(120, 96, 5, 1, freq_dim=64, text_dim=24, text_len=16),
    "1 head of 128, 8 -> 4 channels": TransformerConfig(128, 256, 1, 2, 8, 4, text_dim=16, text_len=7),
}
SHAPES = {  # batch, latent frames, rows, columns
    "wide": (1, 3, 4, 10),
    "tall": (1, 2, 14, 6),
    "one frame": (1, 1, 8, 6),
    "many frames": (1, 17, 2, 4),
    "odd tokens": (1, 3, 6, 10),
    "batch of two": (2, 2, 6, 4),
}


def randomize(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew, norms and biases too: an initial zero or one would hide a fault."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.4 * draw)
            elif parameter.ndim < 2 or "modulation" in name:
                parameter.copy_(0.3 * draw)
            else:
                parameter.copy_(draw * parameter[0].numel() ** -0.5)


def build(config: TransformerConfig, seed: int = 0) -> Transformer:
    model = Transformer(config)
    randomize(model, seed)
    return model


def draw(
    config: TransformerConfig, shape: tuple[int, int, int, int], seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, fractional timesteps (one for each of the batch) and text states that end in zero rows."""
    generator = torch.Generator().manual_seed(seed)
    batch, *grid = shape
    latents = torch.randn(batch, config.in_dim, *grid, generator=generator)
    timestep = 1000 * torch.rand(batch, generator=generator)
    text = torch.randn(batch, config.text_len, config.text_dim, generator=generator)
    for row in range(batch):
        text[row, config.text_len // 2 + row :] = 0
    return latents, timestep, text


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def in_diffusers(model: Transformer) -> nn.Module:
    """diffusers' model with the parameters of `model`, every one of them matched by name."""
    diffusers = pytest.importorskip("diffusers")
    config = model.config
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        eps=config.eps,
    )
    state = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in TO_DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    theirs.load_state_dict(state, strict=True)
    return theirs


def compare(config: TransformerConfig, shape: tuple[int, int, int, int], seed: int) -> float:
    ours = build(config, seed)
    theirs = in_diffusers(ours)
    latents, timestep, text = draw(config, shape, seed + 1)
    with torch.inference_mode():
        a = ours(latents, timestep, text)
        b = theirs(latents, timestep, text, return_dict=False)[0]
    assert a.dtype == torch.float32 and a.shape == (shape[0], config.out_dim, *shape[1:])
    return relative(a, b)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_match_diffusers(name: str) -> None:
    difference = compare(CONFIGS["2 heads of 128"], SHAPES[name], seed=len(name))
    print(f"transformer, {name}: relative max diff {difference:.2e}")
    assert difference <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_match_diffusers(name: str) -> None:
    difference = compare(CONFIGS[name], (2, 3, 6, 4), seed=len(name))
    print(f"transformer, {name}: relative max diff {difference:.2e}")
    assert difference <= 1e-5


@pytest.mark.parametrize("step", [1000.0, 937.5, 833.3333129882812, 625.0, 0.0])
def test_the_four_timesteps_match_diffusers(step: float) -> None:
    config = CONFIGS["2 heads of 128"]
    ours = build(config, 3)
    theirs = in_diffusers(ours)
    latents, _, text = draw(config, (1, 2, 4, 6), 4)
    timestep = torch.tensor([step])
    with torch.inference_mode():
        difference = relative(ours(latents, timestep, text), theirs(latents, timestep, text)[0])
    print(f"transformer, t {step}: relative max diff {difference:.2e}")
    assert difference <= 1e-5


def test_sharing_the_sinusoid_leaves_only_rounding() -> None:
    """diffusers computes the sinusoid of the time in fp32; that is most of the distance above."""
    config = CONFIGS["2 heads of 128"]
    ours = build(config, 18)
    theirs = in_diffusers(ours)
    theirs.condition_embedder.timesteps_proj.forward = lambda t: timestep_embedding(t, config.freq_dim)
    inputs = draw(config, (2, 3, 6, 10), 19)
    with torch.inference_mode():
        difference = relative(ours(*inputs), theirs(*inputs)[0])
    print(f"transformer, same sinusoid: relative max diff {difference:.2e}")
    assert difference <= 1e-6


def test_gradients_match_diffusers() -> None:
    config = CONFIGS["3 heads of 40"]
    ours = build(config, 5)
    theirs = in_diffusers(ours)
    latents, timestep, text = draw(config, (2, 2, 4, 6), 6)
    target = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))
    inputs = [[t.clone().requires_grad_() for t in (latents, text)] for _ in range(2)]
    (ours(inputs[0][0], timestep, inputs[0][1]) - target).square().mean().backward()
    (theirs(inputs[1][0], timestep, inputs[1][1])[0] - target).square().mean().backward()
    for mine, yours in zip(*inputs, strict=True):
        assert relative(mine.grad, yours.grad) <= 1e-4
    reference = dict(theirs.named_parameters())
    worst = 0.0
    for name, parameter in ours.named_parameters():
        for pattern, replacement in TO_DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        worst = max(worst, relative(parameter.grad, reference[name].grad))
    print(f"transformer, gradients: relative max diff {worst:.2e}")
    assert worst <= 1e-4


@pytest.mark.parametrize(
    ("sizes", "tensors", "parameters", "in_linears"),
    [
        ((5120, 13824, 40, 40), 1095, 14_288_491_584, 14_050_918_400),
        ((1536, 8960, 12, 30), 825, 1_418_996_800, 1_391_984_640),
    ],
    ids=["14B", "1.3B"],
)
def test_published_sizes(
    sizes: tuple[int, int, int, int], tensors: int, parameters: int, in_linears: int
) -> None:
    with torch.device("meta"):
        state = Transformer(TransformerConfig(*sizes)).state_dict()
    assert len(state) == tensors
    assert sum(t.numel() for t in state.values()) == parameters
    block = re.compile(r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02])\.weight$")
    assert sum(t.numel() for name, t in state.items() if block.match(name)) == in_linears


def test_published_names_and_shapes() -> None:
    dim, ffn = 5120, 13824
    with torch.device("meta"):
        state = Transformer(TransformerConfig(dim, ffn, 40, 1)).state_dict()
    linears = {
        "text_embedding.0": (dim, 4096),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, 256),
    }
    linears |= {"time_embedding.2": (dim, dim), "time_projection.1": (6 * dim, dim), "head.head": (64, dim)}
    linears |= {
        "blocks.0.ffn.0": (ffn, dim),
        "blocks.0.ffn.2": (dim, ffn),
        "patch_embedding": (dim, 16, 1, 2, 2),
    }
    linears |= {f"blocks.0.{a}_attn.{x}": (dim, dim) for a in ("self", "cross") for x in "qkvo"}
    expected: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    expected |= {f"blocks.0.{a}_attn.norm_{x}.weight": (dim,) for a in ("self", "cross") for x in "qk"}
    expected |= {"blocks.0.norm3.weight": (dim,), "blocks.0.norm3.bias": (dim,)}
    expected |= {"blocks.0.modulation": (1, 6, dim), "head.modulation": (1, 2, dim)}
    assert {name: tuple(t.shape) for name, t in state.items()} == expected


def test_timestep_embedding_has_the_published_values() -> None:
    entries = [0, 1, 2, 127, 128, 129, 130, 255]
    published = {
        937.5: [0.262302, 0.580487, 0.257223, 0.994930, 0.964986, -0.814269, 0.966352, 0.100574],
        625.0: [-0.984387, -0.915967, 0.641944, 0.997745, 0.176016, -0.401253, 0.766752, 0.067113],
    }
    embedding = timestep_embedding(torch.tensor(list(published)), 256)
    difference = (embedding[:, entries] - torch.tensor(list(published.values()))).abs().max().item()
    print(f"timestep embedding: max diff {difference:.2e}")
    assert embedding.shape == (2, 256) and embedding.dtype == torch.float32
    assert difference <= 1e-6  # printed to six digits


class InComputeDtype(nn.Module):
    """Stands for a quantized linear: no readable weight, and activations of exactly one dtype in and out."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.hidden = [linear.weight.detach().float(), linear.bias.detach().float()]

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == self.dtype
        return nn.functional.linear(x.float(), *self.hidden).to(self.dtype)


def in_bf16(model: Transformer) -> Transformer:
    """A copy with all but FP32_PARAMETERS in bf16, as a checkpoint is loaded."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if not any(part in name for part in Transformer.FP32_PARAMETERS):
            parameter.data = parameter.data.bfloat16()
    return model


def test_bf16_stays_close_to_fp32() -> None:
    config = TransformerConfig(256, 512, 2, 4, text_dim=48, text_len=20)
    exact = build(config, 8)
    fast = in_bf16(exact)
    kept = {name for name, parameter in fast.named_parameters() if parameter.dtype == torch.float32}
    assert {name.split(".")[0] for name in kept} == {"time_embedding", "time_projection", "blocks", "head"}
    assert not any(re.search(r"(_attn\.[qkvo]|ffn\.[02])\.", name) for name in kept)
    latents, timestep, text = draw(config, (2, 3, 6, 8), 9)
    with torch.inference_mode():
        a, b = fast(latents, timestep, text), exact(latents, timestep, text)
        rounded = fast(latents.bfloat16(), timestep, text.bfloat16())
    rms = ((a - b).square().mean() / b.square().mean()).sqrt().item()
    print(f"transformer, bf16 against fp32: relative max diff {relative(a, b):.2e}, rms {rms:.2e}")
    assert a.dtype == torch.float32
    assert 1e-4 < rms < 2e-2  # bf16 has 8 bits: less would mean that nothing ran in bf16
    assert torch.equal(a, rounded)  # inputs are rounded to the compute dtype before all else


def test_norms_and_gates_round_once() -> None:
    """In bf16 they give exactly the rounding of what fp32 gives for the same numbers."""
    generator = torch.Generator().manual_seed(20)
    x, branch = (torch.randn(2, 9, 64, generator=generator).bfloat16() * 3 for _ in range(2))
    shift, scale, gate = torch.randn(3, 2, 1, 64, generator=generator).unbind(0)
    weight, bias = torch.randn(2, 64, generator=generator).unbind(0)
    rms = RMSNorm(64, 1e-6)
    rms.weight.data = weight
    for operation in (
        lambda x, branch: norm_of(x, Modulation(shift, scale), 1e-6),
        lambda x, branch: norm_of(x, Affine(weight, bias), 1e-6),
        lambda x, branch: gated_add(x, branch, gate),
        lambda x, branch: rms(x),
    ):
        assert torch.equal(operation(x, branch), operation(x.float(), branch.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_linears_can_be_swapped(dtype: torch.dtype) -> None:
    config = CONFIGS["2 heads of 128"]
    model = build(config, 10) if dtype == torch.float32 else in_bf16(build(config, 10))
    inputs = draw(config, (1, 2, 6, 4), 11)
    with torch.inference_mode():
        before = model(*inputs)
        for block in model.blocks:
            for name, module in list(block.named_modules()):
                if isinstance(module, nn.Linear):
                    parent, _, child = name.rpartition(".")
                    setattr(block.get_submodule(parent), child, InComputeDtype(module, dtype))
        after = model(*inputs)
    difference = relative(after, before)
    print(f"transformer, swapped linears in {dtype}: relative max diff {difference:.2e}")
    assert difference <= (1e-6 if dtype == torch.float32 else 1e-2)


def test_trains_in_bf16_and_after_inference() -> None:
    config = CONFIGS["2 heads of 128"]
    model = in_bf16(build(config, 12))
    inputs = draw(config, (2, 2, 6, 4), 13)
    with torch.inference_mode():  # must not leave a table behind that a training step cannot use
        model(*inputs)
    model(*inputs).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_members_of_a_batch_do_not_mix() -> None:
    config = CONFIGS["3 heads of 40"]
    model = build(config, 14)
    inputs = draw(config, (3, 2, 4, 6), 15)
    with torch.inference_mode():
        together = model(*inputs)
        alone = torch.cat([model(*(t[i : i + 1] for t in inputs)) for i in range(3)])
    difference = relative(together, alone)
    print(f"transformer, batch against single: relative max diff {difference:.2e}")
    assert difference <= 1e-5


def test_text_padding_is_attended_to() -> None:
    """The padding rows are one constant after the text MLP, and their number is part of the model's input."""
    config = CONFIGS["2 heads of 128"]
    model = build(config, 16)
    latents, timestep, text = draw(config, (1, 2, 4, 6), 17)
    longer = Transformer(TransformerConfig(256, 384, 2, 2, text_dim=48, text_len=40))
    longer.load_state_dict(model.state_dict())
    with torch.inference_mode():
        short = model(latents, timestep, text)
        padded = longer(latents, timestep, nn.functional.pad(text, (0, 0, 0, 20)))
    assert relative(padded, short) > 1e-3


@pytest.mark.parametrize(
    ("latents", "timestep", "text", "said"),
    [
        ((1, 16, 2, 5, 6), (1,), (1, 20, 48), "5 rows"),
        ((1, 16, 2, 4, 7), (1,), (1, 20, 48), "7 columns"),
        ((1, 12, 2, 4, 6), (1,), (1, 20, 48), "latents"),
        ((16, 2, 4, 6), (1,), (1, 20, 48), "latents"),
        ((2, 16, 2, 4, 6), (1,), (2, 20, 48), "timestep"),
        ((1, 16, 2, 4, 6), (), (1, 20, 48), "timestep"),
        ((1, 16, 2, 4, 6), (1,), (1, 13, 48), "text states"),
        ((1, 16, 2, 4, 6), (1,), (1, 20, 32), "text states"),
        ((2, 16, 2, 4, 6), (2,), (1, 20, 48), "text states"),
        ((1, 16, 1, 2, 2050), (1,), (1, 20, 48), "column axis has 1025"),
        ((1, 16, 1025, 2, 2), (1,), (1, 20, 48), "frame axis has 1025"),
        ((1, 16, 0, 4, 6), (1,), (1, 20, 48), "frame axis has 0"),
    ],
)
def test_wrong_shapes_are_refused(
    latents: tuple[int, ...], timestep: tuple[int, ...], text: tuple[int, ...], said: str
) -> None:
    model = build(CONFIGS["2 heads of 128"])
    with pytest.raises(ValueError, match=said):
        model(torch.randn(latents), 1000 * torch.rand(timestep), torch.randn(text))


def test_impossible_sizes_are_refused() -> None:
    for sizes in (
        {"dim": 100, "num_heads": 3},
        {"dim": 30, "num_heads": 2},
        {"dim": 64, "num_heads": 2, "freq_dim": 33},
    ):
        with pytest.raises(ValueError, match="must"):
            TransformerConfig(ffn_dim=8, num_layers=1, **sizes)
