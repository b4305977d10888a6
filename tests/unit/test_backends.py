"""Attention backends: what is asked of each package, what a proof catches, and what is chosen."""

import sys
import warnings
from collections.abc import Iterator
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from demo.eight_bits import tensor_core_sums
from runtime.errors import RequestError
from runtime.kernels.attention_quantize import quantize
from runtime.kernels.launch import E4M3
from runtime.kernels.tune import Timing
from runtime.layers import backends, sage
from runtime.layers.attention import attend
from runtime.layers.backends import BACKENDS, Backend, Choice, Proof

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    cached = (backends.available, backends.proofs, backends._fastest)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (37, 37), (65, 512), (200, 3)])
def test_the_twin_is_torchs_attention(
    length: int, keys: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = backends.inputs(length, keys, 3, 32, dtype, CPU)
    expected = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)), scale=0.3)
    for nbytes in (2**28, 4 * keys * 7):  # all at once, and seven queries at a time
        monkeypatch.setattr(backends, "_SCORE_BYTES", nbytes)
        got = backends.math(q, k, v, 0.3)
        difference = float((got.double() - expected.transpose(1, 2)).abs().max())
        print(f"math {length} on {keys} {dtype}: largest difference {difference:.1e}")
        assert got.shape == q.shape and got.dtype == dtype
        assert difference < (1e-5 if dtype == torch.float32 else 2e-2)


def test_the_scores_of_the_twin_fit_their_bound() -> None:
    assert 4 * 75600 * max(backends._SCORE_BYTES // (4 * 75600), 1) <= backends._SCORE_BYTES


def test_on_a_cpu_torchs_own_is_proven_and_chosen() -> None:
    proofs = {proof.name: proof for proof in backends.proofs(CPU, torch.bfloat16, 128)}
    assert {name for name, proof in proofs.items() if proof.ok} == {"sdpa", "sdpa-math"}
    choice = backends.choose(CPU, 100)
    assert choice.name == "sdpa" and backends.rungs(choice, CPU) == ["sdpa", "sdpa-math"]
    assert backends.choose(CPU, 100, forced="auto") is choice
    q, k, v = backends.inputs(9, 5, 2, 16, torch.float32, CPU)
    assert torch.allclose(choice.run(q, k, v, 0.25), backends.math(q, k, v, 0.25), atol=1e-5)


def test_torchs_words_about_kernels_that_cannot_run_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns of each kernel where none can run; a warning of somebody else's is shown as ever."""

    def attention(*_: Tensor, scale: float) -> Tensor:
        # As from C++: the frame that called is the one that is blamed.
        warnings.warn("Memory efficient kernel not used because:", UserWarning, stacklevel=2)
        warnings.warn("Flash attention has been runtime disabled.", UserWarning, stacklevel=2)
        raise RuntimeError("No available kernel. Aborting execution.")

    def other(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        warnings.warn("a package that is no part of torch", UserWarning, stacklevel=1)
        return backends.math(q, k, v, scale)

    monkeypatch.setattr(backends, "F", SimpleNamespace(scaled_dot_product_attention=attention))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        proof = backends.prove("sdpa", CPU)
        assert not proof.ok and "No available kernel" in proof.reason
        assert [str(one.message) for one in seen] == []
        monkeypatch.setattr(backends, "available", lambda *_: other)
        assert backends.prove("sdpa", CPU).ok
        assert {str(one.message) for one in seen} == {"a package that is no part of torch"}
        seen.clear()
        with pytest.raises(RuntimeError, match="No available kernel"):
            backends.sdpa(*backends.inputs(3, 3, 1, 8, torch.float32, CPU), 1.0)
        assert len(seen) == 2, "outside of trials nothing is silenced"


# --- what a proof catches ---


def reads_beyond_the_last_key(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    tail = -k.shape[1] % 64
    wider = tuple(
        torch.as_strided(x, (*x.shape[:1], x.shape[1] + tail, *x.shape[2:]), x.stride()) for x in (k, v)
    )
    return backends.sdpa(q, *wider, scale)


def misses_a_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    raise AssertionError("SM89 kernel is not available")


def drops_a_row(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return backends.sdpa(q, k, v, scale)[:, 1:]


def forgets_a_tail(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    whole = max(k.shape[1] // 64 * 64, 1)
    return backends.sdpa(q, k[:, :whole], v[:, :whole], scale)


BROKEN = {
    "is NaN": lambda q, k, v, scale: torch.full_like(q, float("nan")),
    "is finite garbage": lambda q, k, v, scale: torch.randn_like(q),
    "is zero": lambda q, k, v, scale: torch.zeros_like(q),
    "is shuffled": lambda q, k, v, scale: backends.sdpa(q, k, v, scale).roll(1, dims=2),
    "takes another scale": lambda q, k, v, scale: backends.sdpa(q, k, v, scale * 2),
    "reads beyond the last key": reads_beyond_the_last_key,
    "misses a kernel": misses_a_kernel,
    "drops a row": drops_a_row,
    "forgets a tail": forgets_a_tail,
}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_backend_that_is_wrong_is_not_used(fault: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "bad", Backend("bad", bits, lambda _: BROKEN[fault], lowest=(0, 0)))
    proof = backends.prove("bad", CPU, torch.float32, 64)
    print(proof)
    assert not proof.ok and proof.reason
    with pytest.raises(RequestError, match="does not work here"):
        backends.choose(CPU, 100, forced="bad")


def test_eight_bits_pass_their_own_bound_and_not_that_of_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    def rough(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = backends.sdpa(q, k, v, scale)
        return out + 0.03 * out.std() * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))

    for bits, ok in ((8, True), (16, False)):
        monkeypatch.setitem(BACKENDS, "rough", Backend("rough", bits, lambda _: rough, lowest=(0, 0)))
        backends.available.cache_clear()
        assert backends.prove("rough", CPU, torch.float32, 64).ok is ok
    monkeypatch.setitem(BACKENDS, "rough", Backend("rough", 8, lambda _: rough, lowest=(0, 0)))
    assert "heads" in backends.prove("rough", CPU, torch.float32, 40).reason


def sums_of(promoted: int | None, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention in e4m3 with the second product's sums in 14 bits, joined in fp32 after `promoted` keys."""
    given = quantize(q, k, v)
    out = torch.empty(q.shape)
    for head in range(q.shape[2]):
        q8, k8, v8 = (x[0, :, head] for x in (given.q, given.k, given.v))
        scores = q8.float() @ k8.float().t() * given.descale * scale
        weights = (scores - scores.amax(1, keepdim=True)).exp()
        sums = tensor_core_sums((256 * weights).to(E4M3), v8.t(), promoted=promoted)
        out[0, :, head] = sums / 256 / weights.sum(1, keepdim=True)
    return (out * given.factor + given.center).to(q.dtype)


def test_sums_of_few_bits_are_refused_and_those_of_fp32_beyond_some_keys_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As FP8 tensor cores of Hopper add: over 32,760 keys that pull one way a third is lost."""
    monkeypatch.setattr(backends, "PROOF_LENGTHS", (65,))
    monkeypatch.setattr(backends, "LONG_PROOF", (8, 32760))  # few queries: each sum is as long as ever
    for promoted in (None, 128):
        run = partial(sums_of, promoted)
        monkeypatch.setitem(BACKENDS, "cut", Backend("cut", 8, lambda _, run=run: run, lowest=(0, 0)))
        backends.available.cache_clear()
        proof = backends.prove("cut", CPU, head_dim=64)
        print(f"sums of 14 bits, in fp32 after {promoted} keys: {proof}")
        assert proof.ok is (promoted == 128)
        if promoted is None:
            assert 0.2 < proof.distance < 0.4 and proof.reason.startswith("8 on 32760 keys")


def test_one_sided_inputs_are_what_they_say() -> None:
    """Of each query's keys one half has all the weight, and their values one sign in every channel."""
    length, keys = backends.LONG_PROOF
    assert keys == 32760, "the smallest full video"
    q, k, v = (x.float() for x in backends.one_sided(length, keys, 2, 128, torch.bfloat16, CPU))
    again = backends.one_sided(length, keys, 2, 128, torch.bfloat16, CPU)
    assert torch.equal(again[1].float(), k) and {x.dtype for x in again} == {torch.bfloat16}
    for head in range(2):
        weights = (q[0, :, head] @ k[0, :, head].t() * 128**-0.5).softmax(1)
        side = (k[0, :, head] @ k[0, 0, head]).sign()  # of each key
        ours = (weights * (side > 0)).sum(1)
        assert ((ours > 0.999) | (ours < 0.001)).all() and 0.3 < float((ours > 0.5).float().mean()) < 0.7
        out = weights @ v[0, :, head]
        pulled = weights @ v[0, :, head].abs()
        share = float(out.norm() / pulled.norm())
        print(f"head {head}: {share:.3f} of what the values could pull")
        assert share > 0.95


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RequestError, match="unknown, expected auto or one of sage2"):
        backends.choose(CPU, 100, forced="sage9")
    with pytest.raises(RequestError, match="not installed"):
        backends.choose(CPU, 100, forced="flash3")
    with pytest.raises(RequestError, match="not available"):
        backends.named("flash3", CPU)
    assert backends.named("sdpa", CPU) is backends.sdpa
    for name in ("auto", *BACKENDS):
        backends.check_name(name)
    with pytest.raises(RequestError, match="unknown, expected auto or one of sage2"):
        backends.check_name("sage9")


# --- what is asked of each package ---


def fake_sage(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[tuple[str, dict[str, object]]]:
    calls: list[tuple[str, dict[str, object]]] = []
    module = ModuleType("sageattention")

    def function(name: str) -> object:
        def run(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
            calls.append((name, options))
            return q

        return run

    for name in names:
        setattr(module, name, function(name))
    monkeypatch.setitem(sys.modules, "sageattention", module)
    return calls


SAGE2 = tuple(
    f"sageattn_qk_int8_pv_{kind}" for kind in ("fp16_triton", "fp16_cuda", "fp8_cuda", "fp8_cuda_sm90")
)
BY_WARP = {"qk_quant_gran": "per_warp"}
FAST, PRECISE, SUMS = ({"pv_accum_dtype": sums} | BY_WARP for sums in ("fp32+fp16", "fp32+fp32", "fp32"))


@pytest.mark.parametrize(
    ("name", "arch", "cuda", "kind", "options"),
    [
        ("sage2", (8, 0), "12.8", "fp16_cuda", SUMS),
        ("sage2", (8, 6), "12.8", "fp16_triton", {}),
        ("sage2", (8, 9), "12.8", "fp8_cuda", FAST),
        ("sage2", (8, 9), "13.0", "fp8_cuda", FAST),
        ("sage2", (8, 9), "12.4", "fp8_cuda", PRECISE),
        ("sage2-fp32", (8, 9), "12.8", "fp8_cuda", PRECISE),
        ("sage2-fp32", (8, 9), "12.4", None, {}),
        ("sage2", (9, 0), "12.8", None, {}),
        ("sage2-sm90", (9, 0), "12.4", "fp8_cuda_sm90", PRECISE),
        ("sage2-sm90", (12, 0), "12.8", None, {}),
        ("sage2-fp32", (9, 0), "12.8", None, {}),
        ("sage2", (12, 0), "12.8", "fp8_cuda", FAST),
        ("sage2-fp32", (12, 0), "12.8", "fp8_cuda", PRECISE),
        ("sage2", (10, 0), "12.8", None, {}),
        ("sage2", (7, 5), "12.8", None, {}),
        ("sage2-fp16", (8, 9), "12.8", "fp16_cuda", SUMS),
        ("sage2-fp16", (8, 6), "12.8", "fp16_cuda", SUMS),
        ("sage2-fp16", (8, 0), "12.8", None, {}),
        ("sage2-fp16", (9, 0), "12.8", "fp16_cuda", SUMS),
        ("sage2-fp16", (12, 0), "12.8", "fp16_cuda", SUMS),
        ("sage1", (8, 9), "12.8", None, {}),
    ],
)
def test_sageattention_2_by_card_and_cuda(
    name: str,
    arch: tuple[int, int],
    cuda: str,
    kind: str | None,
    options: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = fake_sage(monkeypatch, *SAGE2, "sageattn")
    half = sage.half_sums_compiled(cuda)
    monkeypatch.setattr(sage, "half_sums_compiled", lambda: half)
    monkeypatch.setattr(backends, "capability_of", lambda _: arch)
    run = backends.available(name, CPU)
    if kind is None:
        assert run is None
        return
    assert run is not None
    q = torch.randn(1, 64, 3, 64)
    run(q, q, q, 0.125)
    common = {"tensor_layout": "NHD", "is_causal": False, "sm_scale": 0.125}
    assert calls == [(f"sageattn_qk_int8_pv_{kind}", common | options)]
    for few in ((q[:, :63], q, q), (q, q[:, :1], q[:, :1])):
        assert torch.equal(run(*few, 0.125), attend(*few, 0.125)) and len(calls) == 1


def sageattn_1(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
) -> Tensor:
    """Release 1.0.6 but for its eight bits: it changes k, and full tiles of 64 keys are all that it knows."""
    assert tensor_layout == "NHD" and not is_causal and sm_scale is not None
    if smooth_k:
        k -= k.mean(1, keepdim=True)
    k, v = (F.pad(x, (0, 0, 0, 0, 0, -k.shape[1] % 64)) for x in (k, v))
    return backends.math(q, k, v, sm_scale)


def test_sageattention_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right at every length, though the release's own function is not, and nobody's keys change."""
    fake_sage(monkeypatch)
    monkeypatch.setattr(sys.modules["sageattention"], "sageattn", sageattn_1, raising=False)
    monkeypatch.setattr(backends, "capability_of", lambda _: (8, 6))
    run = backends.available("sage1", CPU)
    assert run is not None and backends.available("sage2", CPU) is None
    for keys, bound in ((9, 1e-5), (64, 1e-5), (100, 1e-5), (16384 + 1, 4e-3)):
        q, k, v = (x.nan_to_num() for x in backends.inputs(5, keys, 2, 16, torch.float32, CPU))
        kept, exact = k.clone(), backends.math(q, k, v, 0.25)
        off = backends._distance(run(q, k, v, 0.25), exact)
        alone = backends._distance(sageattn_1(q, kept.clone(), v, "NHD", sm_scale=0.25), exact)
        print(f"{keys} keys: {off:.1e} from the formula, {alone:.1e} without its mending")
        assert off < bound and torch.equal(k, kept)
        assert alone > 0.05 or keys % 64 == 0 or keys > 16384
    assert backends.prove("sage1", CPU).ok


def test_sageattention_1_runs_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full tiles or many keys: its own function, without its own smoothing."""
    calls = fake_sage(monkeypatch, "sageattn")
    monkeypatch.setattr(backends, "capability_of", lambda _: (8, 6))
    run = backends.available("sage1", CPU)
    assert run is not None
    options = {"tensor_layout": "NHD", "is_causal": False, "sm_scale": 0.5, "smooth_k": False}
    for keys, asked in ((64, True), (65, False), (16383, False), (16384, True), (32760, True)):
        q, k = torch.randn(1, 2, 1, 64), torch.randn(1, keys, 1, 64)
        calls.clear()
        run(q, k, k, 0.5)
        assert calls == ([("sageattn", options)] if asked else []), keys


def test_flash_attention_with_and_without_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "capability_of", lambda _: (9, 0))
    q = torch.ones(1, 2, 3, 64)
    for package, name, result in (("flash_attn_interface", "flash3", (q, q)), ("flash_attn", "flash2", q)):
        module = SimpleNamespace(flash_attn_func=lambda *_, softmax_scale, result=result: result)
        monkeypatch.setitem(sys.modules, package, module)
        run = backends.available(name, CPU)
        assert run is not None and run(q, q, q, 0.1) is q


def test_the_trap_of_old_compilers() -> None:
    assert [sage.half_sums_compiled(v) for v in ("12.4", "12.8", "13.0", None)] == [
        False,
        True,
        True,
        False,
    ]


# --- which is taken ---


def pretend(monkeypatch: pytest.MonkeyPatch, times: dict[str, float], wrong: tuple[str, ...] = ()) -> None:
    """A GPU on which these backends exist and take this long."""
    monkeypatch.setattr(backends, "capability_of", lambda _: (8, 9))
    monkeypatch.setattr(backends, "processors_of", lambda _: 132)
    monkeypatch.setattr(backends, "available", lambda name, _: backends.math if name in times else None)
    found = tuple(Proof(name, name in times and name not in wrong) for name in BACKENDS)
    monkeypatch.setattr(backends, "proofs", lambda *_: found)
    monkeypatch.setattr(backends, "inputs", lambda *_: (None, None, None))

    def timed(runs: dict[str, object], repeats: int, clock: object) -> list[Timing]:
        return sorted(
            (Timing(name, times[name]) for name in runs), key=lambda timing: timing.milliseconds or 0
        )

    monkeypatch.setattr(backends, "time_candidates", timed)


TIMES = {
    "sage2": 3.0,
    "sage2-fp32": 4.0,
    "sage2-fp16": 5.0,
    "sdpa-flash": 9.0,
    "sdpa-cudnn": 8.0,
    "sdpa": 9.5,
}
TIMES["sdpa-math"] = 900.0
GPU = torch.device("cuda", 3)


def test_the_fastest_proven_backend_is_taken_and_falls_back_to_safer_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, TIMES)
    choice = backends.choose(GPU, 32760)
    assert choice.name == "sage2"
    assert backends.rungs(choice, GPU) == ["sage2", "sage2-fp32", "sage2-fp16", "sdpa-cudnn", "sdpa-math"]
    assert backends.choose(GPU, 32760) is choice


def test_long_videos_are_timed_by_a_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, TIMES)
    sizes: list[tuple[int, int]] = []
    monkeypatch.setattr(backends, "inputs", lambda *given: sizes.append(given[:3]) or (None, None, None))
    choices = [backends.choose(GPU, tokens, keys) for tokens, keys in ((32760, None), (75600, 75600))]
    assert choices[0] is choices[1] and sizes == [(30720, 30720, 21)]
    short = [backends.choose(GPU, 3000), backends.choose(GPU, 75600, 512)]
    assert sizes[1:] == [(3000, 3000, 40), (30720, 512, 21)]
    assert [choice.name for choice in short] == ["sage2", "sdpa-cudnn"]
    rows = backends.TIMED_TOKENS * backends.timed_heads(backends.TIMED_TOKENS, 40, GPU)
    assert (
        4 * rows * 128 * 2 < 2 * 320 * 2**20
    )  # q, k, v and the output: two tensors of the smallest full video
    monkeypatch.setattr(backends, "processors_of", lambda _: 24)  # of a small card, where heads take longer
    assert backends.timed_heads(backends.TIMED_TOKENS, 40, GPU) == 3


def test_eight_bits_of_cudnn_where_they_are_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {**TIMES, "cudnn-fp8": 2.5}, wrong=("sage2-fp32",))
    choice = backends.choose(GPU, 32760)
    assert choice.name == "cudnn-fp8"
    assert backends.rungs(choice, GPU) == ["cudnn-fp8", "sage2-fp16", "sdpa-cudnn", "sdpa-math"]
    assert backends.choose(GPU, 32760, 512).name == "sdpa-cudnn"


def test_a_wrong_backend_is_neither_taken_nor_a_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, TIMES, wrong=("sage2", "sdpa-cudnn"))
    choice = backends.choose(GPU, 32760)
    assert choice.name == "sage2-fp32"
    assert backends.rungs(choice, GPU) == ["sage2-fp32", "sage2-fp16", "sdpa-flash", "sdpa-math"]


def test_cross_attention_takes_sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, TIMES)
    choice = backends.choose(GPU, 32760, keys=512)
    assert choice.name == "sdpa-cudnn"
    assert backends.rungs(choice, GPU) == ["sdpa-cudnn", "sdpa-flash", "sdpa-math"]
    assert {timing.name for timing in choice.timings} == {"sdpa-cudnn", "sdpa-flash", "sdpa"}, (
        "8 bits are not timed"
    )
    assert backends.choose(GPU, 1024, keys=1024).name == "sage2", "no cross attention: as many queries"
    assert backends.choose(GPU, 32760, keys=1025).name == "sage2", "no few keys"
    pretend(monkeypatch, {name: ms for name, ms in TIMES.items() if BACKENDS[name].bits != 16})
    assert backends.choose(GPU, 32761, keys=511).name == "sdpa-math"


def test_the_rungs_of_a_forced_backend_end_in_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, TIMES)
    forced = Choice("sage2", backends.math, (Proof("sage2", True),))
    assert backends.rungs(forced, GPU) == ["sage2", "sdpa", "sdpa-math"]
    last = Choice("sdpa-math", backends.math, (Proof("sdpa-math", True),))
    assert backends.rungs(last, GPU) == ["sdpa-math"]
