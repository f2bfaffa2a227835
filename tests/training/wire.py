"""Training on several hosts, and the bytes of a step: those that their links count, and those that jobs.plan goes by."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from hosts import Host
from tiny_training import PATHS, SCHEMA, make_dataset

from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.training.config import Settings
from pipeline.training.parallel import plan, scaling, shard
from pipeline.training.parallel.row_load import RowLoad
from pipeline.training.parallel.step_time import Step
from pipeline.training.parallel.topology import Cluster

HERE = Path(__file__).parent
MODEL: dict[str, Any] = {"fusion": {"name": "mmoe", "num_experts": 3, "levels": [[128], [64]]}, "tower": [8]}
COMMON: dict[str, Any] = {
    "lanes": 4,
    "window": 512,
    "log_every": 9999,
    "checkpoint_every": 9999,
    "threads": 1,
    "epochs": 99,
}
# Tables large enough that their bytes stand out from the headers of the network, of as many rows on every rank.
TABLES = {
    "tables": {"item": {"dim": 64, "hash": 2999}},
    "categorical": {"user": {"dim": 32, "hash": 3999}, "shown": {"table": "item"}, "device": {"dim": 32, "hash": 999}},
    "bag": SCHEMA["bag"] | {"topics": {"dim": 32, "hash": 999}},
}
MEMORY = 10**12


@dataclass(frozen=True)
class Measured:
    """Bytes a step that each host sent and received, and seconds of each step of the slowest rank."""

    sent: list[float]
    received: list[float]
    seconds: list[float]


def dataset(out: Path, rows: int) -> Path:
    """Some rows, whose train split is one epoch of no less than `rows` * 0.8."""
    return make_dataset(out, rows=rows, row_group=1000, shard_rows=rows // 4, **TABLES)


def train(
    folder: Path, hosts: Sequence[Host], ranks_per_host: int, cases: Mapping[str, dict[str, Any]], steps: int, warm: int
) -> dict[str, Measured]:
    """Trains each case for `steps` steps, and measures those after the first `warm`.

    Args:
        folder: with the dataset `data`. cases: settings of train by name.
    """
    content = {"steps": steps, "warm": warm, "model": MODEL, "cases": {n: COMMON | c for n, c in cases.items()}}
    (folder / "cases.json").write_text(json.dumps(content))
    started = [
        host.start(
            sys.executable, "-m", "jobs.launch", f"--nnodes={len(hosts)}", f"--node-rank={number}", "--master-port=29511",
            f"--master-addr={hosts[0].name}", f"--nproc-per-node={ranks_per_host}", str(HERE / "wire_ranks.py"), str(folder),
            env={"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for number, host in enumerate(hosts)
    ]  # fmt: skip
    printed = [process.communicate(timeout=600)[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("\n".join(text[-3000:] for text in printed))
    found = {}
    for name in cases:
        ranks = [json.loads((folder / f"{name}.{r}.json").read_text()) for r in range(len(hosts) * ranks_per_host)]
        seconds = [max(step) for step in zip(*(rank["seconds"] for rank in ranks), strict=True)]
        first = ranks[::ranks_per_host]
        found[name] = Measured([r["sent"] for r in first], [r["received"] for r in first], seconds)
    return found


def predicted(data: Path, settings: dict[str, Any], hosts: int, ranks_per_host: int) -> Step:
    """The step of a case, as jobs.plan would place it; the ids of an average row are counted in the dataset's shards."""
    found, wanted = Dataset(data), Settings(**(COMMON | settings))
    model = scaling.Model.of(found.schema, found.encoders, ModelConfig.model_validate(MODEL), wanted)
    rows = pa.concat_tables(
        pq.read_table(data / shard.path, columns=[*found.schema.lists]) for shard in found.shards("train")
    )
    lengths = {name: pc.mean(pc.list_value_length(rows[name])).as_py() for name in found.schema.lists}
    cluster = Cluster(hosts * ranks_per_host, ranks_per_host, "cpu", 0, MEMORY)
    # Placed as in training, by guessed lengths: these datasets have no card.
    placed, _ = plan.place(model.step, shard.sharders(wanted), model.tables, wanted, cluster, model.load)
    return scaling.step_of(placed, replace(model, load=RowLoad({**model.load.ids, **lengths})), wanted, cluster)
