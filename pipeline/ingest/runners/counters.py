"""What the job counts as Beam metrics, for the engine's UI and monitoring; its own totals are those of the manifest.

An engine that runs an element twice may count it twice here, never in the manifest.
"""

from pipeline.ingest.messages import Failure, LabelReport, ReadReport, Report, WriteReport
from pipeline.ingest.runners.beam_compat import beam

NAMESPACE = "taskfuse"


def count(step: str, report: Report | Failure) -> None:
    """Adds a piece of a step's work to the counters, and its time to the step's distribution."""
    for name, amount in amounts(step, report).items():
        beam.metrics.Metrics.counter(NAMESPACE, name).inc(amount)
    if isinstance(report, Report):  # distributions are of integers
        beam.metrics.Metrics.distribution(NAMESPACE, f"milliseconds_{step}").update(round(report.seconds * 1000))


def amounts(step: str, report: Report | Failure) -> dict[str, int]:
    """What one report adds to each counter."""
    if isinstance(report, Failure):
        return {f"failures_{step}": 1}
    found = {f"pieces_{step}": 1}
    if isinstance(report, ReadReport):
        found |= {f"rows_read_{report.stream}": report.read, "bytes_read": report.bytes}
    if isinstance(report, ReadReport | LabelReport):
        found["dead_letters"] = sum(report.dead_letters.reasons.values())
    if isinstance(report, WriteReport):
        found[f"rows_written_{report.shard.split}"] = report.shard.rows
    return found
