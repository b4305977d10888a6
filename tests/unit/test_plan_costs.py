"""The plan's formulas against the real code at its real sizes, on the meta device, and against real
headers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from runtime import video_writer
from runtime.checkpoint import open_checkpoint
from runtime.checkpoint.families import LINEARS
from runtime.layers import rope
from runtime.linear import forced_way, swap_linears
from runtime.linear.module import SLICE_ELEMENTS
from runtime.memory import costs
from runtime.memory.costs import Geometry
from runtime.memory.sizes import (
    ALIGNMENT,
    KEPT_ROWS,
    ModelSizes,
    decoder_parameters,
    sizes_of_files,
    sizes_of_manifest,
)
from runtime.memory.stored import ALIGNMENT as STREAM_ALIGNMENT
from runtime.profiles import load_manifest
from runtime.text_encoder import TextEncoder, TextEncoderConfig
from runtime.transformer import Condition, Transformer, TransformerConfig
from runtime.vae import VAE, VAEConfig
from tests import tiny
from tests.live_memory import peak_of

MANIFESTS = {
    "bf16": "wan2.1-t2v-14b-4step-bf16",
    "fp8": "wan2.1-t2v-14b-4step-fp8",
    "int8": "wan2.1-t2v-14b-4step-int8",
}
WAYS = {"bf16": "none", "fp8": "rowwise", "int8": "integer"}  # of an 8-bit Linear to multiply on a GPU
CLOSE = 1.03
"""A formula may be so much above what is measured; never below."""


def sizes(form: str) -> ModelSizes:
    return sizes_of_manifest(load_manifest(MANIFESTS[form]), "bf16")


def on_meta(model: nn.Module, kind: str, form: str) -> nn.Module:
    """`model` as loading gives it: 8-bit matrices with fp32 biases, the transformer's fp32 parameters,
    else bf16.
    """
    keep = getattr(model, "FP32_PARAMETERS", ())
    for name, parameter in model.named_parameters():
        if not any(part in name for part in keep):
            parameter.data = parameter.data.to(torch.bfloat16)
    if form != "bf16":
        names = [name for name, _ in model.named_modules() if LINEARS[kind].fullmatch(name)]  # type: ignore[index]
        swap_linears(model, dict.fromkeys(names, form))
    return model.eval().requires_grad_(False)


def transformer(form: str, layers: int = 2) -> Transformer:
    with torch.device("meta"):
        model = Transformer(TransformerConfig(5120, 13824, num_heads=40, num_layers=layers))
    made = on_meta(model, "transformer", form)
    assert isinstance(made, Transformer)
    return made


def text_encoder(form: str, layers: int = 2) -> TextEncoder:
    with torch.device("meta"):
        model = TextEncoder(TextEncoderConfig(256384, 4096, 4096, 10240, 64, layers))
    made = on_meta(model, "text_encoder", form)
    assert isinstance(made, TextEncoder)
    return made


def nbytes(model: nn.Module, wanted: str = "") -> dict[str, int]:
    return {name: t.nbytes for name, t in model.state_dict().items() if name.startswith(wanted)}


# ------------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("form", MANIFESTS)
def test_sizes_of_the_transformer_are_those_of_the_model(form: str) -> None:
    model, found = transformer(form), sizes(form)
    block = nbytes(model, "blocks.0.")
    matrices = sum(
        n for name, n in block.items() if LINEARS["transformer"].fullmatch(name.removesuffix(".weight"))
    )
    assert found.blocks.count == 40
    assert found.blocks.matrices == matrices  # 14B's are multiples of the alignment
    assert found.blocks.small == 40 * (sum(block.values()) - matrices)
    of_text = sum(block[f"blocks.0.{module}.weight"] for module in Transformer.OF_TEXT)
    assert found.blocks.text_matrices == found.blocks.text_stored == of_text
    entry = sum(sum(nbytes(model, name).values()) for name in Transformer.ENTRY)
    outside = sum(n for name, n in nbytes(model).items() if not name.startswith("blocks."))
    assert found.entry == entry and found.ends == outside - entry
    assert found.blocks.stored == (702545920 if form == "bf16" else 351272960)
    # The time projection in fp32; a 16-bit file holds half of that, which is there until it is converted.
    assert found.entry_host == 6 * 5120 * 5120 * (6 if form == "bf16" else 4)


@pytest.mark.parametrize("form", MANIFESTS)
def test_sizes_of_the_text_encoder_are_those_of_the_model(form: str) -> None:
    model, found = text_encoder(form), sizes(form)
    block = nbytes(model, "blocks.0.")
    matrices = sum(
        n for name, n in block.items() if LINEARS["text_encoder"].fullmatch(name.removesuffix(".weight"))
    )
    assert (found.text.count, found.text.matrices) == (24, matrices)
    assert found.text.small == 24 * (sum(block.values()) - matrices) + nbytes(model)["norm.weight"]
    rows = model.token_embedding.weight.shape[0]
    assert found.token_rows * rows == nbytes(model)["token_embedding.weight"] * min(rows, KEPT_ROWS)


@pytest.mark.parametrize("base_dim", [96, 16])
def test_the_decoder_has_so_many_parameters(base_dim: int) -> None:
    with torch.device("meta"):
        real = sum(p.numel() for p in VAE(VAEConfig(base_dim=base_dim)).decoder.parameters())
    assert real * 0.995 < decoder_parameters(base_dim) <= real  # biases and norms are not counted


@pytest.mark.parametrize("variant", ["bf16", "fp8", "int8"])
def test_sizes_of_files_are_those_of_their_tensors(tmp_path: Path, variant: tiny.Variant) -> None:
    directory = tiny.build(tmp_path, (variant,)) / (
        "distill_models" if variant == "bf16" else f"distill_{variant}"
    )
    files = [
        open_checkpoint(
            directory / "distill_model.safetensors" if variant == "bf16" else directory, "transformer"
        ),
        open_checkpoint(directory / f"models_t5_umt5-xxl-enc-{variant}.pth", "text_encoder"),
        open_checkpoint(directory / "Wan2.1_VAE.pth", "vae"),
    ]
    found = sizes_of_files(*files, text_len=512, dtype="bf16")
    assert (found.dim, found.ffn_dim, found.num_heads, found.blocks.count) == (128, 256, 1, 2)
    assert (found.text_dim, found.text_ffn, found.text_heads, found.text.count) == (64, 128, 2, 2)
    assert found.quantization == found.text_quantization == variant
    width = 2 if variant == "bf16" else 1
    assert found.blocks.matrices == found.blocks.stored == width * (8 * 128 * 128 + 2 * 128 * 256)
    transformer_file, text_file, vae_file = files
    held = found.blocks.count * found.blocks.stored + found.text.count * found.text.stored + found.rest
    table = text_file.tensors["token_embedding.weight"].nbytes
    encoder = sum(i.nbytes for name, i in vae_file.tensors.items() if name.startswith("encoder."))
    assert held == transformer_file.nbytes + text_file.nbytes + vae_file.nbytes - table - encoder


def test_full_precision_files_take_more_disk_than_memory(tmp_path: Path) -> None:
    """A matrix that is stored wider than it is computed in is read as it is stored."""
    directory = tiny.build(tmp_path, ("bf16",)) / "distill_models"
    opened = [
        open_checkpoint(directory / "distill_model.safetensors", "transformer"),
        open_checkpoint(directory / "models_t5_umt5-xxl-enc-bf16.pth", "text_encoder"),
        open_checkpoint(directory / "Wan2.1_VAE.pth", "vae"),
    ]
    wide = sizes_of_files(*opened, text_len=512, dtype="fp32", vae_dtype="fp32")
    assert wide.blocks.matrices == 2 * wide.blocks.stored
    assert (wide.itemsize, wide.vae_itemsize) == (4, 4)


def test_a_matrix_in_a_slot_begins_at_a_multiple() -> None:
    assert ALIGNMENT == STREAM_ALIGNMENT
    odd = sizes_of_manifest(load_manifest("demo-fp8"), "bf16")
    assert odd.blocks.matrices % ALIGNMENT == 0


# ------------------------------------------------------------------------------------------------ activations


@pytest.mark.parametrize("form", MANIFESTS)
@pytest.mark.parametrize(
    ("height", "width", "frames", "token_slice"),
    [
        (480, 832, 81, 4096),
        (720, 1280, 81, 4096),
        (480, 832, 49, 2048),
        (480, 832, 1, 4096),
        (480, 832, 1, 512),
    ],
)
def test_activations_are_those_of_a_forward(
    form: str, height: int, width: int, frames: int, token_slice: int
) -> None:
    """One block of the full width is as good as forty: each leaves its memory to the next."""
    video, model, found = Geometry(height, width, frames), transformer(form, layers=1), sizes(form)
    with torch.device("meta"):
        latents = torch.empty(1, 16, video.latent_frames, height // 8, width // 8)
        text = torch.empty(1, 512, 5120, dtype=torch.bfloat16)
        condition = Condition(torch.empty(1, 5120), torch.empty(1, 6, 5120), text)
    assert video.latents == latents.nbytes
    model.token_slice = token_slice
    rope._table.cache_clear()  # so that the table is seen to be made
    with forced_way(WAYS[form]):
        live = peak_of(lambda: model.velocity(latents, condition), latents, text)
    formula = costs.activations(found, video, token_slice)
    # What no tensor shows: the attention's own sums, and latents of the sampler.
    unseen = 4 * video.tokens * 40 + (costs.LATENT_COPIES - 1) * video.latents
    print(f"{form} {video} in slices of {token_slice}: {formula / live:.4f} of the live bytes")
    assert live <= formula <= CLOSE * live + unseen


@pytest.mark.parametrize("texts", [1, 2])
def test_the_keys_and_values_of_all_texts_are_counted(texts: int) -> None:
    """As bytes of what is kept, and as the memory of forwards that keep and that use it."""
    video, model, found = Geometry(480, 832, 1), transformer("fp8", layers=3), sizes("fp8")
    model.keep_text, model.token_slice = True, 4096
    with torch.device("meta"):
        latents = torch.empty(1, 16, video.latent_frames, video.height // 8, video.width // 8)
        states, times = torch.empty(1, 512, 4096, dtype=torch.bfloat16), torch.empty(2, 1)
    conditions = [model.conditions(times, states) for _ in range(texts)]
    kept = [of_text[0].kept for of_text in conditions]
    assert all(of_text[1].kept is one for of_text, one in zip(conditions, kept, strict=True))

    def two_steps() -> None:
        for step in range(2):
            for of_text in conditions:
                model.velocity(latents, of_text[step])

    with forced_way(WAYS["fp8"]):
        live = peak_of(two_steps, latents)
        plain = peak_of(lambda: model.velocity(latents, replace(conditions[0][0], kept=None)), latents)
    formula = costs.text_keys_values(replace(found, blocks=replace(found.blocks, count=3)), texts)
    assert sum(one.nbytes for one in kept if one is not None) == formula
    print(f"{texts} texts: {live - plain} bytes more are alive, {formula} are counted")
    assert live <= plain + formula


@pytest.mark.parametrize("form", MANIFESTS)
def test_fused_kernels_need_less(form: str) -> None:
    """What a slice needs with them, by hand: the kernels make no tensor but these."""
    found, count = sizes(form), 4096
    assert costs.slice_bytes(found, count, fused=True) < costs.slice_bytes(found, count)
    wide = count * 13824 * (2 * 2 if form == "bf16" else 2 + 1)
    assert wide <= costs.slice_bytes(found, count, fused=True) <= wide + count * 5120 * 2


def test_constants_are_those_of_the_code() -> None:
    assert costs.LINEAR_SLICE == SLICE_ELEMENTS
    encoder = (video_writer.ENCODER_BASE, video_writer.ENCODER_PIXEL)
    assert encoder == (costs.ENCODER_BASE, costs.ENCODER_PIXEL)


def test_entry_activations_are_those_of_the_embeddings() -> None:
    model, found = transformer("bf16", layers=1), sizes("bf16")
    with torch.device("meta"):
        states, times = torch.empty(1, 512, 4096, dtype=torch.bfloat16), torch.empty(4, 1)
    live = peak_of(lambda: model.conditions(times, states), states)
    formula = costs.entry_activations(found, 4, 1)
    print(f"entry: {formula / live:.3f} of the live bytes")
    assert live <= formula <= 1.5 * live  # megabytes beside the 0.8 GB of the embeddings


@pytest.mark.parametrize("form", MANIFESTS)
def test_text_activations_are_no_less_than_those_of_the_encoder(form: str) -> None:
    model, found = text_encoder(form), sizes(form)
    ids = torch.zeros(1, 512, dtype=torch.long, device="meta")
    with forced_way(WAYS[form]):
        live = peak_of(lambda: model(ids, torch.ones_like(ids, dtype=torch.bool)))
    formula = costs.text_activations(found)
    print(f"text, {form}: {formula / live:.3f} of the live bytes")
    assert live <= formula <= 2 * live + 512 * 512 * 64 * 4  # one fp32 copy of the scores is a kernel's own


def test_longer_videos_and_wider_slices_take_more() -> None:
    found, video = sizes("fp8"), Geometry(480, 832, 81)
    assert costs.activations(found, video, 512) < costs.activations(found, video, 4096)
    assert costs.activations(found, video, 4096) < costs.activations(found, video, None)
    assert costs.activations(found, Geometry(480, 832, 49), 4096) < costs.activations(found, video, 4096)
    assert costs.activations(found, video, 4096, forwards=2) > costs.activations(found, video, 4096)


def test_forward_times_are_those_measured_on_an_h200() -> None:
    """The constants were fitted to these three, so they must come back."""
    from runtime.memory.speeds import speeds_of
    from runtime.profiles import load_profile

    fused, video = speeds_of(load_profile("h200")), Geometry(480, 832, 81)
    plain = replace(fused, fused=False, int8=880e12)  # torch._int_mm, which is slower than our own kernel
    for speeds, form, measured in (
        *((plain, "fp8", 3.63), (plain, "int8", 4.94), (plain, "bf16", 3.34)),
        *((fused, "fp8", 2.44), (fused, "bf16", 2.87)),
    ):
        predicted = costs.forward_seconds(sizes(form), video, speeds)
        print(f"{form}: {predicted:.2f} s predicted, {measured:.2f} s measured")
        assert predicted == pytest.approx(measured, rel=0.03)
    speeds = fused
    assert costs.decode_seconds(sizes("fp8"), video, speeds, 1.0) == pytest.approx(0.85, rel=0.03)
    slow = replace(speeds, bf16=speeds.bf16 / 2, fp8=speeds.fp8 / 2, attention=speeds.attention / 2)
    assert costs.forward_seconds(sizes("fp8"), video, slow) > costs.forward_seconds(
        sizes("fp8"), video, speeds
    )
