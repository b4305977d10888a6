"""Fourstep's engine: text to video in four steps.

    from runtime import Pipeline
    Pipeline.load("/weights", profile="rtx4070")("A man plays a red electric guitar.").save("guitar.mp4")

The names are resolved on first use, so that importing `runtime.errors` or `runtime.profiles` costs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline, Stage
    from runtime.request import Request
    from runtime.video import Video

_HOMES = {
    "Pipeline": "runtime.pipeline",
    "Stage": "runtime.pipeline",
    "Request": "runtime.request",
    "Video": "runtime.video",
}
__all__ = ["Pipeline", "Request", "Stage", "Video"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
