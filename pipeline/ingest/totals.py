"""What a job adds up at its end: where rows, lines and outcomes went, dead letters, statistics of each split."""

import dataclasses
import json
from collections import Counter
from typing import Any

from features.fit.split_counts import FeatureCounts, summed
from features.printable import printable
from features.schema.schema import Split
from pipeline.dataset.card.card import with_splits
from pipeline.dataset.entries import DeadLetterExample, DeadLetterFile, Lines
from pipeline.dataset.manifest import sum_types
from pipeline.ingest import schedule
from pipeline.ingest.absent_columns import absent_rows
from pipeline.ingest.formats.base import LineCounts
from pipeline.ingest.messages import EncodeReport, JoinReport, LabelledPart, ReadReport, WriteReport
from pipeline.ingest.schedule import Limits
from pipeline.ingest.state import Job
from pipeline.ingest.steps import dead_letters
from pipeline.ingest.steps.look_up import side_table_counts
from pipeline.storage.files import write_json


def of_job(job: Job, limits: Limits) -> dict[str, Any]:
    """What a manifest says of raw rows, by its field (see Manifest); writes the dead letters."""
    reads, parts = job.found(ReadReport), job.labelled()
    join_statuses = {name: Counter[str]() for name in job.schema.source.outcomes}
    for joined in job.found(JoinReport):
        for name, found in joined.join_statuses.items():
            join_statuses[name].update(found)
    read: Counter[str] = Counter()
    for report in reads:
        read[report.stream] += report.read
    left_out: Counter[str] = sum((Counter(part.left_out) for part in parts), Counter())
    reasons: Counter[str] = Counter()
    for _, spilled in schedule.dead_letters_of(job):
        reasons.update(spilled.reasons)
    return {
        "read": dict(read), "left_out": dict(left_out), "outcomes": {n: dict(f) for n, f in join_statuses.items()},
        "lines": _lines(reads), "dead_letters": dict(reasons), "dead_letter_files": _write_dead_letters(job, reads),
        "complete_until": schedule.complete_until(job, limits), "absent_columns": absent_rows(reads),
        "types": sum_types({report.stream: report.types} for report in reads), "side_tables": side_table_counts(job),
        "absent_days": job.absent.days, "undecided": _undecided(parts),
        "dead_letter_examples": _examples(job, reads, reasons),
    }  # fmt: skip


def add_splits(job: Job) -> None:
    """Adds what was counted of encoded rows to the card, which was written before they were encoded."""
    parts: dict[Split, list[dict[str, FeatureCounts]]] = {}
    for encoded in job.found(EncodeReport):
        for split, counts in encoded.counts.items():
            parts.setdefault(split, []).append(counts)
    for written in job.found(WriteReport):
        if written.counts:
            parts.setdefault(written.shard.split, []).append(written.counts)
    path = job.staging / "statistics.json"
    write_json(
        path, with_splits(json.loads(path.read_text()), {split: summed(found) for split, found in parts.items()})
    )


def _undecided(parts: list[LabelledPart]) -> dict[str, dict[str, int]]:
    """Per outcome the impressions that are undecided, by cause."""
    found: dict[str, Counter[str]] = {}
    for part in parts:
        for name, causes in part.undecided.items():
            found.setdefault(name, Counter()).update(causes)
    return {name: dict(causes) for name, causes in found.items()}


def _examples(job: Job, reads: list[ReadReport], reasons: Counter[str]) -> dict[str, DeadLetterExample]:
    """The first bad row of each of the most frequent reasons."""
    first: dict[str, tuple[int, int, str]] = {}
    for unit, spilled in schedule.dead_letters_of(job):
        for kind, (line, reason) in spilled.examples.items():
            first[kind] = min(first.get(kind, (unit, line, reason)), (unit, line, reason))
    before, found = schedule.lines_before(reads), {}
    for kind, _ in reasons.most_common(dead_letters.EXAMPLES):
        if kind in first:
            unit, line, reason = first[kind]
            # A name may hold bytes that are no text, which JSON does not have.
            file = printable(reads[unit].file)
            found[kind] = DeadLetterExample(file=file, line=line + before[unit], reason=reason)
    return found


def _lines(reads: list[ReadReport]) -> dict[str, Lines]:
    """Where the lines of each stream of text files went."""
    totals: dict[str, LineCounts] = {}
    for report in reads:
        totals[report.stream] = totals.get(report.stream, LineCounts()) + report.counts
    return {stream: Lines(**dataclasses.asdict(counts)) for stream, counts in totals.items() if counts.physical}


def _write_dead_letters(job: Job, reads: list[ReadReport]) -> list[DeadLetterFile]:
    """A file for each raw file that has dead letters."""
    before = schedule.lines_before(reads)
    by_file: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for unit, spilled in schedule.dead_letters_of(job):
        by_file.setdefault((reads[unit].stream, reads[unit].file), []).append((str(spilled.path), before[unit]))
    return [
        dead_letters.write_file(job.staging, f"{stream}-{index:05d}", stream, file, found)
        for index, ((stream, file), found) in enumerate(by_file.items())
    ]
