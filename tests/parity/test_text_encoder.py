"""The text encoder against transformers' UMT5EncoderModel and against the published sizes and thresholds."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime.text_encoder import ALIGNED_KEYS, TextEncoder, TextEncoderConfig, distance_buckets

TO_TRANSFORMERS = [  # in order: what the original calls a part, what transformers calls it
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.", r"encoder.block.\1.layer."),
    (r"layer\.norm1\.", "layer.0.layer_norm."),
    (r"layer\.attn\.", "layer.0.SelfAttention."),
    (r"layer\.pos_embedding\.embedding\.", "layer.0.SelfAttention.relative_attention_bias."),
    (r"layer\.norm2\.", "layer.1.layer_norm."),
    (r"layer\.ffn\.gate\.0\.", "layer.1.DenseReluDense.wi_0."),
    (r"layer\.ffn\.fc1\.", "layer.1.DenseReluDense.wi_1."),
    (r"layer\.ffn\.fc2\.", "layer.1.DenseReluDense.wo."),
]

CONFIGS = {
    "4 heads of 16": TextEncoderConfig(97, 64, 64, 160, 4, 2),
    "attention wider than the states": TextEncoderConfig(97, 48, 96, 80, 3, 3),
    "few buckets": TextEncoderConfig(97, 64, 64, 96, 2, 1, num_buckets=16, max_distance=40),
}


def randomize(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew, norms and biases too: an initial one would hide a fault."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.4 * draw)
            elif "embedding" in name:
                parameter.copy_(draw)
            else:
                parameter.copy_(draw * parameter.shape[1] ** -0.5)


def build(config: TextEncoderConfig, seed: int = 0) -> TextEncoder:
    model = TextEncoder(config)
    randomize(model, seed)
    return model


def in_transformers(model: TextEncoder) -> nn.Module:
    """transformers' model with the parameters of `model`, every one of them matched by name."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    theirs = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.dim,
            d_kv=config.dim_attn // config.num_heads,
            d_ff=config.dim_ffn,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
            layer_norm_epsilon=config.eps,
            attn_implementation="eager",
        )
    ).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in TO_TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    theirs.load_state_dict(state, strict=True)
    return theirs


def draw(config: TextEncoderConfig, lengths: list[int], padded_to: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids that end with 1 and are padded with 0, and their mask, both (B, padded_to)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, config.vocab_size, (len(lengths), padded_to), generator=generator)
    mask = torch.arange(padded_to) < torch.tensor(lengths)[:, None]
    ids[~mask] = 0
    ids[range(len(lengths)), [n - 1 for n in lengths]] = 1
    return ids, mask


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("lengths", [[1], [2], [37], [200], [5, 48, 1, 23]], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_matches_transformers(name: str, lengths: list[int]) -> None:
    config = CONFIGS[name]
    ours = build(config, seed=len(lengths))
    theirs = in_transformers(ours)
    ids, mask = draw(config, lengths, max(lengths) + 11, seed=sum(lengths))
    with torch.inference_mode():
        a, b = ours(ids, mask), theirs(ids, attention_mask=mask.long()).last_hidden_state
    difference = relative(a[mask], b[mask])
    print(f"text encoder, {name}, lengths {lengths}: relative max diff {difference:.2e}")
    assert a.shape == (*ids.shape, config.dim)
    assert difference <= 1e-5
    assert not a[~mask].any() and a[mask].abs().amax(-1).min() > 0.1


def test_gradients_match_transformers() -> None:
    config = CONFIGS["attention wider than the states"]
    ours = build(config, 1)
    theirs = in_transformers(ours)
    ids, mask = draw(config, [9, 31], 31, seed=2)
    weights = torch.randn(2, 31, config.dim, generator=torch.Generator().manual_seed(3)) * mask[..., None]
    (ours(ids, mask) * weights).sum().backward()
    (theirs(ids, attention_mask=mask.long()).last_hidden_state * weights).sum().backward()
    reference = dict(theirs.named_parameters())
    worst = 0.0
    for name, parameter in ours.named_parameters():
        for pattern, replacement in TO_TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        worst = max(worst, relative(parameter.grad, reference[name].grad))
    print(f"text encoder, gradients: relative max diff {worst:.2e}")
    assert worst <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_nothing(dtype: torch.dtype) -> None:
    config = CONFIGS["4 heads of 16"]
    model = build(config, 4).to(dtype)
    lengths = [5, 48, 1, 23]
    ids, mask = draw(config, lengths, 64, seed=5)
    ids[~mask] = torch.randint(2, config.vocab_size, ids[~mask].shape)  # whatever stands there
    with torch.inference_mode():
        padded = model(ids, mask)
        rows = [model(ids[i : i + 1, :n], mask[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
    assert padded.dtype == dtype
    worst = max(relative(padded[i, :n].float(), rows[i].float()) for i, n in enumerate(lengths))
    print(f"text encoder, padded against unpadded in {dtype}: relative max diff {worst:.2e}")
    assert worst <= (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("lengths", [[1], [16], [37], [9, 9]], ids=str)
def test_no_mask_is_a_mask_of_real_tokens(lengths: list[int]) -> None:
    config = CONFIGS["attention wider than the states"]
    model = build(config, 11)
    ids, mask = draw(config, lengths, lengths[0], seed=12)
    assert mask.all()
    with torch.inference_mode():
        assert torch.equal(model(ids), model(ids, mask))
    gradients = []
    for given in (None, mask):
        states = model(ids, given)
        changes = torch.autograd.grad(states.square().sum(), [*model.parameters()])
        gradients.append((states.detach(), *changes))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert all(one.any() for one in gradients[0]) or lengths == [1]  # one token attends to itself alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 8, 17, 32])
def test_biases_lie_as_attention_reads_them(length: int, dtype: torch.dtype) -> None:
    """Otherwise torch computes scores whole in fp32, or copies the biases."""
    config = CONFIGS["4 heads of 16"]
    model = build(config, 13)
    block: Any = model.blocks[1]
    x = torch.randn(1, length, config.dim).to(dtype)
    bias = block.bias(x, model._buckets(torch.ones(1, length, dtype=torch.long)), None)
    assert bias.shape == (1, config.num_heads, length, length) and bias.dtype == dtype
    assert bias.stride(-1) == 1 and not any(stride % ALIGNED_KEYS for stride in bias.stride()[:-1])
    positions = torch.arange(length)
    buckets = distance_buckets(positions[None, :] - positions[:, None])
    expected = block.pos_embedding.embedding(buckets).permute(2, 0, 1).to(dtype)
    assert torch.equal(bias[0], expected)


def test_rows_without_any_token_stay_finite() -> None:
    config = CONFIGS["4 heads of 16"]
    model = build(config, 6)
    ids, mask = draw(config, [7, 12], 12, seed=7)
    mask[0] = False
    with torch.inference_mode():
        states = model(ids, mask)
    assert states.isfinite().all() and not states[0].any() and states[1].any()


def test_bf16_is_no_further_from_fp32_than_transformers() -> None:
    """Scores without a scale make sharp softmaxes, so bf16 costs some percent here, whoever computes it."""
    config = TextEncoderConfig(97, 128, 128, 256, 4, 4)
    exact = build(config, 8)
    ours = copy.deepcopy(exact).bfloat16()
    mixed = copy.deepcopy(ours)
    for name, parameter in mixed.named_parameters():  # a checkpoint may keep the norms in fp32
        if "norm" in name:
            parameter.data = parameter.data.float()
    theirs = in_transformers(exact).bfloat16()
    ids, mask = draw(config, [40, 17], 40, seed=9)
    with torch.inference_mode():
        b = exact(ids, mask)[mask]
        fast = {
            "bf16": ours(ids, mask)[mask],
            "bf16 with fp32 norms": mixed(ids, mask)[mask],
            "transformers in bf16": theirs(ids, attention_mask=mask.long()).last_hidden_state[mask],
        }
    rms = {}
    for label, a in fast.items():
        assert a.dtype == torch.bfloat16
        rms[label] = ((a.float() - b).square().mean() / b.square().mean()).sqrt().item()
        largest = relative(a.float(), b)
        print(f"text encoder, {label} against fp32: relative max diff {largest:.2e}, rms {rms[label]:.2e}")
    assert 1e-4 < rms["bf16"] <= 1.1 * rms["transformers in bf16"]
    assert 1e-4 < rms["bf16 with fp32 norms"] <= 1.1 * rms["transformers in bf16"]


def test_published_sizes() -> None:
    with torch.device("meta"):
        state = TextEncoder(TextEncoderConfig(256384, 4096, 4096, 10240, 64, 24)).state_dict()
    assert len(state) == 242
    assert sum(t.numel() for t in state.values()) == 5_680_910_336
    linear = re.compile(r"blocks\.\d+\.(attn\.[qkvo]|ffn\.(gate\.0|fc1|fc2))\.weight$")
    assert sum(t.numel() for name, t in state.items() if linear.match(name)) == 4_630_511_616
    block = {name: tuple(t.shape) for name, t in state.items() if name.startswith("blocks.7.")}
    assert block == {
        "blocks.7.norm1.weight": (4096,),
        **{f"blocks.7.attn.{x}.weight": (4096, 4096) for x in "qkvo"},
        "blocks.7.norm2.weight": (4096,),
        "blocks.7.ffn.gate.0.weight": (10240, 4096),
        "blocks.7.ffn.fc1.weight": (10240, 4096),
        "blocks.7.ffn.fc2.weight": (4096, 10240),
        "blocks.7.pos_embedding.embedding.weight": (32, 64),
    }


def test_buckets_start_at_the_published_thresholds() -> None:
    thresholds = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    distance = torch.arange(-600, 601)
    expected = [sum(abs(d) >= t for t in thresholds) - 1 + 16 * (d > 0) for d in distance.tolist()]
    assert distance_buckets(distance).tolist() == expected
    assert distance_buckets(distance).dtype == torch.int64
    assert torch.equal(distance_buckets(distance[1:].view(3, -1)).flatten(), distance_buckets(distance)[1:])


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 40), (64, 256), (8, 20)])
def test_buckets_match_transformers(num_buckets: int, max_distance: int) -> None:
    config = TextEncoderConfig(97, 8, 8, 8, 1, 1, num_buckets, max_distance)
    theirs = in_transformers(TextEncoder(config)).encoder.block[0].layer[0].SelfAttention
    distance = torch.arange(-600, 601)
    expected = theirs._relative_position_bucket(distance)
    assert torch.equal(distance_buckets(distance, num_buckets, max_distance), expected)


def test_wrong_shapes_and_sizes_are_refused() -> None:
    model = build(CONFIGS["4 heads of 16"])
    ids, mask = draw(model.config, [5], 8, seed=10)
    for bad_ids, bad_mask in ((ids[0], mask[0]), (ids, mask[:, :5]), (ids, mask[0]), (ids[0], None)):
        with pytest.raises(ValueError, match="expected one"):
            model(bad_ids, bad_mask)
    with pytest.raises(ValueError, match="3 heads"):
        TextEncoderConfig(97, 64, 64, 160, 3, 2)
    with pytest.raises(ValueError, match="max_distance 8"):
        TextEncoderConfig(97, 64, 64, 160, 4, 2, num_buckets=32, max_distance=8)
