"""Weights: downloaded, resumed, verified and listed, all against a manifest; torch-free at import."""

from runtime.weights.hub import Patience
from runtime.weights.plan import Plan
from runtime.weights.progress import Progress
from runtime.weights.pull import Pulled, PullReporter, pull
from runtime.weights.shelf import Shelved, shelf
from runtime.weights.state import WantedFile, read_record, wanted_files
from runtime.weights.verify import FileCheck, note_damage, verify

__all__ = [
    "FileCheck",
    "Patience",
    "Plan",
    "Progress",
    "PullReporter",
    "Pulled",
    "Shelved",
    "WantedFile",
    "note_damage",
    "pull",
    "read_record",
    "shelf",
    "verify",
    "wanted_files",
]
