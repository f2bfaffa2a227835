"""Step `encode`: features to ids and numbers, partitioned by the slices of shards."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.fit.split_counts import FeatureCounts, count_features
from features.hashing import hash_integers, hash_range_of
from features.parse.raw import SPLIT
from features.schema.schema import SPLITS, Split
from pipeline.ingest import shuffle
from pipeline.ingest.messages import EncodedBatch, EncodeReport, EncodeWork
from pipeline.ingest.state import Job


def encode(job: Job, work: EncodeWork) -> EncodeReport:
    """Encodes a part and partitions its rows."""
    rows = shuffle.read(work.path)
    tables, batches = [], []
    counts: dict[Split, dict[str, FeatureCounts]] = {}
    for split in SPLITS:
        mine = rows_of_split(rows, split)
        encoded = job.encoders.encode(mine)
        if mine.num_rows and job.counts_split(split):
            counts[split] = count_features(job.encoders, mine, encoded)
        slices = work.slices[split]
        slice_B = _slice_of(job, encoded, slices, work.bounds.get(split, []))
        for number, table in enumerate(shuffle.partition(encoded, slice_B, slices)):
            tables.append(table)
            batches.append(EncodedBatch(split, number, table.num_rows))
    return EncodeReport(shuffle.write(job.temporary_path("encoded"), tables), batches, counts=counts)


def rows_of_split(rows: pa.Table, split: Split) -> pa.Table:
    """The rows of a labelled part that belong to a split."""
    mine = pc.equal(rows[SPLIT], SPLITS.index(split))
    return rows if pc.all(mine, min_count=0).as_py() else rows.filter(mine)


def _slice_of(job: Job, rows: pa.Table, slices: int, bounds: list[int]) -> np.ndarray:
    if job.order == "time":
        return np.searchsorted(np.array(bounds), rows["event_time"].to_numpy(), side="right")
    return hash_range_of(hash_integers(rows["row_id"].to_numpy(), job.seed), slices)
