"""Datasets and configurations of gpu.py: the demo's features and a wide schema, rows drawn at random, no job needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
import pyarrow as pa
import yaml
from dataset_from_rows import parse_text, write_dataset

from features.fit.encoders import Encoders
from features.fit.statistics import Statistics
from features.schema.schema import Schema
from models.ranker import ModelConfig
from pipeline.dataset.loader import Loader
from pipeline.training.config import Settings, TrainConfig

CONF = Path(__file__).parents[2] / "jobs" / "conf"
FEATURES = ("tables", "dense", "categorical", "bag")
WIDE = {"ids": 150, "bags": 50, "numbers": 50, "hash": 20_000}
NARROW = {"ids": 6, "bags": 2, "numbers": 3, "hash": 50}  # in place of WIDE in a small form
USERS, ITEMS, FEW = 100_000, 5_000, 20  # values of a demo's column
GROUP = 2_048  # rows of a row group
TIMES = {"demo": 8, "wide": 4}  # that the same rows are written
LANES = 8
TASKS = {
    "click": {"kind": "binary", "label": "click"},
    "conversion": {"kind": "binary", "label": "conversion", "given": "click"},
    "dwell": {"kind": "regression", "label": "dwell", "observed_when": "click = 1"},
}


def content(kind: str, small: bool) -> dict[str, Any]:
    """A schema as plain data: "demo" or "wide"."""
    if kind == "demo":
        whole = yaml.safe_load((CONF / "data" / "demo.yaml").read_text())["schema"]
        features = {key: whole[key] for key in FEATURES}
    else:
        size = NARROW if small else WIDE
        id_column = {"dim": 16, "hash": size["hash"]}
        features = {
            "dense": {f"number_{n}": {} for n in range(size["numbers"])},
            "categorical": {f"id_{n}": id_column for n in range(size["ids"])},
            "bag": {f"bag_{n}": id_column | {"max_length": 10} for n in range(size["bags"])},
        }
    types = {"click": "int", "conversion": "int", "dwell": "float"}
    split = {"by": "row_index", "modulo": 10, "train": list(range(8)), "valid": [8], "test": [9]}
    return features | {"source": {"files": "*.csv", "types": types}, "tasks": TASKS, "split": split}


def text_rows(schema: dict[str, Any], count: int, seed: int = 0) -> pl.DataFrame:
    """Rows as a reader gives them: ids with a long tail, bags of up to 10, labels that follow from the first number."""
    rng = np.random.default_rng(seed)
    columns: dict[str, Sequence[str]] = {}
    numbers = rng.standard_normal((len(schema["dense"]), count)).round(4)
    for name, value in zip(schema["dense"], numbers, strict=True):
        columns[name] = np.exp(value).astype(str).tolist()
    for name in schema["categorical"]:
        values = USERS if name == "user_id" else ITEMS if name.endswith("_id") or name.startswith("id_") else FEW
        columns[name] = (values * rng.random(count) ** 3).astype(int).astype(str).tolist()
    for name in schema["bag"]:
        ends = np.cumsum(rng.integers(0, 11, count))
        ids = (ITEMS * rng.random(ends[-1]) ** 3).astype(int).astype(str)
        columns[name] = ["|".join(part) for part in np.split(ids, ends[:-1])]
    click = rng.random(count) < 1 / (1 + np.exp(1.5 - numbers[0]))
    columns["click"] = click.astype(int).astype(str).tolist()
    columns["conversion"] = (click & (rng.random(count) < 0.3)).astype(int).astype(str).tolist()
    columns["dwell"] = (numbers[1] + rng.standard_normal(count)).round(3).astype(str).tolist()
    return pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))


def dataset(out: Path, kind: str, small: bool) -> Path:
    """Writes a dataset; of a large one the same rows several times, for loaders that read many a second."""
    count, times = (320, 1) if small else (73_000, TIMES[kind])
    plain = content(kind, small)
    schema = Schema.parse(plain, f"{kind}.yaml")
    found = parse_text(schema, text_rows(plain, count))
    encoders = Encoders.fit(schema, Statistics.of(schema, found))
    train = pa.concat_tables([encoders.encode(found)] * times)
    write_dataset(out, schema, {"train": train}, 32 if small else GROUP, count, encoders)
    return out


def supports(setting: str, value: object = None) -> bool:
    """Whether `train` has a setting, and where it lists its values, this one."""
    if setting not in Settings.model_fields:
        return False
    values = get_args(Settings.model_fields[setting].annotation)
    return value is None or not values or value in values


def configuration(data: Path, run: Path, model: str, **train: Any) -> TrainConfig:
    """Of a run. model: one of jobs/conf/model; "autotask of rows" has examples of a row alone, as many in every batch."""
    plain = yaml.safe_load((CONF / "model" / f"{model.split()[0]}.yaml").read_text())
    if model == "autotask of rows":
        plain["fusion"]["examples"] = "tasks"
    settings = {
        "lanes": LANES,
        "epochs": 9_999,
        "log_every": 50,
        "checkpoint_every": 1 << 30,
        "max_steps": 1 << 30,
    }
    return TrainConfig(dataset=data, run=run, model=ModelConfig(**plain), train=Settings(**(settings | train)))


def batches(loader: Loader, count: int) -> list[Any]:
    """The first batches of an epoch, in memory of their own."""
    found = []
    for batch in loader.batches(loader.start()):
        found.append(batch)
        if len(found) == count:
            break
    return found
