"""What follows from the reports of a step: the work of the next one. Runs where the steps run, once between two of them."""

import math
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features.errors import UserError
from features.fit.encoders import Encoders
from features.fit.statistics import Statistics
from features.schema.schema import SPLITS
from pipeline.dataset.card.card import card, read_card
from pipeline.ingest.files import one_line
from pipeline.ingest.state import RESERVE_FILE, Job, Work
from pipeline.storage.files import write_json

DONE_WITH = {"label": ("typed", "sent", "reply"), "encode": ("features",)}  # files that no later step reads
SLICES = 4  # of a shard, one of which is in memory while it is put in order


@dataclass(frozen=True)
class Limits:
    """When to stop, and how much goes into a shard.

    Attributes:
        needs_splits: whether a split of the schema without rows stops the job.
        as_of: per outcome, as far as it is known, seconds until when it is complete.
        reference: the dataset whose encoders are used.
    """

    max_bad_fraction: float
    rows_per_shard: int
    needs_splits: bool
    as_of: dict[str, int]
    reference: str | None


def steps_of(job: Job) -> list[str]:
    """The steps that a job needs, in order."""
    joins, histories = bool(job.schema.source.outcomes), bool(job.schema.histories)
    needs = {
        "read": True, "join": joins, "scatter_history": histories, "gather_history": histories, "label": job.joins,
        "merge": True, "encode": job.order != "input", "write": True,
    }  # fmt: skip
    return [step for step, needed in needs.items() if needed]


def after(reports: list[Work], job: Job, limits: Limits, step: str) -> Iterator[tuple[int, Work]]:
    """Keeps the reports of a step and yields the numbered work of the next one; nothing where a step has failed."""
    if not reports:
        return
    reports = sorted(reports, key=lambda report: report["order"])
    try:
        if failed := [report["error"] for report in reports if "error" in report]:
            raise UserError(failed[0])
        write_json(job.scratch / f"{step}.json", reports)
        following = dict(zip(steps_of(job), steps_of(job)[1:], strict=False)).get(step)
        work = list(PLANS[following](job, limits)) if following else []
    except (UserError, OSError) as error:
        (job.scratch / RESERVE_FILE).unlink(missing_ok=True)  # so that there is room to say that the disk is full
        said = str(error) if isinstance(error, UserError) else f"{job.staging.parent}: {one_line(error)}"
        write_json(job.scratch / "error.json", said)
        return
    for name in DONE_WITH.get(step, ()):
        for path in job.scratch.glob(f"{name}-*"):
            path.unlink(missing_ok=True)
    if following:
        write_json(job.scratch / "notes" / f"{following}.total", len(work))
    yield from enumerate(work)


def lines_before(reads: list[Work]) -> list[int]:
    """Per unit the lines of its file that stand in the units before it; a file may belong to several streams."""
    seen: Counter[tuple[str, str]] = Counter()
    before = []
    for report in reads:
        file = report["stream"], report["file"]
        before.append(seen[file])
        seen[file] += report["lines"]
    return before


def dead_letter_reports(job: Job) -> list[tuple[int, Work]]:
    """What was reported of bad rows, each with the unit it comes from."""
    reads = [(index, report) for index, report in enumerate(job.found("read")) if report["dead_letters"]]
    return reads + [(report["unit"], report) for report in job.found("label") if report["dead_letters"]]


def complete_until(job: Job, limits: Limits) -> dict[str, int]:
    """For each outcome with a window the time until which its stream is complete, if nothing else is said.

    It is that of its last outcome that was joined: one stream may be ahead of another, and a clock may be wrong. If none was
    joined it is the last impression's.
    """
    latest = [report["latest"] for report in job.found("read") if report["latest"] is not None]
    until = {}
    for name, outcome in job.schema.source.outcomes.items():
        if outcome.window and outcome.open_window != "keep":
            joined = [report["latest"][name] for report in job.found("join") if report["latest"][name] is not None]
            until[name] = limits.as_of.get(name, max(joined or latest, default=0))
    return until


def _join(job: Job, _: Limits) -> Iterator[Work]:
    yield from ({"bucket": bucket} for bucket in range(job.buckets))


def _scatter_history(job: Job, _: Limits) -> Iterator[Work]:
    for index, part in enumerate(job.parts()):
        yield {**part, "part": index}


def _gather_history(job: Job, _: Limits) -> Iterator[Work]:
    for name in job.schema.histories:
        yield from ({"history": name, "bucket": bucket} for bucket in range(job.buckets))


def _label(job: Job, limits: Limits) -> Iterator[Work]:
    until = complete_until(job, limits)
    for index, part in enumerate(job.parts()):
        yield {**part, "part": index, "as_of": until}


def _merge(job: Job, limits: Limits) -> Iterator[Work]:
    _check(job, limits)
    paths = [part["statistics"] for part in job.labelled()]
    size = max(1, math.isqrt(len(paths)))
    for number, start in enumerate(range(0, len(paths), size)):
        yield {"number": number, "paths": paths[start : start + size]}


def rows_of(job: Job) -> dict[str, int]:
    """Rows of each split."""
    return {split: sum(part["rows"][split] for part in job.labelled()) for split in SPLITS}


def _check(job: Job, limits: Limits) -> None:
    """Raises UserError for too many bad rows in a stream, no rows, or a split without any."""
    reads, total = job.found("read"), rows_of(job)
    for stream in dict.fromkeys(report["stream"] for report in reads):
        dead_letters = [(unit, report) for unit, report in dead_letter_reports(job) if reads[unit]["stream"] == stream]
        bad = sum(sum(report["reasons"].values()) for _, report in dead_letters)
        read = sum(report["read"] for report in reads if report["stream"] == stream)
        if bad > limits.max_bad_fraction * read:
            unit, (line, reason) = min((unit, report["example"]) for unit, report in dead_letters)
            place = f"{reads[unit]['file']}, line {line + lines_before(reads)[unit]}"
            raise UserError(
                f"{bad} of {read} rows of {stream} are bad, more than max_bad_fraction={limits.max_bad_fraction}; "
                f"the first: {place}: {reason}. Mend the log or the schema, or raise the limit."
            )
    if not any(total.values()):
        raise UserError("no row is left of those that were read: are the files empty, or does a rule leave all out?")
    fitted = {"train"} | (job.schema.used_splits if limits.needs_splits else set())
    wanted = fitted if limits.reference is None else set()
    if empty := [split for split in SPLITS if split in wanted and not total[split]]:
        raise UserError(
            f"split {empty[0]} is empty: none of {sum(total.values())} rows falls into it. Change split in the schema, "
            "or use another dataset's encoders with encoders.from."
        )


def _fit(job: Job, limits: Limits) -> None:
    """Fits the encoders, unless those of another dataset are used, and writes the card."""
    parts = [pickle.loads(Path(report["path"]).read_bytes()) for report in job.found("merge")]
    statistics = Statistics().merge(*parts)
    if limits.reference is None:
        aside = job.aside("encoders")
        Encoders.fit(job.schema, statistics).save(aside)
        shutil.rmtree(job.staging / "encoders", ignore_errors=True)  # of an earlier try of this
        aside.rename(job.staging / "encoders")
    reference = read_card(Path(limits.reference)) if limits.reference else None
    write_json(job.staging / "statistics.json", card(job.schema, job.encoders, statistics, reference))


def _encode(job: Job, limits: Limits) -> Iterator[Work]:
    _fit(job, limits)
    slices = {split: SLICES * max(1, round(rows / limits.rows_per_shard)) for split, rows in rows_of(job).items()}
    bounds = _bounds(job, slices) if job.order == "time" else {}
    for part in job.labelled():
        yield {"path": part["features"], "slices": slices, "bounds": bounds}


def _bounds(job: Job, slices: dict[str, int]) -> dict[str, list[int]]:
    """Event times at which slices of shards begin, so that each has about as many rows."""
    bounds = {}
    for split, count in slices.items():
        seen = [(part["times"][split], part["rows"][split]) for part in job.labelled() if split in part["times"]]
        time = np.concatenate([np.array(times, np.int64) for times, _ in seen] or [np.empty(0, np.int64)])
        weight = np.concatenate([np.full(len(times), rows / len(times)) for times, rows in seen] or [np.empty(0)])
        order = np.argsort(time, kind="stable")
        place = np.searchsorted(np.cumsum(weight[order]), weight.sum() * np.arange(1, count) / count)
        bounds[split] = time[order][np.minimum(place, max(len(time) - 1, 0))].tolist() if len(time) else []
    return bounds


def _write(job: Job, limits: Limits) -> Iterator[Work]:
    """Shards in order, each made of slices, and those of pieces: a file, a batch of it or the first of its rows, rows."""
    pieces: dict[tuple[str, int], list[list[tuple[str, int, int]]]] = {}
    if job.order == "input":
        _fit(job, limits)
        pieces = _in_order(job, limits.rows_per_shard)
    for report in job.found("encode"):
        for batch, (split, number, rows) in enumerate(report["batches"]):
            slices = pieces.setdefault((split, number // SLICES), [[] for _ in range(SLICES)])
            slices[number % SLICES].append((report["path"], batch, rows))
    for split in SPLITS:
        for key in sorted(key for key in pieces if key[0] == split):
            if any(rows for slice_ in pieces[key] for *_, rows in slice_):
                yield {"split": split, "shard": key[1], "slices": pieces[key]}


def _in_order(job: Job, rows_per_shard: int) -> dict[tuple[str, int], list[list[tuple[str, int, int]]]]:
    """The rows of each split as they were read, cut into shards of one slice."""
    pieces: dict[tuple[str, int], list[list[tuple[str, int, int]]]] = {}
    filled: Counter[str] = Counter()
    for part in job.labelled():
        for split, rows in part["rows"].items():
            start = 0
            while start < rows:
                shard, used = divmod(filled[split], rows_per_shard)
                size = min(rows - start, rows_per_shard - used)
                pieces.setdefault((split, shard), [[]])[0].append((part["features"], start, size))
                start, filled[split] = start + size, filled[split] + size
    return pieces


PLANS: dict[str, Callable[[Job, Limits], Iterator[Work]]] = {
    "join": _join, "scatter_history": _scatter_history, "gather_history": _gather_history, "label": _label,
    "merge": _merge, "encode": _encode, "write": _write,
}  # fmt: skip
