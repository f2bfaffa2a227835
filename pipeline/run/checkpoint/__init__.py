"""Checkpoints: written to a temporary folder, checksummed, renamed into place; read only with a manifest that fits."""

from pipeline.run.checkpoint.lock import reading, remove, tidy
from pipeline.run.checkpoint.manifest import CheckpointManifest, check, chosen, folder, read, steps
from pipeline.run.checkpoint.reader import load, shapes
from pipeline.run.checkpoint.rows import load_rows
from pipeline.run.checkpoint.writer import save

__all__ = [
    "CheckpointManifest",
    "check",
    "chosen",
    "folder",
    "load",
    "load_rows",
    "read",
    "reading",
    "remove",
    "save",
    "shapes",
    "steps",
    "tidy",
]
