"""Eight-bit attention through cuDNN with no card: the passes around it, and what is asked of its graphs."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from demo.eight_bits import cudnn_product
from runtime.kernels import attention_quantize as passes
from runtime.kernels import channel_spread, launch
from runtime.kernels.launch import E4M3
from runtime.layers import backends, cudnn_fp8
from tests.live_memory import peak_of
from tests.unit.interpreter import in_interpreter

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SCALE = 128**-0.5


def random(length: int, heads: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed + length)
    return tuple(torch.randn(1, length, heads, 128, generator=g).bfloat16() for _ in range(3))  # type: ignore[return-value]


def lifelike(length: int, heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Outlier channels in q and k, a large common mean in k, a mean in v."""
    g = torch.Generator().manual_seed(length)
    q, k, v = (x.float() for x in random(length, heads))
    k += 4 * torch.randn(heads, 128, generator=g)
    v += torch.randn(heads, 128, generator=g)
    q[..., [5, 77]] *= 6
    k[..., [5, 77]] *= 6
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def throughout(*given: Any) -> Tensor:
    return cudnn_product(*given[:5], E4M3)


def one_scale_each(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The plain way, each tensor by its largest entry; its result stays in fp32, unlike that of `demo`."""
    scales = [x.float().abs().amax() / 448 for x in (q, k, v)]
    q8, k8, v8 = ((x.float() / s).to(E4M3) for x, s in zip((q, k, v), scales, strict=True))
    return cudnn_product(q8, k8, v8, scales[0] * scales[1], scale, torch.float32) * scales[2]


def distance(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected).norm() / expected.norm())


# --- the passes ---


@pytest.mark.slow
@pytest.mark.skipif(not launch.HAS_TRITON, reason="Triton is not installed")
def test_in_the_interpreter_every_pass_is_its_twin() -> None:
    in_interpreter("attention_quantize_in_interpreter.py")


SPREAD = {"x": "*bf16", "parts": "*fp32", "rows": "i32", "stride": "i32", "width": "i32"}
EIGHT = {"x": "*bf16", "out": "*fp8e4nv", "center": "*fp32", "factor": "*fp32"}
EIGHT |= {"rows": "i32", "padded": "i32", "stride": "i32"}
BACK = {"out": "*fp8e4nv", "result": "*bf16", "factor": "*fp32", "center": "*fp32", "count": "i32"}
ROWS, EACH = (torch.empty(1, 300, 40, 128, dtype=dtype, device="meta") for dtype in (torch.bfloat16, E4M3))
ONES = torch.empty(40, 128, device="meta")
NARROW, ONES_NARROW = ROWS[..., :64].contiguous(), ONES[:, :64]
# module, kernel, types of its arguments, what launches it
KERNELS: dict[str, tuple[ModuleType, str, dict[str, str], Callable[[], object]]] = {
    "spread": (channel_spread, "_spread_kernel", SPREAD, lambda: channel_spread.spread_triton(ROWS)),
    "to_eight_bits rotated 128": (
        passes,
        "_to_eight_bits_kernel",
        EIGHT,
        lambda: passes.to_eight_bits_triton(ROWS, ONES, ONES, True),
    ),
    "to_eight_bits rotated 64": (
        passes,
        "_to_eight_bits_kernel",
        EIGHT,
        lambda: passes.to_eight_bits_triton(NARROW, ONES_NARROW, ONES_NARROW, True),
    ),
    "to_eight_bits plain 128": (
        passes,
        "_to_eight_bits_kernel",
        EIGHT,
        lambda: passes.to_eight_bits_triton(ROWS, ONES, ONES, False),
    ),
    "to_columns": (
        passes,
        "_to_columns_kernel",
        EIGHT,
        lambda: passes.to_columns_triton(ROWS, ONES, ONES),
    ),
    "restore": (
        passes,
        "_restore_kernel",
        BACK,
        lambda: passes.restore_triton(EACH, ONES, ONES, torch.bfloat16),
    ),
}


class Launch:
    """Stands for a kernel: keeps what it is specialised for, and the compiler's options."""

    def __init__(self) -> None:
        self.constants: dict[str, Any] = {}
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launched(*_: object, **named: Any) -> None:
            for name, value in named.items():
                (self.constants if name.isupper() else self.options)[name] = value

        return launched


@pytest.mark.slow
@pytest.mark.skipif(not launch.HAS_TRITON or launch.INTERPRETED, reason="nothing to compile with")
@pytest.mark.parametrize("arch", [89, 90, 120])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit.test_kernels_compile import ARCHS, SHARED, build

    if arch not in ARCHS:
        pytest.skip("this Triton does not know it")
    module, kernel, types, launches = KERNELS[name]
    as_launched = Launch()
    with monkeypatch.context() as patch:
        patch.setattr(module, kernel, as_launched)
        launches()
    given = as_launched.constants, arch
    ptx, shared = build(getattr(module, kernel), types, *given, **as_launched.options)
    products = ptx.count("wgmma.mma_async") + ptx.count("mma.sync")
    print(f"{name} sm_{arch}: {shared} bytes of shared memory, {products} products")
    whole = r"ld\.global[\w.:]*v4\.b32|cp\.async\.cg\.shared\.global [^;]*, 0x10[,;]"
    assert re.search(whole, ptx), "no load of 16 bytes: the rows are read in small pieces"
    assert shared <= SHARED[arch] * 1024, f"{shared} bytes of shared memory, of {SHARED[arch]} KiB"
    assert (products > 0) == ("rotated" in name)


def test_the_rotation_is_orthogonal_and_a_channel_is_spread_over_its_head() -> None:
    for size in (16, 64, 128):
        matrix = passes.hadamard(size, CPU)
        assert torch.equal(matrix @ matrix, size * torch.eye(size))
        signs = torch.tensor([[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)])
        assert torch.equal(matrix, signs.float())
    one = torch.zeros(1, 1, 1, 128)
    one[..., 7] = 50
    assert torch.equal(passes.rotated(one).abs(), torch.full_like(one, 50))


@pytest.mark.parametrize("spread_of_heads", [1.0, 1e3])
def test_scores_survive_and_no_number_leaves_the_range(spread_of_heads: float) -> None:
    q, k, v = (x.float() for x in lifelike(300))
    q *= torch.tensor([1.0, spread_of_heads, 1.0])[:, None]
    k *= torch.tensor([1.0, 1.0, spread_of_heads**0.5])[:, None]
    q, k, v = (x.bfloat16() for x in (q, k, v))
    given = passes.quantize(q, k, v)
    for head in range(3):
        q_, k_ = q[0, :, head].double(), k[0, :, head].double()
        exact = q_ @ (k_ - k_.mean(0)).t()
        got = given.q[0, :, head].double() @ given.k[0, :, head].double().t() * given.descale.double()
        off = float((got - exact).norm() / exact.norm())
        print(f"head {head}, ranges {spread_of_heads:g} apart: scores off by {off:.4f}")
        assert off < 0.045  # two roundings of .026
    back = given.v.double() * given.factor + given.center
    assert float((back - v.double()).norm() / v.double().norm()) < 0.03
    for x8 in (given.q, given.k, given.v):
        assert float(x8.float().abs().max()) <= 448
    assert float(given.v.float().abs().amax((0, 1)).min()) >= 440  # each channel uses the range


def test_scales_of_heads_have_one_product() -> None:
    g = torch.Generator().manual_seed(0)
    of_q, of_k = (10 ** (4 * torch.rand(5, 64, generator=g) - 2) for _ in range(2))
    of_k[2] = 0  # a head whose keys are all the same
    a, b, c = passes.shared_scales(of_q, of_k)
    assert torch.allclose(a * b, c.expand(5), rtol=1e-5)
    reach = torch.maximum(of_q.norm(dim=1) / a, of_k.norm(dim=1) / b)
    assert float(reach.max()) == pytest.approx(448, rel=1e-5) and a.isfinite().all() and (b > 0).all()


@pytest.mark.parametrize("length", [64, 65, 513, 1000])
def test_the_passes_take_away_what_ruins_the_plain_way(length: int) -> None:
    for name, (q, k, v) in {"random": random(length), "lifelike": lifelike(length)}.items():
        exact = backends.math(q.float(), k.float(), v.float(), SCALE)
        eight = distance(cudnn_fp8.through(throughout, q, k, v, SCALE), exact)
        half = distance(cudnn_fp8.through(cudnn_product, q, k, v, SCALE), exact)
        plain = distance(one_scale_each(q, k, v, SCALE), exact)
        print(f"{name} {length}: e4m3 out {eight:.4f}, bf16 out {half:.4f}; one scale each {plain:.4f}")
        assert half < eight < backends.BOUNDS[8]
        if name == "lifelike":
            assert eight < 0.03 and plain > 2 * eight


def test_the_result_may_take_the_memory_of_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_fp8, "product", throughout)
    q, k, v = random(70)
    expected, before = cudnn_fp8.run(q, k, v, SCALE), (k.clone(), v.clone())
    over = cudnn_fp8.run_over(q, k, v, SCALE)
    assert over.data_ptr() == q.data_ptr() and torch.equal(over, expected)
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])
    q, k, v = random(30)  # no tile: torch's, in memory of its own
    assert cudnn_fp8.run_over(q, k, v, SCALE).data_ptr() != q.data_ptr()


def test_equal_keys_and_values_are_exact() -> None:
    q, _, _ = random(70)
    k, v = (torch.full_like(q, value) for value in (-30.0, 1.5))
    out = cudnn_fp8.through(throughout, q, k, v, SCALE)
    assert torch.equal(out, v)


def test_heads_that_cannot_be_rotated_are_refused() -> None:
    x = torch.randn(1, 70, 2, 96).bfloat16()
    with pytest.raises(ValueError, match="heads of 96 cannot be rotated"):
        passes.quantize(x, x, x)


def test_peak_memory_is_one_tensor_above_torchs() -> None:
    q, k, v = (torch.empty(1, 32760, 40, 128, dtype=torch.bfloat16, device="meta") for _ in range(3))
    one = q.numel() * 2

    def product(q: Tensor, *_: object) -> Tensor:
        return torch.empty_like(q)

    def run() -> Tensor:
        return cudnn_fp8.through(product, q, k, v, SCALE)

    peak = peak_of(run)
    print(f"beside q, k, v: {peak / one:.3f} tensors, the output among them")
    assert 2.0 * one < peak < 2.1 * one


# --- the graph ---


class FakeNode:
    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)

    def __getattr__(self, name: str) -> Any:
        assert name.startswith("set_"), name

        def keep(value: Any) -> "FakeNode":
            setattr(self, name.removeprefix("set_"), value)
            return self

        return keep


class FakeGraph:
    """A graph of cuDNN's that computes with torch; refuses outputs in 16 bits where `refuses`."""

    made: "list[FakeGraph]" = []  # noqa: RUF012
    refuses = False

    def __init__(self, **options: Any) -> None:
        self.options, self.nodes, self.steps, self.runs = options, {}, [], 0
        FakeGraph.made.append(self)

    def tensor(self, **given: Any) -> FakeNode:
        self.nodes[given["name"]] = FakeNode(**given)
        return self.nodes[given["name"]]

    def sdpa_fp8(self, **given: Any) -> list[Any]:
        assert not given.pop("generate_stats")
        self.scale = given.pop("attn_scale")
        assert all(self.nodes[name] is node for name, node in given.items())
        self.results = [FakeNode() for _ in range(3)]
        return [self.results[0], None, *self.results[1:]]

    def validate(self) -> None:
        if self.refuses and self.results[0].data_type != "e4m3":
            raise RuntimeError("HALF/BFLOAT16 output is only supported on Blackwell")

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.steps.append(name)

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, pack: dict[int, Tensor], workspace: Tensor, handle: object) -> None:
        assert self.steps == [
            "build_operation_graph",
            "create_execution_plans",
            "check_support",
            "build_plans",
        ]
        assert handle == self.options["handle"] and workspace.dtype == torch.uint8 and len(workspace) >= 16
        by_name = {name: pack[node.uid] for name, node in self.nodes.items()}
        for name in "qkv":
            batch, heads, length, head_dim = self.nodes[name].dim
            assert by_name[name].shape == (batch, length, heads, head_dim)
            strides = by_name[name].transpose(1, 2).stride()
            assert strides == self.nodes[name].stride and by_name[name].dtype == E4M3
        one = [float(by_name[name].view(-1)[0]) for name in ("descale_k", "descale_v", "scale_o")]
        weights = [float(by_name[name].view(-1)[0]) for name in ("scale_s", "descale_s")]
        assert one == [1.0, 1.0, 1.0] and weights == [256.0, 1 / 256]
        out = pack[self.results[0].uid]
        assert out.transpose(1, 2).stride() == self.results[0].stride
        q, k, v, descale = (by_name[name] for name in ("q", "k", "v", "descale_q"))
        out.copy_(cudnn_product(q, k, v, descale, self.scale, out.dtype))
        for amax in self.results[1:]:
            assert pack[amax.uid].dtype == torch.float32 and amax.output and amax.dim == (1, 1, 1, 1)
        self.runs += 1


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[object, int]]]:
    """A `cudnn` and a Hopper card; the streams that were set."""
    set_to: list[tuple[object, int]] = []
    current = iter(range(100, 200))
    module = ModuleType("cudnn")
    kinds = {"FP8_E4M3": "e4m3", "FLOAT": "fp32", "BFLOAT16": "bf16", "HALF": "fp16"}
    module.data_type = SimpleNamespace(**kinds)  # type: ignore[attr-defined]
    module.heur_mode = SimpleNamespace(A=0, FALLBACK=1)  # type: ignore[attr-defined]
    module.pygraph = FakeGraph  # type: ignore[attr-defined]
    module.create_handle = lambda: 77  # type: ignore[attr-defined]
    module.set_stream = lambda handle, stream: set_to.append((handle, stream))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=next(current)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(FakeGraph, "made", [])
    monkeypatch.setattr(cudnn_fp8, "_refused", set())
    caches = (cudnn_fp8._graph, cudnn_fp8._handle, cudnn_fp8._constants, backends.available)
    for cached in caches:
        cached.cache_clear()
    yield set_to
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("refuses", [True, False])
def test_a_graph_is_built_once_for_a_shape_and_runs_on_the_current_stream(
    streams: list[tuple[object, int]], refuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGraph, "refuses", refuses)
    q, k, v = lifelike(200)
    exact = backends.math(q.float(), k.float(), v.float(), SCALE)
    outs = [cudnn_fp8.run(q, k, v, SCALE) for _ in range(3)]
    assert torch.equal(outs[0], outs[1]) and outs[0].dtype == q.dtype and outs[0].is_contiguous()
    off = distance(outs[0], exact)
    print(f"16-bit outputs refused: {refuses}: {off:.4f} from fp32")
    assert off < 0.03
    kinds = [graph.results[0].data_type for graph in FakeGraph.made]
    assert kinds == (["bf16", "e4m3"] if refuses else ["bf16"])
    assert FakeGraph.made[-1].runs == 3 and streams == [(77, 100), (77, 101), (77, 102)]
    cudnn_fp8.run(q[:, :150], k, v, SCALE)
    cudnn_fp8.run(q, k, v, 2 * SCALE)
    later = FakeGraph.made[len(kinds) :]  # what was refused once is not asked for again
    assert [graph.scale for graph in later] == pytest.approx([SCALE, 2 * SCALE])
    assert {graph.results[0].data_type for graph in later} == {kinds[-1]}
    assert FakeGraph.made[-1].runs == 1


def test_few_tokens_or_keys_are_torchs(streams: list[tuple[object, int]]) -> None:
    q, k, v = lifelike(200)
    for length, keys in ((200, 63), (1, 200)):
        out = cudnn_fp8.run(q[:, :length], k[:, :keys], v[:, :keys], SCALE)
        assert torch.equal(out, backends.sdpa(q[:, :length], k[:, :keys], v[:, :keys], SCALE))
    assert not FakeGraph.made and not streams


def test_it_is_proven_like_the_others(
    streams: list[tuple[object, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "capability_of", lambda _: (9, 0))
    proof = backends.prove("cudnn-fp8", CPU)
    print(proof)
    assert proof.ok and proof.distance > 0.004  # and it was not torch that ran
    monkeypatch.setattr(FakeGraph, "check_support", lambda _: 1 / 0, raising=False)
    cudnn_fp8._graph.cache_clear()
    assert "ZeroDivisionError" in backends.prove("cudnn-fp8", CPU).reason
    assert not backends.prove("cudnn-fp8", CPU, head_dim=96).ok
    backends.available.cache_clear()
    monkeypatch.setattr(backends, "capability_of", lambda _: (8, 9))
    assert backends.prove("cudnn-fp8", CPU).reason == "not installed, or not for this GPU"


@pytest.mark.parametrize("fault", [ImportError, OSError, AssertionError, RuntimeError, None])
def test_a_broken_package_is_a_missing_one(
    fault: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: str) -> object:
        if fault:
            raise fault("libcudnn.so.9: cannot open shared object file")
        return SimpleNamespace(pygraph=object)  # a release without FP8 attention

    monkeypatch.setattr(cudnn_fp8.importlib, "import_module", load)
    assert cudnn_fp8.find((9, 0)) is None
