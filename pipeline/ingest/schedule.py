"""From the reports of a step to the work of the next one. Runs on a worker, once between two steps."""

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from features.errors import UserError, one_line
from features.fit import reuse
from features.fit.encoders import Encoders
from features.schema.schema import SPLITS, Split
from pipeline.dataset.card.card import card, read_card
from pipeline.dataset.dataset import Dataset, shard_path
from pipeline.ingest import shuffle
from pipeline.ingest.absent_columns import check_keys
from pipeline.ingest.bad_rows import too_many_message
from pipeline.ingest.empty_split import empty_split
from pipeline.ingest.files import no_answer
from pipeline.ingest.join_check import check_joined, check_looked_up
from pipeline.ingest.messages import (
    DeadLetters,
    EncodeReport,
    EncodeWork,
    Failure,
    GatherPastWork,
    JoinReport,
    JoinWork,
    LabelReport,
    LookUpWork,
    MergeReport,
    MergeWork,
    PartWork,
    Piece,
    ReadReport,
    Report,
    ScatterPastReport,
    Work,
    WriteStateWork,
    WriteWork,
    to_json,
)
from pipeline.ingest.past_end import check_overlap, horizon
from pipeline.ingest.progress import record_total
from pipeline.ingest.state import IMPRESSIONS, RESERVE_FILE, Job
from pipeline.ingest.steps.dead_letters import implausible_times
from pipeline.ingest.steps.merge import merged
from pipeline.storage.files import write_json
from pipeline.storage.store_path import on_store, place

CONSUMED = {
    "write_state": ("later",),
    "label": ("typed", "scattered", "gathered"),
    "encode": ("features",),
}  # files that no later step reads
SLICES = 4  # of a shard, one of which is in memory while its rows are sorted


@dataclass(frozen=True)
class Limits:
    """When to stop, and how large shards are.

    Attributes:
        needs_splits: whether a split of the schema without rows stops the job.
        as_of: seconds since 1970 until when an outcome is complete, by outcome, where that is known before it is read.
        reference: the dataset whose encoders are used.
        fits: whether encoders are fitted: there is no reference, or the schema has features that it has not.
        min_joined: share of an outcome's rows that must be joined (see pipeline.ingest.join_check).
        whole_log: whether all rows of outcomes should belong to the impressions that are read.
    """

    max_bad_fraction: float
    rows_per_shard: int
    needs_splits: bool
    as_of: dict[str, int]
    reference: str | None
    fits: bool
    min_joined: float = 0.0
    whole_log: bool = True


def steps_of(job: Job) -> list[str]:
    """The steps that a job needs, in order."""
    joins, past = bool(job.schema.source.outcomes), bool(job.schema.past)
    needs = {
        "read": True, "join": joins, "look_up": bool(job.schema.source.tables), "scatter_past": past, "gather_past": past,
        "write_state": job.keeps_state, "label": job.joins, "merge": True, "encode": job.order != "input", "write": True,
    }  # fmt: skip
    return [step for step, needed in needs.items() if needed]


def after(
    reports: list[tuple[int, Report | Failure]], job: Job, limits: Limits, step: str
) -> Iterator[tuple[int, Work]]:
    """Writes the numbered reports of a step and yields the numbered work of the next one; nothing where a step has failed.

    Then error.json in the scratch folder has the message.
    """
    if not reports:
        return
    following = dict(zip(steps_of(job), steps_of(job)[1:], strict=False)).get(step)
    try:
        done = []
        for _, report in sorted(reports, key=lambda numbered: numbered[0]):
            if isinstance(report, Failure):
                raise UserError(report.error)
            done.append(report)
        write_json(job.scratch / f"{step}.json", to_json(done))
        if step == "join":
            check_joined(job, limits.min_joined, limits.whole_log, limits.max_bad_fraction)
        if step == "look_up":
            check_looked_up(job, limits.min_joined, limits.whole_log, limits.max_bad_fraction)
        work = list(PLANS[following](job, limits)) if following else []
        for name in CONSUMED.get(step, ()):
            shuffle.remove(list(job.scratch.glob(f"{name}-*")))
        if following:
            record_total(job.progress, following, len(work))
    except (UserError, OSError) as error:
        _record_failure(job, error)
        return
    yield from enumerate(work)


def _record_failure(job: Job, error: UserError | OSError) -> None:
    """Leaves the message for the driver; where that cannot be written, the driver misses the report of the last step."""
    known = error if isinstance(error, UserError) else no_answer(error)
    with suppress(OSError):
        if not on_store(job.scratch):
            (job.scratch / RESERVE_FILE).unlink(missing_ok=True)  # room for the message where the disk is full
        write_json(job.scratch / "error.json", str(known or f"{job.staging.parent}: {one_line(error)}"))


def lines_before(reads: list[ReadReport]) -> list[int]:
    """Per unit the lines of its file in the units before it; a file may belong to several streams."""
    seen: Counter[tuple[str, str]] = Counter()
    before = []
    for report in reads:
        file = report.stream, report.file
        before.append(seen[file])
        seen[file] += report.lines
    return before


def dead_letters_of(job: Job) -> list[tuple[int, DeadLetters]]:
    """The spilled dead letters of all steps, each with the number of its unit."""
    found = [(number, report.dead_letters) for number, report in enumerate(job.found(ReadReport))]
    found += [(report.part.unit, report.dead_letters) for report in job.found(LabelReport)]
    return [(unit, dead_letters) for unit, dead_letters in found if dead_letters.path]


def complete_until(job: Job, limits: Limits) -> dict[str, int]:
    """For each outcome with a window the time until which its stream is complete, unless `limits` has it.

    It is that of its last outcome that was joined: one stream may be ahead of another, and a clock may be wrong. If none was
    joined it is the last impression's, or the end of the last day of which there is a file.
    """
    latest = [report.latest for report in job.found(ReadReport) if report.latest is not None]
    until = {}
    for name, outcome in job.schema.source.outcomes.items():
        if outcome.window and outcome.open_window != "keep":
            joined = [time for report in job.found(JoinReport) if (time := report.latest[name]) is not None]
            end = job.absent.ends.get(name)
            known = max(joined or latest, default=0)
            until[name] = limits.as_of.get(name, known if joined or end is None else min(known, end))
    return until


def _join(job: Job, _: Limits) -> Iterator[JoinWork]:
    yield from map(JoinWork, range(job.buckets))


def _look_up(job: Job, _: Limits) -> Iterator[LookUpWork]:
    for name in job.schema.source.tables:
        pieces = len(job.typed()) if name in job.broadcast else job.buckets
        yield from (LookUpWork(name, index) for index in range(pieces))


def _typed_parts(job: Job, limits: Limits) -> Iterator[PartWork]:
    until = complete_until(job, limits)
    yield from (PartWork(index, part, until) for index, part in enumerate(job.typed()))


def _gather_past(job: Job, limits: Limits) -> Iterator[GatherPastWork]:
    check_overlap(job)
    means, end = counter_means(job, limits), horizon(job)
    for name in job.schema.past:
        mean = means.get(name, math.nan) if name in job.schema.smoothed else None
        yield from (GatherPastWork(name, bucket, mean, end) for bucket in range(job.buckets))


def counter_means(job: Job, limits: Limits) -> dict[str, float]:
    """What each smoothed counter is smoothed towards: its mean over the train split, or over that of the reference.

    Those of which no row of the train split counts are left out.
    """
    means: dict[str, float] = {}
    if job.schema.smoothed and limits.reference:
        known = Dataset(place(limits.reference)).encoders
        # Without labels, a schema has no expressions to compare; but then all encoders are those of the reference.
        means = reuse.counter_means(job.schema, known) if limits.fits else dict(known.counter_means)
    for name in (name for name in job.schema.smoothed if name not in means):
        sums = [report.sums[name] for report in job.found(ScatterPastReport)]
        count = sum(rows for _, rows in sums)
        if count:
            means[name] = sum(total for total, _ in sums) / count
    return means


def _write_state(job: Job, _: Limits) -> Iterator[WriteStateWork]:
    yield from map(WriteStateWork, job.schema.past)


def _merge(job: Job, limits: Limits) -> Iterator[MergeWork]:
    _check(job, limits)  # first: bad rows may be why no row counts
    if without_mean := [*set(job.schema.smoothed) - counter_means(job, limits).keys()]:
        raise UserError(
            f"source.counters.{min(without_mean)}: smoothing needs a mean, but no row of the split train counts. Check of, "
            "when and split, or remove smoothing."
        )
    paths = [part.statistics for part in job.labelled()]
    size = max(1, math.isqrt(len(paths)))
    yield from (MergeWork(paths[start : start + size]) for start in range(0, len(paths), size))


def rows_of(job: Job) -> dict[Split, int]:
    """Rows of each split."""
    return {split: sum(part.rows[split] for part in job.labelled()) for split in SPLITS}


def _check(job: Job, limits: Limits) -> None:
    """Raises UserError for a key that no row has, too many bad rows in a stream, no rows, or a split without any."""
    check_keys(job)
    reads, total = job.found(ReadReport), rows_of(job)
    for stream in dict.fromkeys(report.stream for report in reads):
        found = [(unit, each) for unit, each in dead_letters_of(job) if reads[unit].stream == stream]
        bad = sum(sum(each.reasons.values()) for _, each in found)
        read = sum(report.read for report in reads if report.stream == stream)
        swallowed = sum(report.swallowed for report in reads if report.stream == stream)
        bad, read = bad + swallowed, read + swallowed  # a bad row counts for the lines that it takes
        if bad > limits.max_bad_fraction * read:
            unit, line, reason = min((unit, each.line, each.reason) for unit, each in found)
            first = f"{reads[unit].file}, line {line + lines_before(reads)[unit]}: {reason}"
            range_ = implausible_times([each for _, each in found], reason)
            what = "lines" if swallowed else "rows"
            raise UserError(
                too_many_message(bad, read, stream, limits.max_bad_fraction, f"{first}.{range_}", what=what)
            )
    if not any(total.values()):
        raise UserError(_no_rows(job))
    fitted = {"train"} | (job.schema.used_splits if limits.needs_splits else set())
    wanted = fitted if limits.fits else set()
    if empty := [split for split in SPLITS if split in wanted and not total[split]]:
        spans = [part.span for part in job.labelled() if part.span]
        span = [min(first for first, _ in spans), max(last for _, last in spans)]
        raise UserError(empty_split(job.schema, empty[0], sum(total.values()), span))


def _no_rows(job: Job) -> str:
    """Why no impression is left: empty files, bad rows, or rules of the schema."""
    reads = [(unit, each) for unit, each in enumerate(job.found(ReadReport)) if each.stream == IMPRESSIONS]
    files = list(dict.fromkeys(each.file for _, each in reads))
    if not sum(each.read for _, each in reads):
        shown = ", ".join(files[:3]) + (f" and {len(files) - 3:,} more" if len(files) > 3 else "")
        return f"no rows are left: the files are empty: {shown}. Set input=FOLDER, or source.files."
    left_out = sum((Counter(part.left_out) for part in job.labelled()), Counter[str]())
    units = {unit for unit, _ in reads}
    bad = [(unit, each) for unit, each in dead_letters_of(job) if unit in units]
    reasons = sum((Counter(each.reasons) for _, each in bad), Counter[str]())
    causes = [f"{rows:,} are left out ({rule})" for rule, rows in left_out.most_common() if rows]
    if bad:
        unit, line, reason = min((unit, each.line, each.reason) for unit, each in bad)
        where = f"{job.found(ReadReport)[unit].file}, line {line + lines_before(job.found(ReadReport))[unit]}"
        most = ", ".join(f"{rows:,} {reason}" for reason, rows in reasons.most_common(3))
        causes.append(f"{reasons.total():,} are bad ({most}; the first: {where}: {reason})")
    return (
        f"no rows are left of {sum(each.read for _, each in reads):,}: {'; '.join(causes)}. Fix the log or the schema."
    )


def _fit(job: Job, limits: Limits) -> None:
    """Fits the encoders, unless those of another dataset are used, and writes the card."""
    statistics = merged([report.path for report in job.found(MergeReport)])
    known = Dataset(place(limits.reference)) if limits.reference else None
    if limits.fits:
        temporary = job.unfinished_path("encoders", "encoders")
        encoders = Encoders.fit(job.schema, statistics, counter_means(job, limits))
        if known:
            kept = reuse.unchanged(job.schema, known.schema)
            encoders = reuse.keep(encoders, known.encoders, kept, known.encoders_id)
        encoders.save(temporary)
        if temporary != job.staging / "encoders":
            shutil.rmtree(job.staging / "encoders", ignore_errors=True)  # of an earlier attempt
            temporary.rename(job.staging / "encoders")
    reference = _comparable(job, known) if known else None
    write_json(job.staging / "statistics.json", card(job.schema, job.encoders, statistics, reference))


def _comparable(job: Job, known: Dataset) -> dict[str, Any]:
    """The card of a dataset, without features that mean something else there."""
    found, kept = read_card(known.path), reuse.unchanged(job.schema, known.schema).features
    return found | {part: {n: v for n, v in found[part].items() if n in kept} for part in ("numbers", "ids")}


def _encode(job: Job, limits: Limits) -> Iterator[EncodeWork]:
    _fit(job, limits)
    slices = {split: SLICES * max(1, round(rows / limits.rows_per_shard)) for split, rows in rows_of(job).items()}
    bounds = _bounds(job, slices) if job.order == "time" else {}
    yield from (EncodeWork(part.features, slices, bounds) for part in job.labelled())


def _bounds(job: Job, slices: dict[Split, int]) -> dict[Split, list[int]]:
    """Event times at which slices of shards begin, so that each has about as many rows."""
    bounds = {}
    for split, count in slices.items():
        seen = [(part.times[split], part.rows[split]) for part in job.labelled() if split in part.times]
        time = np.concatenate([np.array(times, np.int64) for times, _ in seen] or [np.empty(0, np.int64)])
        weight = np.concatenate([np.full(len(times), rows / len(times)) for times, rows in seen] or [np.empty(0)])
        order = np.argsort(time, kind="stable")
        place = np.searchsorted(np.cumsum(weight[order]), weight.sum() * np.arange(1, count) / count)
        bounds[split] = time[order][np.minimum(place, max(len(time) - 1, 0))].tolist() if len(time) else []
    return bounds


def _write(job: Job, limits: Limits) -> Iterator[WriteWork]:
    """The shards of each split, in order, those without rows left out."""
    pieces: dict[tuple[Split, int], list[list[Piece]]] = {}
    if job.order == "input":
        _fit(job, limits)
        pieces = _in_order(job, limits.rows_per_shard)
    for report in job.found(EncodeReport):
        for index, batch in enumerate(report.batches):
            slices = pieces.setdefault((batch.split, batch.slice // SLICES), [[] for _ in range(SLICES)])
            slices[batch.slice % SLICES].append(Piece(report.path, index, batch.rows))
    for split in SPLITS:
        keys = sorted(key for key in pieces if key[0] == split)
        filled = [key for key in keys if any(piece.rows for slice_ in pieces[key] for piece in slice_)]
        for index, key in enumerate(filled):
            yield WriteWork(split, pieces[key], shard_path(split, index, len(filled)))


def _in_order(job: Job, rows_per_shard: int) -> dict[tuple[Split, int], list[list[Piece]]]:
    """The rows of each split as they were read, cut into shards of one slice."""
    pieces: dict[tuple[Split, int], list[list[Piece]]] = {}
    filled: Counter[str] = Counter()
    for part in job.labelled():
        for split, rows in part.rows.items():
            start = 0
            while start < rows:
                shard, used = divmod(filled[split], rows_per_shard)
                size = min(rows - start, rows_per_shard - used)
                pieces.setdefault((split, shard), [[]])[0].append(Piece(part.features, start, size))
                start, filled[split] = start + size, filled[split] + size
    return pieces


PLANS: dict[str, Callable[[Job, Limits], Iterator[Work]]] = {
    "join": _join, "look_up": _look_up, "scatter_past": _typed_parts, "gather_past": _gather_past,
    "write_state": _write_state, "label": _typed_parts,
    "merge": _merge, "encode": _encode, "write": _write,
}  # fmt: skip
