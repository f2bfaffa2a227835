"""A split read once in the order of the dataset, each row group by one rank: for evaluation, which needs no shuffle."""

from collections.abc import Iterator

from features.batch import Batch, Rows
from features.schema.schema import Split
from pipeline.dataset.background import in_background
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader, RowKeys
from pipeline.dataset.shards import table_sizes


class SplitReader:
    """Batches of a split.

    Args:
        batch_size: rows of each rank's batch; the last one is padded.
        rank, ranks: which row groups are ours, each `ranks`-th. keys: see `Loader`; rows that it does not take are left out.
        ahead: batches decoded in advance.
    Raises:
        UserError: an empty split.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        keys: RowKeys | None = None,
        ahead: int = 4,
    ) -> None:
        self.loader = Loader(dataset, split, batch_size, table_sizes=table_sizes(dataset), keys=keys)
        self.batch_size, self.ahead = batch_size, ahead
        self.groups = range(rank, len(self.loader.groups), ranks)

    def batches(self) -> Iterator[Batch]:
        """This rank's batches, decoded ahead in a thread. Raises UserError for a shard that cannot be read."""
        return in_background(self._batches(), self.ahead)

    def empty(self) -> Batch:
        """A batch of padding alone, for a rank that has no rows left while others have."""
        return self.loader.decode(0).slice(0, 0).batch(self.loader.schema, self.batch_size)

    def _batches(self) -> Iterator[Batch]:
        waiting: list[Rows] = []
        count = 0
        for rows in self._rows():
            waiting.append(rows)
            count += len(rows)
            if count >= self.batch_size:
                rows = Rows.concat(waiting)
                whole = count - count % self.batch_size
                for start in range(0, whole, self.batch_size):
                    yield rows.slice(start, start + self.batch_size).batch(self.loader.schema, self.batch_size)
                waiting, count = [rows.slice(whole, count)], count - whole
        if count:
            yield Rows.concat(waiting).batch(self.loader.schema, self.batch_size)

    def _rows(self) -> Iterator[Rows]:
        """Of each of this rank's row groups."""
        with self.loader.reading_ahead(iter(self.groups)) as ahead:
            for group in self.groups:
                yield self.loader.decode(group, ahead)
