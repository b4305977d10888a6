"""Packages that bring kernels, where they are installed and in order."""

import importlib
from contextlib import suppress
from types import ModuleType


def package(name: str) -> ModuleType | None:
    """The module; None where it is missing, or broken: built for another torch, without this GPU."""
    with suppress(ImportError, OSError, RuntimeError, AttributeError):
        return importlib.import_module(name)
    return None
