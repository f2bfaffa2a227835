"""What an average row costs a rank: ids that are looked up, FLOPs, and activations that are kept for the backward."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from features.batch import Batch, Rows
from features.errors import UserError
from features.fit.encoders import Encoders
from features.schema.schema import Schema
from models.emm import build_ranker
from models.ranker import ModelConfig, Ranker
from models.table_storage import allocate_tables, store_tables
from pipeline.dataset.card.card import read_card
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.model_cost import flop_counter

ROWS = 8  # of the batch whose FLOPs are counted


@dataclass(frozen=True)
class RowLoad:
    """Of an average row.

    Attributes:
        ids: that are looked up, by feature; 1 of one that is not named.
        activations: bytes that the dense part keeps for its backward.
    """

    ids: Mapping[str, float] = field(default_factory=dict)
    activations: float = 0.0

    @classmethod
    def of_training(cls, dataset: Dataset, config: ModelConfig, bf16: bool) -> "RowLoad":
        """Of a dataset's rows, guessed where it has no card; the random state stays as it is."""
        try:
            ids, _ = ids_per_row(dataset.schema, dataset)
        except UserError:
            ids, _ = ids_per_row(dataset.schema, None)
        with torch.random.fork_rng(devices=[]):
            return cls(ids, activation_bytes(dataset.schema, dataset.encoders, config, bf16))


def ids_per_row(schema: Schema, dataset: Dataset | None) -> tuple[dict[str, float], list[str]]:
    """Ids of an average row, by feature: of lists as the dataset counted them, or a guess, with a line that says so.

    Raises:
        UserError: the dataset's card is missing or damaged.
    """
    found = dict.fromkeys(schema.sparse, 1.0)
    if not schema.bag:
        return found, []
    if dataset is None:
        found |= {name: bag.max_length / 2 for name, bag in schema.bag.items()}
        return found, [f"guessed: lists of half their max_length ({', '.join(schema.bag)})"]
    ids = read_card(dataset.encoded_by)["ids"]
    for name, bag in schema.bag.items():
        found[name] = min((ids[name]["length"] or 0) * (1 - (ids[name]["missing"] or 0)), bag.max_length)
    return found, []


def flops_per_row(schema: Schema, encoders: Encoders, config: ModelConfig) -> float:
    """FLOPs of a row's forward and backward, counted on the model itself with tables of one row."""
    ranker, batch = _with_small_tables(schema, encoders, config), _batch(schema, ROWS)
    with flop_counter() as counter:
        ranker.outputs(batch).sum().backward()
    return counter.get_total_flops() / ROWS


def activation_bytes(schema: Schema, encoders: Encoders, config: ModelConfig, bf16: bool) -> float:
    """Bytes that a row's forward keeps for the backward, counted on the model itself with tables of one row.

    What is kept of any number of rows, such as a weight in 16 bits, is not a row's: so it is counted with two numbers of them.
    """
    ranker = _with_small_tables(schema, encoders, config)
    few, more = (_saved(ranker, schema, rows, bf16) for rows in (ROWS, 2 * ROWS))
    return max(more - few, 0) / ROWS


def _saved(ranker: Ranker, schema: Schema, rows: int, bf16: bool) -> int:
    """Bytes of all tensors that autograd saves of a forward, each storage once."""
    sizes: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    batch = _batch(schema, rows)
    with saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out_KBT = ranker.outputs(batch)
    del out_KBT  # until here nothing that was saved is freed, so no storage has the place of another
    return sum(sizes.values())


def _batch(schema: Schema, rows: int) -> Batch:
    """Rows all of whose labels are observed: some models leave the others out (autotask)."""
    blank = Rows.blank(schema, rows)
    blank.label_NT.zero_()
    return blank.batch(schema, rows)


def _with_small_tables(schema: Schema, encoders: Encoders, config: ModelConfig) -> Ranker:
    """The model with tables of one row, in main memory."""
    ranker = build_ranker(schema, encoders, config)
    ranker.managed = None
    store_tables(ranker, "fp32", {table.name: 1 for table in ranker.tables})
    allocate_tables(ranker, torch.device("cpu"))
    return ranker
