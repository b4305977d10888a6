"""Rows that several 8-bit linears read are quantized once; the numbers are those of each doing it alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime import text_encoder
from runtime.layers import norm
from runtime.linear import forced_way, swap_linears
from runtime.linear.fp8 import Fp8Linear
from runtime.linear.quantize import FORMATS, quantize_weight
from runtime.text_encoder import TextEncoder, TextEncoderConfig

SMALL = TextEncoderConfig(50, 64, 64, 96, num_heads=2, num_layers=3)


def encoder() -> TextEncoder:
    torch.manual_seed(2)
    model = TextEncoder(SMALL).bfloat16().eval().requires_grad_(False)
    names = [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    weights = {name: model.get_submodule(name).weight for name in names}
    swap_linears(model, dict.fromkeys(names, "fp8"))
    for name, weight in weights.items():
        linear: Any = model.get_submodule(name)
        assert isinstance(weight, Tensor)
        linear.weight, linear.weight_scale = quantize_weight(weight, FORMATS["fp8"])
    return model


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Linears take quantized rows; the shapes that were quantized for more than one of them."""
    quantized: list[torch.Size] = []
    quantize: Callable[..., tuple[Tensor, Tensor]] = norm.row_quantize

    def counted(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        quantized.append(x.shape)
        return quantize(x, dtype)

    monkeypatch.setattr(norm, "row_quantize", counted)
    monkeypatch.setattr(Fp8Linear, "takes", lambda self, _: self.form.dtype)
    return quantized


def states(model: TextEncoder) -> Tensor:
    ids = torch.randint(0, SMALL.vocab_size, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode(), forced_way("fused"):
        return model(ids, torch.ones_like(ids, dtype=torch.bool))


def test_the_text_encoder_quantizes_once_for_all_that_read(
    as_on_a_gpu: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = encoder()
    once = states(model)
    assert as_on_a_gpu == [(2, 9, SMALL.dim)] * 2 * SMALL.num_layers
    monkeypatch.setattr(text_encoder, "shared", lambda x, *_: x)
    assert torch.equal(states(model), once) and float(once.float().std()) > 0.1


def test_readers_that_do_not_agree_get_the_rows_themselves(as_on_a_gpu: list[torch.Size]) -> None:
    model: Any = encoder().blocks[0]
    x = torch.randn(1, 5, SMALL.dim, dtype=torch.bfloat16)
    assert norm.shared(x, model.attn.q, nn.Linear(64, 64)) is x and not as_on_a_gpu
    assert norm.shared(x, nn.Linear(64, 64), nn.Linear(64, 64)) is x
    assert not isinstance(norm.shared(x, model.attn.q, model.attn.k), Tensor)
