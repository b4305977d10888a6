"""Rows that several 8-bit linears read are quantized once; the numbers are those of each doing it alone."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.kernels.prepared import Prepared
from runtime.kernels.row_quantize import row_quantize
from runtime.layers import activation, norm
from runtime.linear import forced_way, swap_linears
from runtime.linear import module as linear
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
        one: Any = model.get_submodule(name)
        assert isinstance(weight, Tensor)
        one.weight, one.weight_scale = quantize_weight(weight, FORMATS["fp8"])
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


@pytest.fixture
def by_kernels(as_on_a_gpu: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt goes the way of the kernels, whose twins stand for them: in place, quantized on the way."""
    for module in (norm, activation):
        monkeypatch.setattr(module, "by_kernel", lambda x: x.shape[0] == 1 and not torch.is_grad_enabled())


def states(model: TextEncoder, prompts: int = 2, length: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, SMALL.vocab_size, (prompts, length), generator=generator)
    with torch.inference_mode(), forced_way("fused"):
        return model(ids)


def test_the_text_encoder_quantizes_once_for_all_that_read(
    as_on_a_gpu: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = encoder()
    once = states(model)
    assert as_on_a_gpu == [(2, 9, SMALL.dim)] * 2 * SMALL.num_layers
    monkeypatch.setattr(norm, "shared", lambda x, *_: x)
    assert torch.equal(states(model), once) and float(once.float().std()) > 0.1


@pytest.mark.parametrize("length", [1, 9, 16, 37])
def test_the_way_of_the_kernels_gives_the_same_states(
    length: int, by_kernels: None, as_on_a_gpu: list[torch.Size]
) -> None:
    model = encoder()
    fast, again = (states(model, 1, length) for _ in range(2))  # what is written in place is no weight
    assert not as_on_a_gpu  # rows were quantized by what made them
    with pytest.MonkeyPatch.context() as patch:
        for module in (norm, activation):
            patch.setattr(module, "by_kernel", lambda _: False)
        plain = states(model, 1, length)
    assert torch.equal(fast, plain) and torch.equal(fast, again) and float(fast.float().std()) > 0.1


LAUNCHES = 13
"""Of one layer: two norms with what is added and quantized, seven products, the biases, the attention, the
rows of its result and of the activation to eight bits."""


class Counted(TorchDispatchMode):
    """Counts the operations that are more than a view, and what stands for a kernel."""

    NO_LAUNCH = ("view", "t", "unsqueeze", "transpose", "permute", "slice", "detach", "empty", "alias")

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.lstrip("_") not in self.NO_LAUNCH:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    def one(self, name: str, *shapes: tuple[torch.Size, torch.dtype]) -> Any:
        """Counts a launch; new tensors of these shapes."""
        self.names[name] += 1
        made = tuple(torch.empty(shape, dtype=dtype) for shape, dtype in shapes)
        return made if len(made) > 1 else made[0]


def test_a_layer_is_few_launches(by_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def quantized(name: str) -> Callable[..., Any]:
        def run(x: Tensor, *given: Any, **_: Any) -> Any:
            (dtype,) = (one for one in given if isinstance(one, torch.dtype))
            scales = torch.Size((*x.shape[:-1], 1))
            return counted.one(name, (x.shape, dtype), (scales, torch.float32))

        return run

    def product(self: Fp8Linear, q: Tensor, _: Tensor, dtype: torch.dtype, *__: Any, **___: Any) -> Tensor:
        result: Tensor = counted.one("product", (torch.Size((q.shape[0], self.out_features)), dtype))
        return result

    monkeypatch.setattr(norm, "norm_quantize", quantized("norm_quantize"))
    monkeypatch.setattr(norm, "norm", lambda x, *_: counted.one("norm", (x.shape, x.dtype)))
    monkeypatch.setattr(activation, "gelu_quantize", quantized("gelu_quantize"))
    monkeypatch.setattr(linear, "row_quantize", quantized("row_quantize"))
    monkeypatch.setattr(linear, "fused", lambda *_: True)
    monkeypatch.setattr(Fp8Linear, "product", product)
    model, found = encoder(), []
    layers = [*model.blocks]
    for count in (1, 2):
        model.blocks = nn.ModuleList(layers[:count])
        with torch.no_grad(), forced_way("fused"), Counted() as counted:
            model(torch.ones(1, 16, dtype=torch.long))
        found.append(counted.names)
    layer = found[1] - found[0]
    print(dict(layer))
    assert layer.total() == LAUNCHES and layer["product"] == 7


def test_readers_that_do_not_agree_get_the_rows_themselves(as_on_a_gpu: list[torch.Size]) -> None:
    model: Any = encoder().blocks[0]
    x = torch.randn(1, 5, SMALL.dim, dtype=torch.bfloat16)
    plain = nn.Linear(64, 64)
    weight = norm.Rms(torch.randn(SMALL.dim))
    assert norm.shared(x, model.attn.q, plain) is x and not as_on_a_gpu
    assert norm.shared(x, plain, plain) is x and norm.shared(x) is x
    assert not isinstance(norm.shared(x, model.attn.q, model.attn.k), Tensor)
    for by_kernel in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(norm, "by_kernel", lambda _, answer=by_kernel: answer)
            alone = norm.norm_of(x, weight, 1e-6)
            assert isinstance(alone, Tensor)
            mixed = norm.norm_of(x, weight, 1e-6, model.attn.q, plain)
            assert isinstance(mixed, Tensor) and torch.equal(mixed, alone)
            agreed = norm.norm_of(x, weight, 1e-6, model.attn.q, model.attn.k)
            expected = row_quantize(alone, torch.float8_e4m3fn)
            assert isinstance(agreed, Prepared) and agreed.dtype == x.dtype
            assert torch.equal(agreed.values.float(), expected[0].float())
            assert torch.equal(agreed.scales, expected[1])
