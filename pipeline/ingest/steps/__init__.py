"""The steps of the job, one file each: each works on a unit of a raw file, a part of its rows, a bucket, or a shard.

    read             unit    raw text to typed rows in parts on disk; their keys, and outcomes, scattered to buckets
    join             bucket  keys and outcomes of the bucket to joined columns, a batch for each part
    look_up          part or bucket  its lookups in a side table to columns
    scatter_past     part    keys, times and items or numbers of the rows, for each history and counter, scattered by key
    gather_past      bucket  earlier items of each user, or sums over earlier rows of a key, a batch for each part
    write_state      name    of a history or counter: the events of all buckets that rows of a later dataset need
    label            part    typed rows and joined columns to features, labels, split; counted
    merge            counts  those of many parts to one
    encode           part    features to ids and numbers, partitioned by shard
    write            shard   rows in their order as Parquet

Rows stay where they are: only keys travel to the buckets, and joined columns back. A step is given a message and reports
one (see pipeline.ingest.messages).
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from features.errors import UserError, one_line
from pipeline.ingest.files import no_answer
from pipeline.ingest.messages import Failure, ReadReport, Report, Work
from pipeline.ingest.progress import record_done
from pipeline.ingest.state import Job
from pipeline.ingest.steps.encode import encode
from pipeline.ingest.steps.join import join_bucket
from pipeline.ingest.steps.label import label
from pipeline.ingest.steps.look_up import look_up
from pipeline.ingest.steps.merge import merge
from pipeline.ingest.steps.past import gather_past, scatter_past
from pipeline.ingest.steps.past_state import write_state
from pipeline.ingest.steps.read import read
from pipeline.ingest.steps.write import write

STEPS: dict[str, Callable[[Job, Any], Report]] = {
    "read": read, "join": join_bucket, "look_up": look_up, "scatter_past": scatter_past, "gather_past": gather_past,
    "write_state": write_state, "label": label, "merge": merge, "encode": encode, "write": write,
}  # fmt: skip


def run_step(job: Job, step: str, number: int, work: Work) -> Report | Failure:
    """Does one piece of a step's work."""
    return reported(partial(STEPS[step], job, work), job.staging.parent, job.progress, step, number)


def reported(do: Callable[[], Report], out: Path, progress: Path, step: str, number: int) -> Report | Failure:
    """The report of a piece of work; what a user can fix becomes a Failure, which reaches the driver on any runner.

    Args:
        out: what could not be written, for errors. progress: the folder that counts pieces that are done.
    """
    begin, start = time.time(), time.monotonic()
    try:
        report = replace(do(), seconds=time.monotonic() - start)
        record_done(progress, step, number, begin, report.bytes if isinstance(report, ReadReport) else 0)
    except UserError as error:
        return Failure(str(error))
    except OSError as error:
        return Failure(str(no_answer(error) or f"{out}: {one_line(error)}. Nothing was written."))
    return report
