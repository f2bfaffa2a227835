"""How long a training step takes: what each rank computes, reads and sends, over what its hardware sustains.

Pure functions of counts, without a model or a process group. Bytes sent are those of the collectives that TorchRec and DDP
call, without the headers of a network; tests/training/test_wire.py compares them with the counters of real links. FSDP
gathers weights and scatters gradients, which is as much as DDP's all-reduce.
"""

# Shapes: R ranks (senders first, then receivers), S ranks of a group that shares the tables, N nodes.

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.training.parallel.hardware import Kind, Link

Bytes = NDArray[np.float64]
LENGTH, FLOAT = 4, 4  # bytes of the length of a list, and of a number in fp32
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once
BACKWARD = 2 / 3  # of the FLOPs of a step: a product's gradient is two products
ADAM = 7 * FLOAT  # bytes per dense parameter: weight, gradient and two moments read, all but the gradient written
REDUCED = ("row_wise", "table_row_wise")  # whose pooled embeddings are sums over ranks


@dataclass(frozen=True)
class Table:
    """What looks a table up.

    Attributes:
        rows, dim: of the table. features: that look it up. ids: of an average row, over all of them.
        pooled: whether the ids of a feature are summed before they are sent.
        state: bytes of the optimiser's state per row. number: bytes of a weight.
    """

    rows: int
    dim: int
    features: int
    ids: float
    pooled: bool = True
    state: int = FLOAT
    number: int = FLOAT


@dataclass(frozen=True)
class Part:
    """The rows and columns of a table that one rank of a group holds."""

    table: Table
    placement: str
    rank: int
    rows: int
    columns: int

    @property
    def ids(self) -> float:
        """Those of an average row that it holds, if all rows of the table are looked up alike."""
        return self.table.ids * self.rows / self.table.rows

    @property
    def state(self) -> float:
        """Bytes of the optimiser's state per row of this part."""
        return self.table.state * self.columns / self.table.dim


@dataclass(frozen=True)
class Step:
    """A step on a number of ranks.

    Attributes:
        ranks, ranks_per_node, group: all, those of a node, and those that share one replica of the tables.
        rows: of a rank's batch.
        parts: of the tables, on the ranks of one group. A data_parallel table has one on each.
        flops: of a row, forward and backward. dense: parameters outside of the tables.
        id_bytes: of an id (features.batch.id_type).
        forward, backward: bytes of a number of an embedding, and of its gradient, between ranks.
        sync_every: steps between averages over the groups.
        precision: of the dense part. pipelined: whether ids are exchanged while the batch before is trained on.
        gloo: on CPUs, where gloo makes a reduce-scatter of an all-reduce.
    """

    ranks: int
    ranks_per_node: int
    group: int
    rows: int
    parts: Sequence[Part]
    flops: float
    dense: int
    id_bytes: int = 4
    forward: int = FLOAT
    backward: int = FLOAT
    sync_every: int = 1
    precision: str = "fp32"
    pipelined: bool = True
    gloo: bool = False


@dataclass(frozen=True)
class Traffic:
    """What ranks send each other in a step.

    Attributes:
        sent_RR: bytes from each rank to each; nothing to itself.
        messages: collectives, one after the other.
    """

    sent_RR: Bytes
    messages: float

    def between_nodes(self, ranks_per_node: int) -> Bytes:
        """Bytes that each node sends to others and receives from them: (2, N)."""
        nodes = -(-len(self.sent_RR) // ranks_per_node)
        sent_NN = self.sent_RR.reshape(nodes, -1, nodes, len(self.sent_RR) // nodes).sum((1, 3))
        np.fill_diagonal(sent_NN, 0)
        return np.stack([sent_NN.sum(1), sent_NN.sum(0)])

    def seconds(self, ranks_per_node: int, kind: Kind, link: Link) -> float:
        """Until the slowest link is done; those within nodes and between them work at the same time."""
        ranks = len(self.sent_RR)
        if ranks == 1:
            return 0.0
        node_R = np.arange(ranks) // ranks_per_node
        within_RR = self.sent_RR * (node_R[:, None] == node_R)
        within = max(within_RR.sum(1).max(), within_RR.sum(0).max()) / (kind.link * kind.link_share)
        between = self.between_nodes(ranks_per_node).max() / (link.rate * link.share)
        latency = link.latency if ranks > ranks_per_node else link.node_latency
        return float(max(within, between)) + self.messages * math.ceil(math.log2(ranks)) * latency


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what it waits for: they add up to it. hidden: of communication that compute covers."""

    compute: float
    tables: float
    exchange: float
    all_reduce: float
    hidden: float

    @property
    def total(self) -> float:
        """Of the whole step."""
        return self.compute + self.tables + self.exchange + self.all_reduce


def step_time(step: Step, kind: Kind, link: Link) -> StepTime:
    """The time of a step, under these assumptions.

    Dense part, tables and exchanges follow each other. If `pipelined`, ids travel while the batch before is trained on. Of
    the gradients of the dense part all but DDP's last bucket travel during the dense backward, but for those that gloo adds up
    in the order of ranks (pipeline.training.parallel.averaging): training waits for them.
    """
    bandwidth = kind.memory_bandwidth * kind.bandwidth_share
    products = step.rows * step.flops / (kind.flops[step.precision] * kind.flops_share)
    compute = max(products, kind.host) + step.dense * ADAM / bandwidth
    tables = table_bytes(step) / bandwidth
    seconds = {name: sent.seconds(step.ranks_per_node, kind, link) for name, sent in traffic(step).items()}
    ids = max(0.0, seconds["ids"] - compute - tables) if step.pipelined else seconds["ids"]
    last = seconds["dense"] * min(1.0, BUCKET / max(step.dense * FLOAT, 1))
    dense = seconds["dense"] if step.gloo and step.ranks > 2 else max(last, seconds["dense"] - BACKWARD * products)
    exchange, all_reduce = ids + seconds["forward"] + seconds["backward"], dense + seconds["tables"]
    return StepTime(compute, tables, exchange, all_reduce, sum(seconds.values()) - exchange - all_reduce)


def table_bytes(step: Step) -> float:
    """Bytes that the busiest rank reads and writes in tables and their optimiser's state.

    Of each id its row is read, its gradient read, and row and state are read and written once. Ids that a batch has twice count
    twice, which is too much where few are frequent. A data_parallel table has a gradient, and is updated, as a whole.
    """
    found = np.zeros(step.group)
    for part in step.parts:
        weights, gradient = part.columns * part.table.number, part.columns * FLOAT
        if part.placement == "data_parallel":
            found[part.rank] += step.rows * part.ids * 3 * weights + part.rows * (4 * weights + 2 * part.state)
        else:
            found[part.rank] += step.group * step.rows * part.ids * (3 * weights + gradient + 2 * part.state)
    return float(found.max(initial=0))


def traffic(step: Step) -> dict[str, Traffic]:
    """What a step sends: ids; embeddings forward, their gradients backward; copies of tables; dense gradients."""
    sharded = [part for part in step.parts if part.placement != "data_parallel"]
    ids_SS, replicas = np.zeros((step.group, step.group)), step.ranks // step.group
    for part in sharded:
        ids_SS[:, part.rank] += step.rows * (LENGTH * part.table.features + step.id_bytes * part.ids)
    kinds = len({(part.placement, part.table.pooled) for part in sharded})
    found = {
        "ids": Traffic(_everywhere(ids_SS, replicas), 3 * len({part.table.pooled for part in sharded})),
        "forward": Traffic(_everywhere(_embeddings(step, step.forward, True), replicas), kinds),
        "backward": Traffic(_everywhere(_embeddings(step, step.backward, False), replicas), kinds),
        "tables": _copies(step),
        "dense": Traffic(ring(step.ranks, 2 * step.dense * FLOAT), math.ceil(step.dense * FLOAT / BUCKET)),
    }
    for sent in found.values():
        np.fill_diagonal(sent.sent_RR, 0)
    return found


def ring(ranks: int, size: float) -> Bytes:
    """A collective in which each rank sends (ranks - 1) / ranks of `size` bytes to the next: an all-gather or reduce-scatter.

    An all-reduce is one of each. Patarasuk and Yuan 2009, bandwidth optimal all-reduce algorithms.
    """
    sent_RR = np.zeros((ranks, ranks))
    sent_RR[np.arange(ranks), (np.arange(ranks) + 1) % ranks] = size * (ranks - 1) / ranks
    return sent_RR


def _embeddings(step: Step, number: int, forward: bool) -> Bytes:
    """What the ranks of a group send of embeddings to the rows' ranks, or of gradients back: all-to-alls and rings.

    Args:
        number: bytes of a number.
    """
    sent_SS, group = np.zeros((step.group, step.group)), step.group
    parts = [part for part in step.parts if part.placement != "data_parallel"]
    for part in parts:
        if part.table.pooled and part.placement in REDUCED:
            continue
        vectors = part.table.features if part.table.pooled else part.ids
        size = step.rows * vectors * part.columns * number
        if forward:
            sent_SS[part.rank] += size
        else:
            sent_SS[:, part.rank] += size
    for table, ranks in _reduced(parts):
        output = step.rows * table.features * table.dim * number  # of one rank's rows
        factor = 2 if forward and step.gloo else 1
        sent_SS[np.ix_(ranks, ranks)] += factor * ring(len(ranks), group * output)
        for rank in (
            ranks if len(ranks) < group else []
        ):  # table_row_wise: to the ranks of the same place on other nodes
            others = np.arange(rank % len(ranks), group, len(ranks))
            if forward:
                sent_SS[rank, others] += output
            else:
                sent_SS[others, rank] += output
    return sent_SS


def _reduced(parts: Sequence[Part]) -> list[tuple[Table, list[int]]]:
    """The tables whose pooled embeddings are summed over ranks, each with these ranks."""
    found: dict[int, tuple[Table, list[int]]] = {}
    for part in parts:
        if part.table.pooled and part.placement in REDUCED:
            found.setdefault(id(part.table), (part.table, []))[1].append(part.rank)
    return [(table, sorted(ranks)) for table, ranks in found.values()]


def _copies(step: Step) -> Traffic:
    """All-reduces of data_parallel tables' gradients, and averages of weights and state over the groups."""
    replicas, sent_RR, messages = step.ranks // step.group, np.zeros((step.ranks, step.ranks)), 0.0
    for rank in range(step.group):
        copied = [part for part in step.parts if part.rank == rank]
        gradients = sum(p.rows * p.columns * FLOAT for p in copied if p.placement == "data_parallel")
        if rank == 0 and gradients:
            sent_RR += ring(step.ranks, 2 * gradients)
            messages += math.ceil(gradients / BUCKET)
        if replicas > 1:
            size = sum(p.rows * (p.columns * FLOAT + p.state) for p in copied) / step.sync_every
            same = np.arange(rank, step.ranks, step.group)
            sent_RR[np.ix_(same, same)] += ring(replicas, 2 * size)
            messages = max(messages, 2 * len(copied) / step.sync_every)
    return Traffic(sent_RR, messages)


def _everywhere(sent_SS: Bytes, replicas: int) -> Bytes:
    """The same in each group of consecutive ranks."""
    return np.asarray(np.kron(np.eye(replicas), sent_SS), np.float64)
