"""LightX2V's Python interface and JSON configurations on this engine.

pipeline.py   the drop-in `LightX2VPipeline`
config.py     their JSON into our request and profile, which `t2v explain` prints
keys.py       every key of theirs, with its rule
rules.py      what a rule can say: used here, without effect, refused

The class is resolved on first use: the translation needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.lightx2v.pipeline import LightX2VPipeline, LightX2VWarning

__all__ = ["LightX2VPipeline", "LightX2VWarning"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'runtime.lightx2v' has no attribute {name!r}")
    from runtime.lightx2v import pipeline

    return getattr(pipeline, name)
