"""A checkpoint of three small tensors for tests that change it; the module needs the fixture `group`."""

from pathlib import Path
from typing import Any

import torch

from pipeline.run import checkpoint
from pipeline.run.checkpoint import CheckpointManifest

MANIFEST = CheckpointManifest(
    step=3, rows=24, epoch=1, cursors=[3, 4], seed=5, window=16, batch_size=8,
    data="d", fingerprint="f", encoders="e", config="c",
)  # fmt: skip


def state() -> dict[str, Any]:
    """Zeros to load it into."""
    return {
        "model": {"a.weight": torch.zeros(7, 5), "ids": torch.zeros(40, dtype=torch.int64)},
        "step": torch.zeros(()),
    }


def saved(folder: Path) -> Path:
    content = {"model": {"a.weight": torch.randn(7, 5), "ids": torch.arange(40)}, "step": torch.tensor(3.0)}
    return checkpoint.save(folder, content, MANIFEST)
