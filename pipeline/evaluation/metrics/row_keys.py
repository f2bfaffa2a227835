"""What evaluation groups the rows of a split by: clusters of intervals, groups of rankings, the slice of each dimension."""

# Shapes: N rows, C keys: cluster, group, then one a dimension.

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa

from features.errors import UserError, did_you_mean, one_line
from features.hashing import hash_integers, hash_strings
from features.keys import cluster_column
from features.schema.kept import kept_column
from features.schema.schema import Split
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.shards import check_ids, open_shard, table_sizes
from pipeline.evaluation.metrics.base import Grouping
from pipeline.evaluation.metrics.kept_rows import bytes_of_row, halvings_of
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.metrics.slices import SliceNumbers, count_values, dimensions

ROW = "row"  # as a cluster: rows are independent
CLUSTER_SEED, SHARE_SEED = 21, 22
MAX_CELLS = 1 << 20  # slices times buckets


class SplitKeys:
    """The keys of the rows of a split, and which of them are scored.

    Args:
        config: slices, cluster and group. dataset, splits: whose rows are counted to find the slices.
        train_rates: see `Grouping`.
    Attributes:
        cluster: the column that rows are put into buckets by, or "row".
    Raises:
        UserError: a column that the dataset does not keep, or a slice that it cannot have.
    """

    def __init__(
        self,
        config: MeasureConfig,
        dataset: Dataset,
        splits: Sequence[Split],
        train_rates: dict[str, float] | None = None,
    ) -> None:
        self.config, self.dataset, self.splits = config, dataset, splits
        self.cluster = self._known("cluster_by", config.cluster_by or cluster_column(dataset.schema) or ROW)
        self.group = self._known("group", config.group or self.cluster)
        self.share_by = self._known("share_by", config.share_by or self.cluster)
        self.dimensions = dimensions(config, dataset)
        self.train_rates = train_rates or {}

    def _known(self, key: str, name: str) -> str:
        if name != ROW and name not in self.dataset.schema.keep:
            raise UserError(
                f"{key}={name}: not a kept column of {self.dataset.path}{did_you_mean(name, self.dataset.schema.keep)}: add it "
                f"to `keep` in the schema and run jobs.preprocess again, or set {key}=row"
            )
        return name

    @cached_property
    def columns(self) -> list[str]:
        """Columns of the dataset that keys are made of."""
        used = [kept_column(name) for name in (self.cluster, self.group, self.share_by) if name != ROW]
        return list(dict.fromkeys((*used, *(column for d in self.dimensions for column in d.columns))))

    @cached_property
    def numbers(self) -> list[SliceNumbers]:
        """The slices of each dimension that has some: reads their columns of the splits once."""
        if not self.dimensions:
            return []
        counts = count_values(self.dimensions, self._tables())
        config = self.config
        found = [
            SliceNumbers(dimension, of_values, config.top, config.min_rows)
            for dimension, of_values in zip(self.dimensions, counts, strict=True)
        ]
        found = [numbers for numbers in found if numbers.names]
        dimension_of: dict[str, str] = {}
        for name, dimension in ((name, numbers.dimension.name) for numbers in found for name in numbers.names):
            if name in dimension_of:
                raise UserError(f"slices: {dimension_of[name]} and {dimension} both have a slice {name}: leave one out")
            dimension_of[name] = dimension
        if (slices := sum(len(numbers.names) for numbers in found)) * config.buckets > MAX_CELLS:
            raise UserError(
                f"slices: {slices:,} slices with {config.buckets:,} buckets each take too much memory, at most "
                f"{MAX_CELLS // config.buckets:,} can be measured: lower top, raise min_rows, or leave some slices out"
            )
        return found

    def _tables(self) -> Iterator[pa.Table]:
        needed = list(dict.fromkeys(column for d in self.dimensions for column in d.columns))
        sizes = {name: size for name, size in table_sizes(self.dataset).items() if name in needed}
        for split in self.splits:
            for shard in self.dataset.shards(split):
                path = self.dataset.path / shard.path
                try:
                    with open_shard(self.dataset, shard, needed) as file:
                        for index in range(file.num_row_groups):
                            table = file.read_row_group(index, needed, use_threads=False)
                            for name, size in sizes.items():
                                check_ids(path, name, table[name].combine_chunks(), size)
                            yield table
                except (pa.ArrowException, OSError, ValueError) as error:
                    raise UserError(
                        f"{path}: cannot be read ({one_line(error)}): the file changed after it was written. Restore it, or "
                        "run jobs.preprocess again."
                    ) from None

    @cached_property
    def grouping(self) -> Grouping:
        """Slices and buckets, for `Metrics`."""
        config = self.config
        return Grouping(
            tuple(numbers.names for numbers in self.numbers),
            config.buckets,
            config.ndcg,
            self.group != ROW,
            self.train_rates,
            self.halvings,
        )

    @cached_property
    def halvings(self) -> int:
        """See `Grouping`: from the rows of all splits, so that each number of ranks keeps the same ones."""
        rows = self.config.share * sum(self.dataset.manifest.rows.get(split, 0) for split in self.splits)
        of_each = bytes_of_row(len(self.dataset.schema.tasks), len(self.dimensions))
        return halvings_of(rows, of_each, self.config.memory * 2**30)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the dimensions that have slices."""
        return tuple(numbers.dimension.name for numbers in self.numbers)

    def of(self, table: pa.Table, row_id_N: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The keys of N rows, int64 (N, C), and which are in the share that is scored; None: all."""
        cluster_N = self._hash(table, self.cluster, row_id_N, CLUSTER_SEED)
        group_N = cluster_N if self.group == self.cluster else self._hash(table, self.group, row_id_N, CLUSTER_SEED)
        key_NC = np.empty((len(row_id_N), 2 + len(self.numbers)), np.int64)
        key_NC[:, 0], key_NC[:, 1] = cluster_N >> np.uint64(32), group_N.view(np.int64)
        for place, numbers in enumerate(self.numbers, 2):
            key_NC[:, place] = numbers.of(table)
        if self.config.share == 1:
            return key_NC, None
        share_N = self._hash(table, self.share_by, row_id_N, SHARE_SEED)
        return key_NC, share_N < np.uint64(min(int(self.config.share * 2**64), 2**64 - 1))

    def _hash(self, table: pa.Table, name: str, row_id_N: np.ndarray, seed: int) -> np.ndarray:
        """64-bit hashes of a kept column, of the row id where it is missing."""
        of_row_N = hash_integers(row_id_N, seed + 100)
        if name == ROW:
            return of_row_N
        values = table[kept_column(name)].combine_chunks()
        if pa.types.is_integer(values.type):
            hashed_N = hash_integers(values.fill_null(0).to_numpy(), seed)
        else:
            texts = (
                values if pa.types.is_dictionary(values.type) else values.cast(pa.large_string()).dictionary_encode()
            )
            of_value_V = hash_strings(texts.dictionary, seed)
            hashed_N = of_value_V[texts.indices.fill_null(0).to_numpy()] if len(of_value_V) else of_row_N
        return np.where(values.is_valid().to_numpy(False), hashed_N, of_row_N)
