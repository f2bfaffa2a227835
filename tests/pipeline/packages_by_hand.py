"""Rankers of every kind of table, rows of ids for them in the forms of both libraries, and packages of their tables."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoint_by_hand
import numpy as np
import torch
import yaml
from torch import Tensor
from torchrec import KeyedJaggedTensor

from features.batch import Batch
from features.kinds.tables import Managed
from features.schema.schema import Schema
from models.emm import build_ranker
from models.ranker import ModelConfig, Ranker, table_weights
from pipeline.release.export.delta import changed_tables, write_delta_manifest
from pipeline.release.export.tables import write_tables
from pipeline.run import checkpoint
from pipeline.serving.encoded import Encoded, Lists
from pipeline.serving.manifest import Lookup, Manifest, Model, StoredTable, TableFormat, write_manifest

# Two widths by turns, so that columns must be put in order; a table of a feature and a list; managed ones.
POOLED = yaml.safe_load("""
source: {files: "*.csv", types: {click: int, buy: int}}
tables:
  item: {dim: 8, hash: 40}
  page: {dim: 4, managed: {rows: 150}}
dense: {age: {}}
categorical:
  user: {dim: 4}
  shown: {table: item}
  hour: {dim: 4, bins: 5}
  at: {table: page}
  id: {dim: 8, managed: {rows: 70, evict: lfu}}
bag:
  met: {table: item, max_length: 4}
  topics: {dim: 4, hash: 6}
  before: {table: page}
tasks:
  click: {kind: binary, label: click}
  buy: {kind: binary, label: buy}
split: {by: row_index, modulo: 10, train: [0, 1, 2, 3, 4, 5, 6, 7], valid: [8], test: [9]}
""")
SEQUENCES = POOLED | {
    "bag": {
        **POOLED["bag"],
        "recent": {"table": "item", "max_length": 3, "pooling": "sequence"},
        "words": {"dim": 8, "hash": 9, "max_length": 2, "pooling": "sequence"},
    }
}
PLAIN = {k: v for k, v in POOLED.items() if k != "tables"} | {
    "tables": {"item": {"dim": 8, "hash": 40}},
    "categorical": {name: POOLED["categorical"][name] for name in ("user", "shown", "hour")},
    "bag": {name: POOLED["bag"][name] for name in ("met", "topics")},
}
ONE_WIDTH = PLAIN | {"tables": {"item": {"dim": 4, "hash": 40}}, "bag": {}}  # read from the file as they lie in it
SOURCES = [
    {"run": f"r{task}", "step": 1, "task": task, "model": {"fusion": {"name": "shared_bottom", "widths": [3]}}}
    for task in ("click", "buy")
]
SHARED = {"name": "shared_bottom", "widths": [3]}
STEM = {"name": "stem", "widths": [3]}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pooled": (POOLED, SHARED),
    "sequences": (SEQUENCES, SHARED),
    "one width": (ONE_WIDTH, SHARED),
    "sets": (POOLED, STEM),
    "emm": (PLAIN, {"name": "emm", "sources": SOURCES}),
}
ROWS = {"user": 30, "hour": 6, "item": 41, "topics": 7, "words": 10}
TOP = (1 << 63) - 1


@cache
def num_embeddings(table: str) -> int:
    if table in ROWS:
        return ROWS[table]
    managed: Managed = Schema.parse(POOLED, "p.yaml").all_tables[table].managed
    return 2 + managed.sets * managed.ways


ENCODERS = SimpleNamespace(edges={}, labels={}, num_embeddings=num_embeddings)


@cache
def schema_of(case: str) -> Schema:
    return Schema.parse(CASES[case][0], "package.yaml")


def ranker_of(case: str, seed: int = 0) -> Ranker:
    """With tables drawn at random, and maps of which a part is taken."""
    torch.manual_seed(seed)
    config = ModelConfig(fusion=CASES[case][1], tower=[3], embedding_std=1.0)
    ranker = build_ranker(schema_of(case), ENCODERS, config, device="cpu").eval()
    for part in ranker.managed.maps.values() if ranker.managed else ():
        part.admit(torch.randint(1, TOP, (60,)).unique(), torch.ones(60, dtype=torch.int64), 1)
    return ranker


def rows_of(case: str, ranker: Ranker, count: int, seed: int) -> tuple[Encoded, Batch]:
    """The same rows for a package and for a ranker: empty and full lists, missing ids, and unknown ones of managed tables."""
    schema, rng = schema_of(case), np.random.default_rng(seed)

    def ids(feature: str, length: int) -> np.ndarray:
        table = schema.table_of(feature)
        if not schema.table(feature).managed:
            return rng.integers(0, num_embeddings(table), length)
        known = ranker.managed.maps[table].id_SW.unique().numpy()
        drawn = np.stack([rng.choice(known, length), rng.integers(1, TOP, length), np.zeros(length, np.int64)])
        return drawn[rng.integers(0, 3, length), np.arange(length)]

    id_BF = np.column_stack([ids(feature, count) for feature in schema.single])
    lists = {}
    for feature, bag in schema.bag.items():
        length_B = rng.integers(0, min(bag.max_length, 4) + 2, count)  # of the longest only the first items count
        lists[feature] = Lists(torch.from_numpy(ids(feature, int(length_B.sum()))), torch.from_numpy(length_B))
    encoded = Encoded(torch.from_numpy(id_BF), lists, torch.zeros(count, schema.dense_width))
    one_B = torch.ones(count, dtype=torch.int64)
    sparse = KeyedJaggedTensor(
        keys=list(schema.sparse),
        values=torch.cat([*encoded.id_BF.t(), *(own.id_V for own in lists.values())]),
        lengths=torch.cat([*[one_B] * len(schema.single), *(own.length_R for own in lists.values())]),
    )
    one_BT = torch.ones(count, len(schema.tasks))
    return encoded, Batch(sparse, encoded.dense_BD, one_BT, one_BT.bool(), one_BT, one_B)


def save(run: Path, step: int, ranker: Ranker, seed: int = 0) -> SimpleNamespace:
    """A run with a checkpoint whose tables are cut by rows and columns at random."""
    rng = np.random.default_rng(seed)
    cuts = rng.integers(0, 200, (2, 2)).tolist()
    tensors = {f"model.{name}": tensor for name, tensor in ranker.state_dict().items()}
    checkpoint_by_hand.write(checkpoint.folder(run / "checkpoints", step), tensors, *cuts)
    return SimpleNamespace(path=run, checkpoints=run / "checkpoints")


@cache
def meta_ranker(case: str) -> Ranker:
    with torch.device("meta"):
        return build_ranker(schema_of(case), ENCODERS, ModelConfig(fusion=CASES[case][1], tower=[3]))


def described(
    case: str, step: int, form: TableFormat, tables: dict[str, StoredTable], lookups: list[Lookup]
) -> Manifest:
    schema = schema_of(case)
    return Manifest(
        model=Model(run="r", step=step, checkpoint=f"c{step}", fingerprint=schema.fingerprint, encoders="e"),
        versions={}, tasks={"click": "binary", "buy": "binary"}, format=form, tables=tables, lookups=lookups,
        sets=meta_ranker(case).sets, dense_width=schema.dense_width,
    )  # fmt: skip


def export(
    run: Any, step: int, case: str, form: TableFormat, folder: Path, kept: dict[str, np.ndarray] | None = None
) -> Manifest:
    """A package of the tables, and a file in place of all others."""
    folder.mkdir(parents=True)
    tables, lookups, names = write_tables(run, step, meta_ranker(case), schema_of(case), form, kept, folder)
    (folder / "dense.pt2").write_text(f"of step {step}")
    return write_manifest(folder, described(case, step, form, tables, lookups), [*names, "dense.pt2"])


def export_delta(
    run: Any, step: int, base: Manifest, case: str, folder: Path, kept: dict[str, np.ndarray] | None = None
) -> Manifest:
    """What changes the package of a base to that of a step."""
    folder.mkdir(parents=True)
    changed = changed_tables(run, step, base.model.step, meta_ranker(case), schema_of(case), base.format, kept, folder)
    (folder / "dense.pt2").write_text(f"of step {step}")
    whole = described(case, step, base.format, changed.tables, changed.lookups)
    return write_delta_manifest(folder, whole, base, changed, ["dense.pt2"])


def train(ranker: Ranker, rng: np.random.Generator) -> None:
    """Changes some rows of some tables, and gives rows of managed tables to other ids."""
    for weight_RD in weights(ranker).values():
        row_N = torch.from_numpy(np.flatnonzero(rng.random(len(weight_RD)) < rng.choice([0, 0.1, 0.5])))
        weight_RD[row_N] += torch.randn(len(row_N), weight_RD.shape[1])
    if ranker.managed and rng.random() < 0.5:
        for part in ranker.managed.maps.values():
            id_N = torch.from_numpy(rng.integers(1, TOP, 20)).unique()
            part.admit(id_N, torch.ones_like(id_N), 2)


def weights(ranker: Ranker) -> dict[str, Tensor]:
    """Of each table its rows, as views."""
    state = ranker.state_dict()
    return {table: state[name] for table, name in table_weights(ranker).items()}


def some_rows(case: str, seed: int) -> dict[str, np.ndarray]:
    """Of each table that is not managed some rows, among them that of missing values."""
    schema, rng = schema_of(case), np.random.default_rng(seed)
    tables = {schema.table_of(feature) for feature in schema.sparse if not schema.table(feature).managed}
    return {
        name: np.union1d([0], rng.integers(0, num_embeddings(name), num_embeddings(name) // 2)).astype(np.int64)
        for name in sorted(tables)
    }
