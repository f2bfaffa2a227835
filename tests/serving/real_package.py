"""A small package whose files are written here, and its predictions by plain loops in float64."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from torch import Tensor, nn

from features.fit.encoders import Encoders
from features.kinds.moments import Moments
from features.schema.schema import Schema
from pipeline.release.export.program import archive_of
from pipeline.serving.manifest import Lookup, Manifest, Model, StoredTable, write_manifest

SCHEMA: dict[str, Any] = {
    "source": {"files": "*.csv", "types": {"clicked": "int", "spent": "float"}},
    "dense": {"age": {}},
    "categorical": {"city": {"dim": 4}},
    "bag": {"recent": {"dim": 4, "max_length": 3}},
    "tasks": {
        "click": {"kind": "binary", "label": "clicked"},
        "spent": {"kind": "regression", "label": "spent"},
    },
    "split": {"by": "row_index", "modulo": 10, "train": [0, 1, 2, 3, 4, 5, 6, 7], "valid": [8], "test": [9]},
}
CITIES, ITEMS = ["paris", "rome"], ["a", "b", "c"]
MEAN, STD = 40.0, 10.0
ENCODERS = (("city", CITIES), ("recent", ITEMS))


class Dense(nn.Module):
    """Two outputs, linear in embeddings and numbers."""

    def __init__(self, weight_TX: Tensor) -> None:
        super().__init__()
        self.weight_TX = nn.Parameter(weight_TX)

    def forward(self, embedding_BE: Tensor, dense_BD: Tensor) -> Tensor:
        return torch.nn.functional.linear(torch.cat([embedding_BE, dense_BD], 1), self.weight_TX)


def numbers(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """row_RX of both tables, city's four first, and weight_TX."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(9, 4)).astype(np.float32), generator.normal(size=(2, 9)).astype(np.float32)


def write(folder: Path, seed: int = 1, schema: Mapping[str, Any] = SCHEMA, **changes: Any) -> Manifest:
    """A whole package; `changes` of its manifest."""
    row_RX, weight_TX = numbers(seed)
    parsed = Schema.parse(copy.deepcopy(dict(schema)), "schema.yaml")
    (folder / "tables").mkdir(parents=True)
    (folder / "schema.yaml").write_text(yaml.safe_dump(dict(schema), sort_keys=False))
    Encoders(
        parsed, {name: pa.array(values, pa.large_string()) for name, values in ENCODERS},
        {"age": Moments(100, MEAN, 100 * STD**2)}, {}, {"age": 0},
    ).save(folder / "encoders")  # fmt: skip
    (folder / "tables" / "dim-00004.bin").write_bytes(row_RX.tobytes())
    rows = torch.export.Dim("rows", min=1)
    examples = (torch.zeros(3, 8), torch.zeros(3, 1))
    program = torch.export.export(
        Dense(torch.from_numpy(weight_TX)).eval(), examples, dynamic_shapes=({0: rows}, {0: rows})
    )
    (folder / "dense.pt2").write_bytes(archive_of(program))
    table = {"file": "tables/dim-00004.bin", "dim": 4}
    manifest = Manifest(
        model=Model(run="run", step=seed, checkpoint=f"checkpoint-{seed}", fingerprint=parsed.fingerprint, encoders="e"),
        versions={}, tasks={"click": "binary", "spent": "regression"}, format="fp32",
        tables={
            "city": StoredTable(first=0, rows=4, num_embeddings=4, **table),
            "recent": StoredTable(first=4, rows=5, num_embeddings=5, **table),
        },
        lookups=[
            Lookup(feature="city", table="city", pooling="single"), Lookup(feature="recent", table="recent", pooling="mean")
        ],
        dense_width=1,
    ).model_copy(update=changes)  # fmt: skip
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return write_manifest(folder, manifest, names)


def expected(row: Mapping[str, Any], seed: int = 1) -> tuple[float, float]:
    """The probability of a click and what is spent."""
    row_RX, weight_TX = numbers(seed)
    city, items = row.get("city"), (row.get("recent") or [])[:3]
    place = 0 if city is None else 2 + CITIES.index(city) if city in CITIES else 1
    x = [float(number) for number in row_RX[place]]
    places = [4 + (2 + ITEMS.index(item) if item in ITEMS else 1) for item in items]
    x += [sum(float(row_RX[p][k]) for p in places) / max(len(places), 1) for k in range(4)]
    x.append(0.0 if row.get("age") is None else (float(row["age"]) - MEAN) / STD)
    click, spent = (sum(float(w) * value for w, value in zip(weight_X, x, strict=True)) for weight_X in weight_TX)
    return 1 / (1 + math.exp(-click)), spent
