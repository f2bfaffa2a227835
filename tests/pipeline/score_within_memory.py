"""Logits of a run within limited memory, for test_needed_rows.py: python score_within_memory.py FOLDER all|needed MEGABYTES

FOLDER is that of `make_run`. Prints the logits as JSON.
"""

import json
import resource
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from dataset_from_rows import parse_text, write_dataset

from features.fit.encoders import Encoders
from features.fit.statistics import Statistics
from features.parse.raw import SPLIT
from features.schema.schema import SPLITS, Schema
from models.emm import build_ranker
from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.evaluation.weights import Loading, ModelWeights
from pipeline.run.checkpoint import CheckpointManifest
from pipeline.run.run import Run
from pipeline.storage.files import sha256, write_json, write_text

STEP, DIM, BUCKETS = 3, 64, 3 << 19
MODEL = {"fusion": {"name": "shared_bottom", "widths": [8]}, "tower": [4]}
SCHEMA = {
    "source": {"files": "*.csv", "types": {"click": "int"}},
    "categorical": {"user": {"dim": DIM, "hash": BUCKETS}},
    "bag": {"topics": {"dim": 4}},
    "tasks": {"click": {"kind": "binary", "label": "click"}},
    "split": {"by": "row_index", "modulo": 2, "train": [0], "test": [1]},
}


def make_run(folder: Path) -> None:
    """A dataset of 100 rows and a run whose checkpoint has a table of 384 MiB, a sparse file but for the rows in use."""
    schema = Schema.parse(SCHEMA, "large.yaml")
    columns = {
        "user": [f"u{i}" for i in range(100)],
        "topics": ["|".join(f"t{k}" for k in range(i % 4)) for i in range(100)],
        "click": [str(i % 3 // 2) for i in range(100)],
    }
    found = parse_text(schema, pl.DataFrame(columns))
    split_B = found[SPLIT].to_numpy()
    encoders = Encoders.fit(schema, Statistics.of(schema, found.filter(pa.array(split_B == 0))))
    splits = {split: encoders.encode(found.filter(pa.array(split_B == code))) for code, split in enumerate(SPLITS)}
    dataset = write_dataset(folder / "data", schema, splits, 16, 30, encoders)
    run = Run(folder / "run")
    run.create({"dataset": str(folder / "data"), "model": MODEL, "train": {}}, schema)
    used = np.unique(np.concatenate([splits[split]["user"].to_numpy() for split in SPLITS]))
    write_checkpoint(run, dataset, used)


def write_checkpoint(run: Run, dataset: Dataset, used: np.ndarray) -> None:
    """Random weights; those of the large table in the rows in use alone."""
    ranker = build_ranker(dataset.schema, dataset.encoders, ModelConfig.model_validate(MODEL))
    rng, tensors, path = np.random.default_rng(0), {}, run.checkpoints / f"step-{STEP:08d}"
    path.mkdir()
    with (path / "rank-00000.bin").open("wb") as file:
        for name, tensor in ranker.state_dict().items():
            start, row_bytes = file.tell() + -file.tell() % 64, 4 * tensor[:1].numel()
            shape = list(tensor.shape)
            part = {"offsets": [0] * len(shape), "sizes": shape, "file": file.name.split("/")[-1], "start": start}
            tensors[f"model.{name}"] = {"dtype": str(tensor.dtype).split(".")[1], "shape": shape, "parts": [part]}
            for row in used if len(tensor) > BUCKETS else range(len(tensor)):
                file.seek(start + int(row) * row_bytes)
                file.write(rng.normal(size=row_bytes // 4).astype(np.float32).tobytes())
            file.seek(start + row_bytes * len(tensor))
            file.truncate()
    write_json(path / "tensors.json", {"version": 1, "tensors": tensors})
    files = {name: ((path / name).stat().st_size, sha256(path / name)) for name in ("rank-00000.bin", "tensors.json")}
    manifest = CheckpointManifest(
        step=STEP, rows=24, epoch=1, cursors=[3], seed=5, window=16, batch_size=8, data="d",
        fingerprint=dataset.schema.fingerprint, encoders=dataset.encoders_id, config="c",
    )  # fmt: skip
    write_text(path / "manifest.json", manifest.sealed(files).model_dump_json())


def logits(folder: Path, loading: Loading) -> list[list[float]]:
    """Of the test split."""
    dataset = Dataset(folder / "data")
    weights = ModelWeights(Run(folder / "run"), dataset, ["test"], 16, loading)
    weights.load(STEP)
    batches = SplitReader(dataset, "test", 16).batches()
    return [row for batch in batches for row in weights(batch)[batch.row_id_B >= 0].tolist()]


def main(folder: Path, tables: str, megabytes: int) -> None:
    torch.set_num_threads(1)
    torch.nn.EmbeddingBag(2, 2)(torch.zeros(1, 1, dtype=torch.int64))  # libraries are loaded before the limit counts
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps(logits(folder, Loading(tables))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
