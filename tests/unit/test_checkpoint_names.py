"""Names of other publishers: their real state dicts map onto ours one to one, and back."""

import pytest
import torch

from runtime.checkpoint.names import Kind, from_canonical, strip_prefix, to_canonical
from runtime.vae import VAE, VAEConfig
from tests.unit.checkpoint_fixtures import TEXT_ENCODER, TRANSFORMER, VAE_CONFIG, on_meta

KINDS: list[Kind] = ["transformer", "text_encoder", "vae"]

# Wan name -> diffusers' or transformers', a sample of each rule
SAMPLES: dict[Kind, dict[str, str]] = {
    "transformer": {
        "patch_embedding.bias": "patch_embedding.bias",
        "text_embedding.2.weight": "condition_embedder.text_embedder.linear_2.weight",
        "time_embedding.0.bias": "condition_embedder.time_embedder.linear_1.bias",
        "time_projection.1.weight": "condition_embedder.time_proj.weight",
        "blocks.37.self_attn.q.weight": "blocks.37.attn1.to_q.weight",
        "blocks.3.cross_attn.o.weight_scale": "blocks.3.attn2.to_out.0.weight_scale",
        "blocks.0.cross_attn.norm_k.weight": "blocks.0.attn2.norm_k.weight",
        "blocks.12.norm3.bias": "blocks.12.norm2.bias",
        "blocks.1.ffn.0.weight": "blocks.1.ffn.net.0.proj.weight",
        "blocks.1.ffn.2.bias": "blocks.1.ffn.net.2.bias",
        "blocks.1.modulation": "blocks.1.scale_shift_table",
        "head.modulation": "scale_shift_table",
        "head.head.weight": "proj_out.weight",
    },
    "text_encoder": {
        "token_embedding.weight": "shared.weight",
        "blocks.5.norm1.weight": "encoder.block.5.layer.0.layer_norm.weight",
        "blocks.5.attn.k.weight": "encoder.block.5.layer.0.SelfAttention.k.weight",
        "blocks.5.norm2.weight": "encoder.block.5.layer.1.layer_norm.weight",
        "blocks.5.ffn.gate.0.weight": "encoder.block.5.layer.1.DenseReluDense.wi_0.weight",
        "blocks.5.ffn.fc1.weight": "encoder.block.5.layer.1.DenseReluDense.wi_1.weight",
        "blocks.5.ffn.fc2.weight": "encoder.block.5.layer.1.DenseReluDense.wo.weight",
        "norm.weight": "encoder.final_layer_norm.weight",
    },
    "vae": {
        "conv1.weight": "quant_conv.weight",
        "conv2.bias": "post_quant_conv.bias",
        "encoder.conv1.weight": "encoder.conv_in.weight",
        "encoder.downsamples.3.shortcut.weight": "encoder.down_blocks.3.conv_shortcut.weight",
        "encoder.downsamples.5.time_conv.weight": "encoder.down_blocks.5.time_conv.weight",
        "encoder.middle.1.to_qkv.bias": "encoder.mid_block.attentions.0.to_qkv.bias",
        "decoder.middle.2.residual.3.gamma": "decoder.mid_block.resnets.1.norm2.gamma",
        "decoder.upsamples.3.resample.1.weight": "decoder.up_blocks.0.upsamplers.0.resample.1.weight",
        "decoder.upsamples.6.residual.6.bias": "decoder.up_blocks.1.resnets.2.conv2.bias",
        "decoder.upsamples.14.residual.0.gamma": "decoder.up_blocks.3.resnets.2.norm1.gamma",
        "decoder.head.0.gamma": "decoder.norm_out.gamma",
        "decoder.head.2.weight": "decoder.conv_out.weight",
    },
}
SAMPLES["text_encoder"]["blocks.5.pos_embedding.embedding.weight"] = (
    "encoder.block.5.layer.0.SelfAttention.relative_attention_bias.weight"
)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_both_ways(kind: Kind) -> None:
    samples = SAMPLES[kind]
    assert from_canonical(kind, samples) == samples
    assert to_canonical(kind, samples.values()) == {theirs: ours for ours, theirs in samples.items()}
    assert to_canonical(kind, samples) == {ours: ours for ours in samples}  # our own names stay


@pytest.mark.parametrize("kind", KINDS)
def test_all_names_there_and_back(kind: Kind) -> None:
    ours = list(on_meta(kind).state_dict())
    theirs = from_canonical(kind, ours)
    assert len(set(theirs.values())) == len(ours)
    assert to_canonical(kind, theirs.values()) == {new: old for old, new in theirs.items()}


def test_a_vae_with_other_stages() -> None:
    with torch.device("meta"):
        ours = list(VAE(VAEConfig(base_dim=8, num_res_blocks=1)).state_dict())
    theirs = from_canonical("vae", ours)
    assert to_canonical("vae", theirs.values()) == {new: old for old, new in theirs.items()}
    assert "decoder.up_blocks.1.upsamplers.0.resample.1.weight" in theirs.values()


def test_the_text_encoders_table_goes_by_two_names() -> None:
    block = "encoder.block.0.layer.0.SelfAttention.q.weight"
    both = to_canonical("text_encoder", ["shared.weight", "encoder.embed_tokens.weight", block])
    assert both["shared.weight"] == "token_embedding.weight" and both["encoder.embed_tokens.weight"] is None
    alone = to_canonical(
        "text_encoder", ["encoder.embed_tokens.weight", block, "decoder.block.0.x", "spiece_model"]
    )
    assert alone["encoder.embed_tokens.weight"] == "token_embedding.weight"
    assert alone["decoder.block.0.x"] is None and alone["spiece_model"] is None


def test_prefixes() -> None:
    for prefix in ("", "diffusion_model.", "model.diffusion_model."):
        assert strip_prefix(f"{prefix}blocks.0.modulation") == "blocks.0.modulation"
    assert strip_prefix("model.blocks.0.modulation") == "model.blocks.0.modulation"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_real_classes_names(kind: Kind) -> None:
    """Every tensor of diffusers' and transformers' own classes has our name, shape by shape."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        if kind == "transformer":
            sizes = TRANSFORMER
            theirs = diffusers.WanTransformer3DModel(
                num_attention_heads=sizes.num_heads,
                attention_head_dim=sizes.dim // sizes.num_heads,
                ffn_dim=sizes.ffn_dim,
                num_layers=sizes.num_layers,
                text_dim=sizes.text_dim,
                freq_dim=sizes.freq_dim,
            )
        elif kind == "text_encoder":
            config = transformers.UMT5Config(
                vocab_size=TEXT_ENCODER.vocab_size,
                d_model=TEXT_ENCODER.dim,
                d_kv=TEXT_ENCODER.dim_attn // TEXT_ENCODER.num_heads,
                d_ff=TEXT_ENCODER.dim_ffn,
                num_layers=TEXT_ENCODER.num_layers,
                num_heads=TEXT_ENCODER.num_heads,
            )
            theirs = transformers.UMT5EncoderModel(config)
        else:
            theirs = diffusers.AutoencoderKLWan(base_dim=VAE_CONFIG.base_dim, z_dim=VAE_CONFIG.z_dim)
    shapes = {name: tuple(t.shape) for name, t in theirs.state_dict().items()}
    named = to_canonical(kind, shapes)
    ours = {name: tuple(t.shape) for name, t in on_meta(kind).state_dict().items()}
    assert {new: shapes[old] for old, new in named.items() if new is not None} == ours
