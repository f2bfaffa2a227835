"""A package without files, whose every score is known: of row x the probability is sigmoid(weight x), the price 10 weight x."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.serving.encoded import Encoded
from pipeline.serving.http.packages import Loaded
from pipeline.serving.manifest import Manifest, Model
from pipeline.serving.row_error import RowError
from pipeline.serving.scorer import Scorer


class FakeRequests:
    columns = ("x", "u")

    def encode(self, rows: Sequence[Mapping[str, Any]], user: Mapping[str, Any] | None, where: str) -> Encoded:
        found = [{**(user or {}), **row} for row in rows]
        for place, row in enumerate(found):
            if not isinstance(row.get("x", 0.0), (int, float)):
                raise RowError(place, "x", f"{row['x']!r} is not a number", where)
        x_B1 = torch.tensor([[float(row.get("x", 0)) + float(row.get("u", 0))] for row in found]).reshape(-1, 1)
        return Encoded(torch.zeros(len(rows), 0, dtype=torch.int64), {}, x_B1)

    def describe(self) -> dict[str, Any]:
        return {"x": {"type": "number", "description": "<the x>"}, "u": {"type": "number"}}


class FakeTables:
    def embed(self, rows: Encoded) -> Tensor:
        return torch.zeros(len(rows), 1)


def manifest_of(step: int) -> Manifest:
    model = Model(run="run", step=step, checkpoint=f"checkpoint-{step}", fingerprint="f", encoders="e")
    tasks: dict[str, Any] = {"click": "binary", "price": "regression"}
    return Manifest(model=model, versions={}, tasks=tasks, format="fp32", tables={}, lookups=[], dense_width=1).sealed(
        {}
    )


def fake(step: int) -> Loaded:
    """The package of a step, which is its weight."""
    scorer = Scorer(
        manifest_of(step),
        FakeRequests(),  # type: ignore[arg-type]
        FakeTables(),  # type: ignore[arg-type]
        lambda _, x_B1: torch.cat([x_B1 * step, x_B1 * step * 10], 1),
    )
    return Loaded(scorer, Path(f"package-{step}"))


def click(step: int, x: float) -> float:
    return 1 / (1 + math.exp(-step * x))
