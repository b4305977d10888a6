"""Published checkpoints -> canonical Wan names -> a strictly loaded model; files and names, no model code."""

from runtime.checkpoint.checkpoint import Checkpoint, Quantization, expect_quantization, open_checkpoint
from runtime.checkpoint.files import TensorInfo, read_tensor
from runtime.checkpoint.find import find_component
from runtime.checkpoint.load import load_weights
from runtime.checkpoint.names import Kind

__all__ = [
    "Checkpoint",
    "Kind",
    "Quantization",
    "TensorInfo",
    "expect_quantization",
    "find_component",
    "load_weights",
    "open_checkpoint",
    "read_tensor",
]
