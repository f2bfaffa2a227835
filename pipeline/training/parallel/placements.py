"""Which placements and kernels each table may have: what a configuration allows, less what would fail or change results."""

import math
from collections.abc import Mapping, Sequence

from torch import nn
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheParams, ModuleSharder
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from features.errors import UserError
from models.table_storage import FORMATS
from pipeline.training.config import Choice, Settings
from pipeline.training.optim.table_optimizers import TABLE_OPTIMIZERS, which
from pipeline.training.parallel.cache import LEAST

PLACEMENTS = ("table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel")
KERNELS = ("fused", "fused_uvm_caching")
MIN_COLUMNS = 32  # of a column-wise shard, though a narrow table may be halved


def offered(module: nn.Module, sharders: Mapping[type, ModuleSharder], device: str) -> dict[str, set[str]]:
    """Of each table in `module`, the placements that its sharder has."""
    if sharder := sharders.get(type(module)):
        return {name: set(sharder.sharding_types(device)) for name in sharder.shardable_parameters(module)}
    children = [offered(child, sharders, device) for child in module.children()]
    return {name: types for child in children for name, types in child.items()}


def default(device: str, group: int, ranks_per_node: int) -> list[str]:
    """The placements of tables for which none are set, on groups of ranks that share the tables.

    On several nodes a sum over all ranks, as row_wise has it, costs the network as much as each node's own tables do together.
    """
    several = device == "cuda" and group > ranks_per_node and group % ranks_per_node == 0
    return ["table_wise", "row_wise", *(["table_row_wise"] if several else [])]


def check(settings: Settings, possible: Mapping[str, set[str]], device: str, otherwise: Sequence[str]) -> None:
    """Checks that tables can be trained as configured.

    Args:
        possible: of each table, the placements that its module has on `device`.
        otherwise: the placements where none are set.
    Raises:
        UserError: naming the setting and the reason.
    """
    chosen: Mapping[str, Choice | None]
    for key, chosen, known in (("sharding", settings.sharding, PLACEMENTS), ("kernels", settings.kernels, KERNELS)):
        for table, values in chosen.items():
            if values is None:
                continue
            if table != "default" and table not in possible:
                raise UserError(f"train.{key}.{table}: no such table; the tables are {', '.join(sorted(possible))}")
            if wrong := sorted(set(values) - set(known)):
                raise UserError(f"train.{key}.{table}: {wrong[0]} is not allowed; choose from {', '.join(known)}")
    for table, placements in settings.sharding.items():
        if placements is not None and (reason := _refusal(placements, settings, device)):
            raise UserError(f"train.sharding.{table}: {reason}")
    if device == "cpu" and not TABLE_OPTIMIZERS[settings.tables.name].cpu:
        raise UserError(
            f"train.tables.name={settings.tables.name}: FBGEMM has no CPU kernel for it. Use {which(lambda o: o.cpu)} here."
        )
    if reason := _format_refusal(settings, device):
        raise UserError(f"train.tables.{reason}")
    for table, kernels in settings.kernels.items():
        if "fused_uvm_caching" in kernels and device == "cpu":
            raise UserError(
                f"train.kernels.{table}: fused_uvm_caching keeps a table in main memory and caches its rows on a GPU; on a CPU "
                "all tables are in main memory. Use fused."
            )
        if table != "default" and set(_allowed(settings.sharding, table, otherwise)) == {"data_parallel"}:
            raise UserError(f"train.kernels.{table}: a data_parallel table has a kernel of its own. Remove this entry.")
    for table, types in possible.items():
        if not types & set(placements := _allowed(settings.sharding, table, otherwise)):
            raise UserError(
                f"train.sharding: table {table} cannot be {' or '.join(placements)} on {device}, only "
                f"{', '.join(sorted(types & set(PLACEMENTS)))}. Set +train.sharding.{table}=[...]"
            )


def check_groups(settings: Settings, group: int, ranks_per_node: int) -> None:
    """Checks that groups of ranks that share the tables are whole nodes where one of them may lie on one node.

    Raises:
        UserError: table_row_wise in groups that are parts of nodes, or begin or end in the middle of one.
    """
    wanted = [table for table, allowed in settings.sharding.items() if "table_row_wise" in (allowed or ())]
    if wanted and group % ranks_per_node:
        raise UserError(
            f"train.sharding.{wanted[0]}: table_row_wise shards a table over the ranks of one node, and groups of {group} "
            f"ranks (train.sharding_group) are no whole nodes of {ranks_per_node}. Use row_wise, or a multiple of that."
        )


def _format_refusal(settings: Settings, device: str) -> str | None:
    """The setting of the tables' number format that cannot be trained here, and why; None if there is none."""
    tables = settings.tables
    if tables.precision == "bf16":
        return "precision=bf16: FBGEMM's kernels train tables in fp32 and fp16 only. Use fp16."
    if tables.precision == "fp16" and settings.sharding_group:
        return (
            "precision=fp16: sharding_group averages replicas, and a rounded average loses what they learnt. Use fp32, or "
            "leave sharding_group out."
        )
    if tables.precision == "fp16" and tables.rounding == "stochastic" and device == "cpu":
        return "rounding=stochastic: FBGEMM's CPU kernels round to the nearest. Use train.tables.rounding=nearest here."
    return None


def _refusal(placements: Sequence[str], settings: Settings, device: str) -> str | None:
    """Why one of the placements would change results, lose state or fail; None if none would."""
    name, optimizer = settings.tables.name, TABLE_OPTIMIZERS[settings.tables.name]
    if "column_wise" in placements and not optimizer.splits_columns:
        others = which(lambda o: o.splits_columns and (o.cpu or device != "cpu"))
        return (
            f"column_wise with {name} keeps one momentum per column shard, so the result would depend on the plan. "
            f"Use table_wise and row_wise, or train.tables.name={others}."
        )
    if "data_parallel" in placements and settings.sharding_group:
        return (
            "a data_parallel table is averaged within a sharding_group only, so its replicas would diverge. Use table_wise and "
            "row_wise."
        )
    if "data_parallel" in placements and settings.tables.precision != "fp32":
        return (
            f"gradients of data_parallel tables would be averaged in {settings.tables.precision}, where small ones are 0, and "
            "their updates rounded to the nearest. Use table_wise and row_wise, or train.tables.precision=fp32."
        )
    if "data_parallel" in placements and optimizer.change is None:
        return (
            f"fused {name} moves the rows of a batch only, and the gradient of a data_parallel table does not tell which these "
            f"are, so the result would depend on the plan. Use table_wise and row_wise, or train.tables.name="
            f"{which(lambda o: o.change is not None)}."
        )
    if "table_row_wise" in placements and device == "cpu":
        return "table_row_wise has no CPU kernel. Use table_wise or row_wise."
    return None


def constraints(
    tables: Sequence[BaseEmbeddingConfig],
    settings: Settings,
    ranks: int,
    ranks_per_node: int,
    otherwise: Sequence[str],
    ids: Mapping[str, float],
) -> dict[str, ParameterConstraints]:
    """The choices that the planner has for each table, on `ranks` ranks that share one replica of all.

    Args:
        otherwise: the placements where none are set. ids: of an average row by feature, 1 of those that are not there.
    Raises:
        UserError: a table whose own entry allows nothing but shards without rows.
    """
    sizes = {table.name: _table_bytes(table, settings) for table in tables}
    share = sum(sizes.values()) / ranks
    found = {}
    for table in tables:
        dim = table.embedding_dim
        found[table.name] = ParameterConstraints(
            sharding_types=_placements(table, settings, ranks, ranks_per_node, sizes[table.name] > share, otherwise),
            compute_kernels=[*_allowed(settings.kernels, table.name, ["fused"]), "dense"],  # that of data_parallel
            min_partition=max(dim // ranks, min(MIN_COLUMNS, dim // 2), 1),
            cache_params=CacheParams(load_factor=LEAST),  # until what is left for more is known
            pooling_factors=[ids.get(feature, 1.0) for feature in table.feature_names],
        )
    return found


def _placements(
    table: BaseEmbeddingConfig,
    settings: Settings,
    ranks: int,
    ranks_per_node: int,
    large: bool,
    otherwise: Sequence[str],
) -> list[str]:
    """The placements of one table: as configured, but without shards that have no rows, on which FBGEMM's look-up fails.

    A table with too few rows is placed whole. A large one is not if its rows can be sharded, so that no rank has far more bytes
    than the others.

    Args:
        large: whether it has more bytes than a rank's share of all tables.
    """
    if ranks == 1:  # all placements are the same, and table-wise is the cheapest
        return ["table_wise"]
    allowed = _allowed(settings.sharding, table.name, otherwise)
    parts = {"row_wise": ranks, "table_row_wise": ranks_per_node}
    full = [p for p in allowed if p not in parts or all_shards_have_rows(table.num_embeddings, parts[p])]
    if not full and settings.sharding.get(table.name):
        raise UserError(
            f"train.sharding.{table.name}: {table.num_embeddings} rows are too few for {allowed[0]}, since one of "
            f"{parts[allowed[0]]} ranks would have none. Add table_wise, or remove this entry."
        )
    if large and "row_wise" in full:
        return [p for p in full if p != "table_wise"]
    return full or ["table_wise"]


def all_shards_have_rows(rows: int, shards: int) -> bool:
    """Whether each of a table's row-wise shards has a row. TorchRec gives all but the last ones ceil(rows / shards)."""
    return math.ceil(rows / shards) * (shards - 1) < rows


def _table_bytes(table: BaseEmbeddingConfig, settings: Settings) -> int:
    rows, columns = table.num_embeddings, table.embedding_dim
    number = FORMATS[settings.tables.precision][1].itemsize
    return number * rows * columns + TABLE_OPTIMIZERS[settings.tables.name].state_bytes(rows, columns)


def _allowed(settings: Mapping[str, Choice | None], table: str, otherwise: Sequence[str]) -> list[str]:
    """What a setting allows to a table: its own entry, or the default."""
    return list(settings.get(table) or settings.get("default") or otherwise)
