"""Step `merge`: the counts of many parts to one."""

import pickle

from features.fit.statistics import Statistics
from pipeline.ingest.messages import MergeReport, MergeWork
from pipeline.ingest.state import Job
from pipeline.storage.store_path import place


def merge(job: Job, work: MergeWork) -> MergeReport:
    """Merges counts in the order of their parts."""
    path = job.temporary_path("merged")
    path.write_bytes(pickle.dumps(merged(work.paths)))
    return MergeReport(str(path))


def merged(paths: list[str]) -> Statistics:
    """The sum of counts in files."""
    return Statistics().merge(*(pickle.loads(place(path).read_bytes()) for path in paths))
