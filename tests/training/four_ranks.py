"""What four ranks do, for test_communication.py: python -m jobs.launch --nproc-per-node=4 four_ranks.py FOLDER

FOLDER holds the dataset `data`; the runs are written beside it. Four, since a group of two is the smallest that shares tables.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tiny_training import on_each_rank, write_checkpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from two_ranks import stopped, trainer

from features.errors import UserError
from pipeline.training.parallel import placements, replicas
from pipeline.training.parallel.averaging import average_in_one_message
from pipeline.training.trainer import Trainer

PLACEMENTS = {"table_wise": {"default": ["table_wise"]}, "row_wise": {"default": ["row_wise"]}}
MIXED = {"default": ["table_wise"], "item": ["row_wise"]}
FORMATS = ("fp16", "bf16")
LARGE = {"name": "sgd", "lr": 100.0}  # the rounding of a gradient stands out from that of a weight
SGD = {"name": "sgd", "lr": 0.5}
RARELY, STOP, STEPS = 4, 3, 6  # replicas are averaged at step 4, saved at 3 and 6
GROUP = 2
# Adam hides a gradient's scale from the weights, not from its state; what the loss learns is dense, too.
DENSE = {"max_steps": STEPS, "checkpoint_every": STOP, "clip_norm": 0.05, "weighting": {"name": "uncertainty"}}
RUNS = {
    "ddp": DENSE,
    "micro-batches": DENSE | {"accumulate": 3},  # of 8 rows: 3, 3, 2
    "fsdp": DENSE | {"dense_parallel": "fsdp"},
    "fsdp-micro-batches": DENSE | {"dense_parallel": "fsdp", "accumulate": 3},
    "copies": DENSE | {"sharding": {"default": ["data_parallel"]}},
    "whole": {"max_steps": STEPS, "tables": SGD, "sharding": MIXED},
    "replicas": {"max_steps": STEPS, "tables": SGD, "sharding": MIXED, "sharding_group": GROUP},
    "replicas-adagrad": {"max_steps": 1, "sharding": MIXED, "sharding_group": GROUP},
    "replicas-fsdp": {"max_steps": STEPS, "tables": SGD, "sharding_group": GROUP, "dense_parallel": "fsdp"},
}
RESUMED = [("fsdp", "ddp"), ("ddp", "fsdp"), ("ddp", "ddp"), ("copies", "copies"), ("fsdp", "fsdp")]
RARE = {"max_steps": STEPS, "checkpoint_every": STOP, "sharding": MIXED, "sharding_group": GROUP, "sync_every": RARELY}
COLLECTIVES = ("all_to_all_single", "reduce_scatter", "reduce_scatter_tensor", "all_gather", "all_gather_into_tensor")


def keep_states(made: Trainer) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What its rank holds of the tables, before each checkpoint of a trainer is made and after; filled as it trains."""
    states, save = [], made.save

    def watched() -> None:
        before = local(made)
        save()
        states.append((before, local(made)))

    made.save = watched
    return states


def local(made: Trainer) -> dict[str, Tensor]:
    """Copies of this rank's parts of weights and momentum, by table and first row."""
    model = made.learner.model  # the learner's own state averages replicas
    tables = {n: v for n, v in model.state_dict().items() if "embedding_bags." in n}
    tables |= {n: v for states in model.fused_optimizer.state_dict()["state"].values() for n, v in states.items()}
    return {f"{n}/{p.metadata.shard_offsets}": p.tensor.clone() for n, v in tables.items() for p in v.local_shards()}


@contextmanager
def bytes_sent() -> Iterator[list[int]]:
    """Counts what this rank hands to collectives as floating-point numbers."""
    sent = [0]

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = list(signature(original).bind(*args, **kwargs).arguments.values())[1]
            parts = given if isinstance(given, list) else [given]
            sent[0] += sum(p.numel() * p.element_size() for p in parts if p.is_floating_point())
            return original(*args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{name: counted(getattr(dist, name)) for name in COLLECTIVES}):
        yield sent


def formats(folder: Path) -> None:
    """The embeddings of the first batch, and the first step, each with one direction in 16 bits."""
    rank = dist.get_rank()
    for placement, sharding in PLACEMENTS.items():
        for name in ("fp32", *FORMATS):
            made = trainer(folder, f"forward-{placement}-{name}", sharding=sharding, communication={"forward": name})
            batch = next(made.loader.batches(made.state.position))
            with torch.no_grad(), bytes_sent() as sent:
                found = made.learner.ranker.embedded(batch)
            torch.save((batch.row_id_B, found, sent[0]), folder / f"forward-{placement}-{name}.{rank}.pt")
        for name in FORMATS:
            step = {"max_steps": 1, "tables": LARGE, "sharding": sharding, "communication": {"backward": name}}
            trainer(folder, f"backward-{placement}-{name}", **step).run_to_end()


def averages(folder: Path) -> None:
    """The gradients of three equal steps of a replicated model: DDP lays out its messages anew before the third."""
    torch.manual_seed(0)
    replicated = DistributedDataParallel(nn.Sequential(nn.Linear(37, 29), nn.Linear(29, 3)), static_graph=True)
    average_in_one_message(replicated)
    input_BD, found = torch.randn(4, 37, generator=torch.Generator().manual_seed(dist.get_rank())), []
    for _ in range(3):
        replicated.zero_grad()
        replicated(input_BD).square().mean().backward()
        found.append([weight.grad.clone() for weight in replicated.parameters()])
    torch.save((input_BD, replicated.module, found), folder / f"averages.{dist.get_rank()}.pt")


def on_nodes(folder: Path) -> None:
    """Tables on one of two nodes of two ranks each. gloo can do it, though TorchRec offers it on GPUs only."""
    offered = mock.patch.object(EmbeddingBagCollectionSharder, "sharding_types", return_value=["table_row_wise"])
    with offered, mock.patch.object(placements, "check"), mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="2"):
        for name, more in (("on-nodes", {}), ("on-nodes-replicas", {"sharding_group": GROUP})):
            made = trainer(folder, name, max_steps=STEPS, tables=SGD, sharding={"default": ["table_row_wise"]}, **more)
            [placed] = made.learner.model.plan.plan.values()
            found = {table: [sharding.sharding_type, sharding.ranks] for table, sharding in placed.items()}
            (folder / f"{name}.{dist.get_rank()}.json").write_text(json.dumps(found))
            made.run_to_end()


def main(folder: Path) -> None:
    rank = dist.get_rank()
    write_checkpoint(trainer(folder, "start"))
    averages(folder)
    formats(folder)
    on_nodes(folder)
    for name, settings in RUNS.items():
        made = trainer(folder, name, **settings)
        made.run_to_end()
        if name == "fsdp":
            dense = list(made.learner.dense.params.values())
            share = sum(p.to_local().numel() for p in dense if isinstance(p, DTensor)) / sum(p.numel() for p in dense)
            (folder / f"share.{rank}.json").write_text(json.dumps(share))
    dist.barrier()
    for before, after in RESUMED:
        if rank == 0:
            stopped(folder, before, f"{before}-{after}", STOP)
        dist.barrier()
        trainer(folder, f"{before}-{after}", **RUNS[after]).run_to_end()

    with mock.patch.object(replicas, "ShardingEnv2D", wraps=replicas.ShardingEnv2D) as environment:
        rarely = trainer(folder, "replicas-rarely", **RARE)
    given = environment.call_args.kwargs
    groups = [dist.get_process_group_ranks(given[name]) for name in ("sharding_pg", "replica_pg")]
    (folder / f"groups.{rank}.json").write_text(json.dumps([*groups, given["node_group_size"]]))
    states = keep_states(rarely)
    rarely.run_to_end()
    torch.save(states, folder / f"held.{rank}.pt")
    refused = ""
    try:
        trainer(folder, "refused", sharding_group=3)
    except UserError as error:
        refused = str(error)
    (folder / f"refused.{rank}.txt").write_text(refused)


if __name__ == "__main__":
    on_each_rank(main)
