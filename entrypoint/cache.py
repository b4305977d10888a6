"""Where what is worth keeping between two runs goes: text states, for now."""

import os
from pathlib import Path

CONTAINER_CACHE = Path("/cache")  # the volume of the container image
NO_CACHE = "none"


def choose_cache(given: str | None) -> Path | None:
    """The cache directory: `given`, /cache in the container, else this user's; None if `given` is "none"."""
    if given is not None:
        return None if given.lower() == NO_CACHE else Path(given).expanduser().absolute()
    if CONTAINER_CACHE.is_dir() and os.access(CONTAINER_CACHE, os.W_OK):
        return CONTAINER_CACHE
    base = os.environ.get("XDG_CACHE_HOME", "")  # a relative one is to be ignored, says its specification
    try:
        home = Path(base) if base.startswith("/") else Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in some containers
        return None
    return home / "fourstep"
