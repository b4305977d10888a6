"""Attention in eight bits by cuDNN, through its graphs (the package nvidia-cudnn-frontend, optional).

    out = cuDNN(q8, k8, v8)·s + m              q, k, v in e4m3 as kernels/attention_quantize.py says

cuDNN computes softmax(q8·kᵀ8·c·scale) in fp32, rounds the weights to e4m3 and multiplies them by v8. It takes
one number for each of q, k, v and the weights, on the GPU: c for q, 1 for k and v (the channels' factors come
afterwards), and a power of two for the weights. Tensors are (B, L, H, D) as they are here: no transposition.

- The output is in 16 bits where cuDNN offers that (Blackwell); elsewhere it is e4m3, in units of v8. No query
  can leave the range: it is an average of v8. That costs an error of .026 more, in quadrature.
- A graph is built once for each device, shape and scale. Nothing here waits for the GPU: scales stay on it,
  the workspace comes from torch, and everything runs on torch's current stream.
- Fewer than 64 tokens or keys are no tile: torch computes them, in 16 bits.
- Beside q, k, v and the output it needs 8-bit copies of the three, then of the output alone: the peak is one
  16-bit tensor above that of torch's attention.
- cuDNN has it for compute capability 9.0 and up. Whether it is right there is for `backends.prove` to say.
"""

import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from runtime.kernels.attention_quantize import quantize, restore
from runtime.kernels.launch import E4M3
from runtime.layers.attention import attend

SHORTEST = 64
# A weight is at most 1. From capability 10.0 on cuDNN may let the largest grow by a factor of up to e^4
# before it rescales, with its own factor of 2^-4 against that: 128·e^4/16 = 437 still fits 448.
_WEIGHT_SCALE = {9: 256.0}
_WEIGHT_SCALE_LATER = 128.0
_NAMES = ("q", "k", "v", "descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
_RESULTS = ("out", "amax_s", "amax_o")
_UID = {name: number for number, name in enumerate((*_NAMES, *_RESULTS), start=1)}

_Layout = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides
_ONE: tuple[int, ...] = (1, 1, 1, 1)

# (q8, k8, v8, descale (1,), scale, the wanted dtype) -> (B, L, H, D) in that dtype or in e4m3
Product = Callable[[Tensor, Tensor, Tensor, Tensor, float, torch.dtype], Tensor]


def find(_capability: tuple[int, int]) -> Callable[[Tensor, Tensor, Tensor, float], Tensor] | None:
    """What computes attention so, or None where the package or cuDNN itself is missing."""
    return None if frontend() is None else run


def frontend() -> Any:
    """The module `cudnn`; None where it is missing, finds no cuDNN, or knows no FP8 attention."""
    # It looks for libcudnn at import: none is an OSError or RuntimeError, two are a failed assertion.
    with suppress(ImportError, OSError, RuntimeError, AttributeError, AssertionError):
        module = importlib.import_module("cudnn")
        return module if hasattr(module.pygraph, "sdpa_fp8") else None
    return None


def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q·kᵀ·scale)·v; q (B, L, H, D), k and v (B, S, H, D) of one 16-bit dtype on one GPU.

    Returns (B, L, H, D) in q's dtype. Raises what cuDNN raises where it has no kernel, and ValueError for a
    D that is no power of two.
    """
    if min(q.shape[1], k.shape[1]) < SHORTEST:
        return attend(q, k, v, scale)
    return through(product, q, k, v, scale)


def run_over(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`run` for whoever needs q no more: the result takes its memory, which spares a copy of all tokens."""
    if min(q.shape[1], k.shape[1]) < SHORTEST or not q.is_contiguous():
        return run(q, k, v, scale)
    return through(product, q, k, v, scale, into=q)


def through(
    multiply: Product, q: Tensor, k: Tensor, v: Tensor, scale: float, into: Tensor | None = None
) -> Tensor:
    """`run` with another way to multiply in eight bits: what surrounds cuDNN, to be tested without it."""
    return restore(*_multiplied(multiply, q, k, v, scale), q.dtype, into)


def _multiplied(
    multiply: Product, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(output in units of v8, factor, center); the 8-bit copies are gone when this returns."""
    given = quantize(q, k, v)
    out = multiply(given.q, given.k, given.v, given.descale, scale, q.dtype)
    return out, given.factor, given.center


# --- cuDNN ---


@dataclass(frozen=True)
class _Shape:
    """What a graph is built for."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    scale: float


@dataclass(frozen=True)
class _Graph:
    """A graph that was built: what runs it, the bytes it needs beside its tensors, and its output's dtype."""

    graph: Any
    workspace: int
    dtype: torch.dtype


def product(q: Tensor, k: Tensor, v: Tensor, descale: Tensor, scale: float, wanted: torch.dtype) -> Tensor:
    """softmax(q·kᵀ·descale·scale)·v by cuDNN, on the current stream; q, k, v (B, L or S, H, D) e4m3.

    Returns (B, L, H, D) in the wanted dtype, or in e4m3 where cuDNN has no kernel that writes that.
    """
    shape = _Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3], scale)
    with torch.cuda.device(q.device):
        handle = _handle(q.device)
        frontend().set_stream(handle, torch.cuda.current_stream(q.device).cuda_stream)
        built = _graph(q.device, shape, wanted)
        out = torch.empty(q.shape, dtype=built.dtype, device=q.device)
        workspace = torch.empty(max(built.workspace, 16), dtype=torch.uint8, device=q.device)
        amax = torch.empty(2, 4, dtype=torch.float32, device=q.device)  # cuDNN insists on telling them
        one, weights, back = _constants(q.device)
        tensors = (q, k, v, descale, one, one, back, weights, one, out, amax[0], amax[1])
        built.graph.execute(dict(zip(_UID.values(), tensors, strict=True)), workspace, handle=handle)
    return out


@cache
def _handle(device: torch.device) -> Any:
    """cuDNN's handle of a device, for as long as the process lives."""
    return frontend().create_handle()


@cache
def _constants(device: torch.device) -> tuple[Tensor, ...]:
    """1, the scale of the weights and its inverse; each of one number, 16 bytes apart."""
    scale = _WEIGHT_SCALE.get(torch.cuda.get_device_capability(device)[0], _WEIGHT_SCALE_LATER)
    return torch.tensor([[1.0], [scale], [1 / scale]]).repeat(1, 4).to(device).unbind()


_refused: set[tuple[torch.device, torch.dtype]] = set()
"""Outputs that cuDNN does not write on a GPU."""


@lru_cache(maxsize=16)  # a run has one shape; trials have a few
def _graph(device: torch.device, shape: _Shape, wanted: torch.dtype) -> _Graph:
    """The graph for a shape, with an output of the wanted dtype if that exists and of e4m3 otherwise."""
    if (device, wanted) not in _refused:
        try:
            return _built(device, shape, wanted)
        # Frontends refuse it with one class, cuDNN itself with another.
        except Exception:  # noqa: BLE001
            built = _built(device, shape, E4M3)
            _refused.add((device, wanted))  # it is the GPU that has none: no other shape asks again
            return built
    return _built(device, shape, E4M3)


def _built(device: torch.device, shape: _Shape, dtype: torch.dtype) -> _Graph:
    cudnn = frontend()
    kinds = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", E4M3: "FP8_E4M3"}
    fp8, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        handle=_handle(device),
        io_data_type=fp8,
        intermediate_data_type=fp32,
        compute_data_type=fp32,
    )
    nodes = {}
    for name in _NAMES:
        layout: _Layout = (_ONE, _ONE)
        kind = fp32
        if name in ("q", "k", "v"):
            layout, kind = _laid_out(shape, shape.queries if name == "q" else shape.keys), fp8
        nodes[name] = graph.tensor(name=name, dim=layout[0], stride=layout[1], data_type=kind)
        nodes[name].set_uid(_UID[name])
    out, _stats, *amax = graph.sdpa_fp8(**nodes, attn_scale=shape.scale, generate_stats=False)
    _output(out, "out", _laid_out(shape, shape.queries), getattr(cudnn.data_type, kinds[dtype]))
    for name, node in zip(("amax_s", "amax_o"), amax, strict=True):
        _output(node, name, (_ONE, _ONE), fp32)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return _Graph(graph, graph.get_workspace_size(), dtype)


def _laid_out(shape: _Shape, length: int) -> _Layout:
    """Sizes (B, H, L, D), in which cuDNN thinks, and the strides of a (B, L, H, D) tensor in that order."""
    row = shape.heads * shape.head_dim
    return (shape.batch, shape.heads, length, shape.head_dim), (length * row, shape.head_dim, row, 1)


def _output(node: Any, name: str, layout: _Layout, kind: Any) -> None:
    dim, stride = layout
    node.set_output(True).set_uid(_UID[name]).set_dim(dim).set_stride(stride).set_data_type(kind)
