"""A small dataset made without Beam, configurations over it, and checkpoints read back as plain tensors."""

import json
import math
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.quick_imports import quick_imports

with quick_imports():  # scripts of ranks import this file, each of them anew
    import numpy as np
    import polars as pl
    import pyarrow as pa
    import torch
    import torch.distributed as dist
    import yaml
    from dataset_from_rows import parse_text, write_dataset
    from torch import Tensor

    from features.fit import reuse
    from features.fit.encoders import Encoders
    from features.fit.statistics import Statistics
    from features.parse.raw import SPLIT
    from features.schema.schema import SPLITS, Schema
    from models.losses import TaskLoss
    from models.ranker import ModelConfig, Ranker
    from pipeline.dataset.dataset import Dataset
    from pipeline.run import checkpoint
    from pipeline.training.config import Settings, TrainConfig
    from pipeline.training.faults.nonfinite import NonfiniteCheck
    from pipeline.training.parallel import process_group
    from pipeline.training.train import prepare
    from pipeline.training.trainer import Trainer

# What scripts that run by themselves import: this folder, tests/ above it, and the packages of this checkout.
PATHS = os.pathsep.join(map(str, Path(__file__).parents[:3]))

# A table shared with a bag, a bag of its own, a task seen in few rows, weights, a regression, a missing flag.
SCHEMA = yaml.safe_load("""
source: {files: "*.csv", types: {click: int, conversion: int, dwell: float, importance: float}}
tables:
  item: {dim: 8, hash: 29}
dense:
  age: {missing_flag: true}
  price: {transform: log1p, standardize: false}
categorical:
  user: {dim: 8}
  shown: {table: item}
  device: {dim: 4}
bag:
  recent: {table: item, max_length: 5}
  topics: {dim: 4}
tasks:
  click: {kind: binary, label: click}
  conversion: {kind: binary, label: conversion, given: click, loss_weight: 2.0}
  dwell: {kind: regression, label: dwell, observed_when: click = 1, loss_weight: 0.5}
weight: importance
split: {by: row_index, modulo: 10, train: [0, 1, 2, 3, 4, 5, 6, 7], valid: [8], test: [9]}
""")
TABLES = {"user", "item", "device", "topics"}
TRAIN_ROWS = 415  # 13 steps of 32, the last of them with padding in some lanes
NEVER_OBSERVED = 6  # a train row without a click label: it counts in no task


def raw_rows(count: int = 517, seed: int = 3) -> pl.DataFrame:
    """Text columns, as a reader gives them."""
    rng = np.random.default_rng(seed)
    click = rng.random(count) < 0.15
    lengths = rng.integers(0, 7, (2, count))
    bags = [
        ["|".join(f"{kind}{i}" for i in rng.integers(0, 12, n)) for n in row]
        for kind, row in zip("ct", lengths, strict=True)
    ]
    columns = {
        "age": [None if rng.random() < 0.2 else f"{rng.normal(40, 9):.3f}" for _ in range(count)],
        "price": [f"{rng.lognormal(0, 0.5):.3f}" for _ in range(count)],
        "user": [f"u{i}" for i in rng.integers(0, 30, count)],
        "shown": [f"c{i}" for i in rng.integers(0, 12, count)],
        "device": [None if rng.random() < 0.1 else f"d{i}" for i in rng.integers(0, 4, count)],
        "recent": bags[0],
        "topics": bags[1],
        "click": [str(int(c)) for c in click],
        "conversion": [str(int(c and rng.random() < 0.4)) for c in click],
        "dwell": [f"{rng.normal(1, 1):.3f}" for _ in range(count)],
        "importance": [f"{rng.choice([0.0, 0.5, 1.0, 2.0])}" for _ in range(count)],
    }
    unseen = rng.random(count) < 0.25
    unseen[NEVER_OBSERVED] = True
    frame = pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))
    return frame.with_columns(pl.when(pl.Series(unseen)).then(None).otherwise("click").alias("click"))


@cache
def dwell_variance(count: int = 517) -> float:
    """Weighted variance of the train labels of dwell, in whose units its squared errors count."""
    rows = raw_rows(count).with_row_index().filter(pl.col("index") % 10 < 8, pl.col("click") == "1")
    label, weight = rows["dwell"].cast(pl.Float32).cast(pl.Float64), rows["importance"].cast(pl.Float64)
    mean = (label * weight).sum() / weight.sum()
    return float((weight * (label - mean) ** 2).sum() / weight.sum())


def make_dataset(
    out: Path,
    rows: int = 517,
    row_group: int = 40,
    shard_rows: int = 130,
    spoil: tuple[str, int] | None = None,
    keep: Path | None = None,
    **changes: Any,
) -> Path:
    """Writes a dataset.

    Args:
        spoil: (dense column, row_id) that becomes infinite.
        keep: a dataset of which the encoders of unchanged features are kept.
        changes: of the schema's keys.
    """
    schema = Schema.parse(SCHEMA | changes, "small.yaml")
    found = parse_text(schema, raw_rows(rows))
    split_B = found[SPLIT].to_numpy()
    encoders = Encoders.fit(schema, Statistics.of(schema, found.filter(pa.array(split_B == 0))))
    if keep:
        known = Dataset(keep)
        encoders = reuse.keep(encoders, known.encoders, reuse.unchanged(schema, known.schema), known.encoders_id)
    splits = {split: encoders.encode(found.filter(pa.array(split_B == code))) for code, split in enumerate(SPLITS)}
    if spoil:
        column, row_id = spoil
        value = pl.when(pl.col("row_id") == row_id).then(float("inf")).otherwise(column).cast(pl.Float32).alias(column)
        splits = {s: pl.from_arrow(t).with_columns(value).to_arrow().cast(t.schema) for s, t in splits.items()}
    write_dataset(out, schema, splits, row_group, shard_rows, encoders)
    return out


def configuration(dataset: Path, run: Path, dropout: float = 0.0, resume: str = "auto", **train: Any) -> TrainConfig:
    """A quick run: 50 steps of 32 rows over 4 lanes, in four epochs."""
    settings: dict[str, Any] = {
        "batch_size": 32,
        "lanes": 4,
        "window": 24,
        "epochs": 4,
        "max_steps": 50,
        "seed": 5,
        "log_every": 1,
        "threads": 1,
        "dense": {"lr": 0.003},
        "tables": {"lr": 0.05},
    }
    model = ModelConfig(
        fusion={"name": "mmoe", "num_experts": 3, "levels": [[16], [8]]}, tower=[8], dropout=dropout, embedding_std=0.1
    )
    return TrainConfig(dataset=dataset, run=run, model=model, train=Settings(**(settings | train)), resume=resume)


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint under its full name, read without a process group."""
    checkpoint.check(path)
    index = json.loads(next(path.glob("tensors*.json")).read_text())["tensors"]
    return {name: from_parts(path, entry) for name, entry in index.items()}


def from_parts(path: Path, entry: dict[str, Any]) -> Tensor:
    """A tensor put together byte by byte, without the code that is tested."""
    dtype = getattr(torch, entry["dtype"])
    whole = torch.full(entry["shape"], 7, dtype=dtype)
    for part in entry["parts"]:
        length = math.prod(part["sizes"]) * dtype.itemsize
        content = bytearray((path / part["file"]).read_bytes()[part["start"] : part["start"] + length])
        block = torch.frombuffer(content, dtype=dtype) if length else torch.empty(0, dtype=dtype)
        place = tuple(slice(begin, begin + size) for begin, size in zip(part["offsets"], part["sizes"], strict=True))
        whole[place] = block.reshape(part["sizes"])
    return whole


def last(run: Path) -> dict[str, Tensor]:
    """The tensors of a run's newest checkpoint."""
    folder = run / "checkpoints"
    return tensors(checkpoint.folder(folder, checkpoint.steps(folder)[-1]))


def initial_state(config: TrainConfig) -> dict[str, Tensor]:
    """The state that a run begins with, written where it would lie, and taken away again."""
    made = prepare(config, None, torch.device("cpu"))
    write_checkpoint(made)
    state = last(config.run)
    shutil.rmtree(config.run)
    return state


def write_checkpoint(made: Trainer) -> None:
    """A checkpoint of a trainer as it stands, on disk."""
    made.save()
    made.finish_writing()


def losses(run: Path) -> list[float]:
    """The loss of each logged step."""
    return [json.loads(line)["loss"] for line in (run / "metrics" / "train.jsonl").read_text().splitlines()]


def torchrun(*arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Runs a script or a module on ranks of one thread each, and prints its output."""
    command = [sys.executable, "-m", "jobs.launch", f"--nproc-per-node={ranks}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    print(done.stdout, done.stderr)
    return done


def on_each_rank(main: Callable[[Path], None]) -> None:
    """What a script that torchrun starts does: `main` with the folder it was given, in one process group, on one thread."""
    torch.set_num_threads(1)
    process_group.start()
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


class LateDevice:
    """In place of a GPU for NonfiniteCheck: a number arrives once `delay` more were sent, and reads as 0 before.

    Attributes:
        waits: how often the host has waited for a number.
    """

    def __init__(self, delay: int) -> None:
        self.delay, self.sent, self.waits = delay, 0, 0

    def send(self, value: Tensor) -> tuple[Tensor, "LateArrival"]:
        self.sent += 1
        arrival = LateArrival(self, self.sent, value, torch.zeros_like(value))
        return arrival.copy, arrival


class LateArrival(NamedTuple):
    device: LateDevice
    number: int
    value: Tensor
    copy: Tensor

    def query(self) -> bool:
        if there := self.device.sent - self.number >= self.device.delay:
            self.copy.copy_(self.value)
        return there

    def synchronize(self) -> None:
        self.device.waits += not self.query()
        self.copy.copy_(self.value)


def on_late_device(made: Trainer, delay: int) -> Trainer:
    """A trainer that checks losses and gradients as on a GPU."""
    made.device = torch.device("meta")
    made.nonfinite = NonfiniteCheck(made.settings.nonfinite, LateDevice(delay).send)
    return made


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Asserts that two states have the same names and, within the tolerance, the same tensors; each rank's sums apart."""
    found, wanted = ({n: v for n, v in x.items() if not n.startswith("progress.")} for x in (found, wanted))
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_identical(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Asserts that two states are the same to the last bit, each rank's sums apart."""
    assert_close(found, wanted, rtol=0, atol=0)


def model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's part of a checkpoint."""
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


def unsharded(config: TrainConfig, schema: Schema, encoders: Encoders, weights: dict[str, Tensor]) -> Ranker:
    """A ranker on one device without TorchRec's sharding, in float64, with the given weights."""
    ranker = Ranker(schema, encoders, config.model, device="cpu").double()
    ranker.load_state_dict({name: value.double() for name, value in weights.items()})
    return ranker


def task_loss(schema: Schema) -> TaskLoss:
    return TaskLoss([t.loss_weight for t in schema.tasks.values()])
