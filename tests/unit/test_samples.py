"""What the samples of a forward look at, when, and what that costs: launches and memory."""

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runtime import samples
from runtime.layers.attention import attend
from runtime.samples import SAMPLED_BLOCKS, AttentionSample, expected_rows
from runtime.transformer import Condition, Transformer, TransformerConfig
from runtime.ways import FUSED, Ways
from tests.live_memory import peak_of

LAUNCHES = 11
"""Of one attention sample: two gathers, three conversions to fp32, a scale, a product, its softmax, that in
pieces, a product, a sum."""
LAUNCHES_OF_A_BLOCK = 85
"""Of one sample of a block: nine gathers and twelve operations to compare, and the block itself, in torch."""
LAUNCHES_OF_A_STEP = 60
"""Rows that are drawn, and distances of all that was found."""


class Launches(TorchDispatchMode):
    """Counts the operations that a GPU would start a kernel for: all but views and memory that is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if not func.is_view and "empty" not in name and "_unsafe_view" not in name:
            self.names[name] += 1
        return result


def launches_of(run: Any) -> int:
    """Under `no_grad`: in inference mode, composed operations would come as one."""
    with torch.no_grad(), Launches() as seen:
        run()
    return seen.names.total()


def qkv(length: int, heads: int, width: int = 128, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, length, heads, width, generator=generator).bfloat16() for _ in range(3)]


# ------------------------------------------------------------------------------------------------ the formula


@pytest.mark.parametrize("length", [1, 64, 251, 780, 1000])
@pytest.mark.parametrize("at_once", [1, 10**9])
def test_expected_rows_are_those_of_the_formula(
    length: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of keys, and with as many heads at a time as fit."""
    monkeypatch.setattr(samples, "_FP32_BYTES", at_once)
    q, k, v = (x[0, :, 1:4:2] for x in qkv(length, 5, 64, seed=length))
    rows = q[:8]
    weights = torch.einsum("rhd,shd->hrs", rows.double(), k.double()).mul(64**-0.5).softmax(-1)
    right = torch.einsum("hrs,shd->hrd", weights, v.double())
    worst = float((expected_rows(rows, k, v) - right).norm(dim=-1).div(right.norm(dim=-1)).max())
    print(f"{length} keys: {worst:.1e}")
    assert worst < 2e-6


# ----------------------------------------------------------------------------------------------- which blocks


class Spoilt:
    """torch's attention, wrong in one block of `blocks`."""

    def __init__(self, blocks: int, block: int) -> None:
        self.blocks, self.block, self.calls = blocks, block, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        block, self.calls = self.calls % self.blocks, self.calls + 1
        return attend(q, k, v).roll(1, 1) if block == self.block else attend(q, k, v)


@pytest.mark.parametrize("forwards", [1, 2])  # with guidance there are two in a step
@pytest.mark.parametrize("blocks", [1, 2, 7, 8])
def test_any_two_steps_look_at_all_blocks_and_each_at_the_first_and_the_last(
    blocks: int, forwards: int
) -> None:
    q, k, v = qkv(40, 2, 16)
    for block in range(blocks):
        attention = Spoilt(blocks, block)
        sample, found = AttentionSample(attention, 16, blocks), []
        for step in range(4):
            sample.begin(step)
            for _ in range(blocks * forwards):
                sample(q, k, v)
            numbers = sample.numbers()
            assert len(numbers) <= forwards * (blocks // 2 + 2)
            found.append(int((numbers[:, 0] > sample.bound).sum()))
        assert set(found) <= {0, forwards}
        assert all(one + other for one, other in pairwise(found))
        assert all(found) or block not in (0, blocks - 1)


def test_a_step_that_is_made_again_looks_at_the_same_and_counts_from_its_begin() -> None:
    q, k, v = qkv(300, 4, 16)
    sample = AttentionSample(attend, 16, 6)
    found = []
    for calls in (6, 4, 6):  # memory ran out in the second forward
        sample.begin(1)
        for _ in range(calls):
            sample(q, k, v)
        found.append(sample.numbers())
    assert torch.equal(found[0], found[2]) and len(found[0]) == 4  # blocks 0, 1, 3, 5


# ------------------------------------------------------------------------------------------------- their cost


@pytest.mark.parametrize(("length", "most"), [(32760, LAUNCHES), (75600, LAUNCHES + 6)])
def test_an_attention_sample_is_few_launches(length: int, most: int) -> None:
    q, k, v = qkv(length, 2)
    sample = AttentionSample(lambda q, k, v: q, 16, 3)
    sample(q, k, v)  # draws the rows of the step
    of_other = launches_of(lambda: sample(q[:, :1], k, v))
    sample.begin(0)
    of_first = launches_of(lambda: sample(q, k, v))
    sample.begin(0)
    sample(q, k, v)
    sample._calls = 2
    found = launches_of(lambda: sample(q, k, v))
    print(f"{length} tokens: {found} launches, {of_first} with the rows of the step")
    assert of_other == 0 and found <= most and of_first <= found + 5
    assert launches_of(sample.numbers) <= 20


@torch.no_grad()
def test_the_samples_of_a_forward_are_few_launches() -> None:
    """40 blocks as the 14B model has, in slices of tokens: what is launched beyond the forward itself."""
    torch.manual_seed(3)
    model = Transformer(TransformerConfig(64, 128, 2, 40, text_dim=16, text_len=8))
    model.token_slice, model.keep_text = 40, True
    latents = torch.randn(1, 16, 5, 8, 12)  # 120 tokens
    (condition,) = model.conditions(torch.tensor([[900.0]]), torch.randn(1, 8, 16))

    def forward() -> None:
        model.velocity(latents, condition)

    def step(ways: Ways) -> None:
        ways.begin(0)
        forward()
        ways.sampled.numbers()
        if ways.kernel_samples is not None:
            ways.kernel_samples.numbers()

    forward()  # keeps the text
    bare, found = launches_of(forward), []
    ways = Ways("cpu")
    for ways.kernels in ("plain", FUSED):
        ways.use_in(model)
        step(ways)
        found.append(launches_of(lambda: step(ways)))
    assert ways.kernel_samples is not None
    ways.kernel_samples.close()
    of_attention, of_kernels = found[0] - bare, found[1] - found[0]
    print(f"of a forward: {of_attention} launches for the attention, {of_kernels} for the kernels")
    assert 20 * 9 < of_attention <= 21 * LAUNCHES + LAUNCHES_OF_A_STEP / 2
    assert SAMPLED_BLOCKS * 30 < of_kernels <= SAMPLED_BLOCKS * LAUNCHES_OF_A_BLOCK + LAUNCHES_OF_A_STEP


def test_both_forwards_of_a_guided_step_are_sampled() -> None:
    """Two forwards of a step, and a head in slices: one number for each that was looked at."""
    torch.manual_seed(5)
    model = Transformer(TransformerConfig(64, 128, 2, 10, text_dim=16, text_len=8))
    model.token_slice = 40
    ways = Ways("cpu", fused=True)
    ways.use_in(model)
    latents, made = torch.randn(1, 16, 5, 8, 10), list[Condition]()  # 100 tokens: the last slice is 20
    for text in torch.randn(2, 1, 8, 16):
        made += model.conditions(torch.tensor([[900.0]]), text)
    with torch.inference_mode():
        ways.begin(1)
        for condition in made:
            model.velocity(latents, condition)
        assert ways.kernel_samples is not None
        attention, kernels = ways.sampled.numbers(), ways.kernel_samples.numbers()
    ways.kernel_samples.close()
    print(f"attention {float(attention[:, 0].max()):.1e}, kernels {float(kernels[:, 0].max()):.1e}")
    assert len(attention) == 2 * 6 and len(kernels) == 2 * (5 * 4 + 3)
    assert not attention[:, 1].any() and not kernels[:, 1].any()
    assert float(attention[:, 0].max()) < 1e-4 and float(kernels[:, 0].max()) < 1e-4


@pytest.mark.parametrize("length", [32760, 75600])
def test_a_sample_takes_less_memory_than_the_attention_that_comes(length: int) -> None:
    """Of 40 heads of 128, where one tensor of the attention takes 335 MB, or 774."""
    with torch.device("meta"):
        k, v = (torch.empty(1, length, 40, 128, dtype=torch.bfloat16) for _ in range(2))
        rows = torch.empty(8, 2, 128, dtype=torch.bfloat16)
    peak = peak_of(lambda: expected_rows(rows, k[0, :, 3:40:36], v[0, :, 3:40:36]))
    print(f"{length} tokens: {peak / 1e6:.1f} MB of {k.nbytes / 1e6:.0f}")
    assert peak < 45e6 < k.nbytes / 5
