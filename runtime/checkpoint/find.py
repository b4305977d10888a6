"""Where the parts of a model lie: in the variant's directory first, then in the directory around it.

The published repositories put a text encoder and a VAE into each variant (`distill_fp8/...`) and the
tokenizer beside them; people keep shared parts one level up. File names only locate a part here; what a file
holds is decided from its header when it is opened.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from runtime.checkpoint.files import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX
from runtime.errors import WeightsError

ITSELF = "."  # the candidate that stands for the directory: block files, shards
_SHARED_PART = re.compile(r"(?i).*(t5|vae|tae|clip|lora).*")


def find_component(
    directory: Path,
    subdirectories: Sequence[str],
    names: Sequence[str],
    advice: str = "Download the model or name its directory.",
) -> Path:
    """The first of `names` in the first place that has any: the subdirectories, then `directory` itself.

    names: files relative to the place looked at, best first; "." is the place itself, if a transformer may
    lie there. Raises WeightsError that lists the places and the names, and says what to do.
    """
    places = [*(directory / name for name in subdirectories), directory]
    for place in places:
        for name in names:
            if _holds_transformer(place) if name == ITSELF else (place / name).exists():
                return place / name
    wanted = ", ".join("block files" if name == ITSELF else name for name in names)
    looked = ", ".join(str(place) for place in places)
    raise WeightsError(f"None of {wanted} was found; looked in {looked}. {advice}")


def _holds_transformer(place: Path) -> bool:
    """Whether a weight file lies directly in `place` that is not, by its name, a text encoder or VAE."""
    if not place.is_dir():
        return False
    suffixes = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)
    return any(f.suffix in suffixes and not _SHARED_PART.fullmatch(f.name) for f in place.iterdir())
