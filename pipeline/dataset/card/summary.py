"""The end of jobs.preprocess in a screen: where rows went, outcomes, bad rows, unseen ids and warnings, a line each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from features.printable import printable
from features.schema.schema import SPLITS
from features.time_units import as_utc
from pipeline.dataset.card.tables import most_frequent, percent
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.past_state import state_lines

UNSEEN = 0.01  # share of values outside the vocabulary in valid or test, from which on a feature is named
MOST = 5  # features, reasons and warnings of a kind that are named
LONGEST = 160  # characters of an example


def summary(manifest: Manifest, card: dict[str, Any]) -> list[str]:
    """The lines, without the dataset's place and what comes next, which its caller knows; without control characters."""
    lines = [
        *_splits(manifest),
        *_impressions(manifest),
        *_outcomes(manifest),
        *_bad_rows(manifest),
        *_unseen_ids(card),
        *_drift(card),
        *(state_lines(manifest.state) if manifest.state else ()),
        *_warnings(manifest),
        *_markers(card),
    ]
    return [printable(line) for line in lines]


def summary_of_scored(manifest: Manifest) -> list[str]:
    """The lines of rows that were scored: where they went, bad ones, and warnings."""
    return [printable(line) for line in (*_impressions(manifest, "scored"), *_bad_rows(manifest), *_warnings(manifest))]


def _splits(manifest: Manifest) -> Iterator[str]:
    """Rows of each split, and the mean of its labels."""
    for split, rows in manifest.rows.items():
        rates = ", ".join(
            f"{task} {manifest.positives[split][task] / observed:.4f} of {observed:,}"
            for task, observed in manifest.observed.get(split, {}).items()
            if observed
        )
        yield f"{split:5}  {rows:>10,} rows   mean label: {rates or '-'}"


def _impressions(manifest: Manifest, what: str = "in splits") -> Iterator[str]:
    """Where the rows that were read went."""
    bad = _bad_of(manifest, "impressions")
    left_out = "".join(f", {rows:,} left out ({rule})" for rule, rows in manifest.left_out.items() if rows)
    rows = sum(manifest.rows.values())
    yield f"impressions: {manifest.read.get('impressions', 0):,} rows read, {rows:,} {what}{left_out}, {bad:,} bad"


def _outcomes(manifest: Manifest) -> Iterator[str]:
    """What became of the rows of each outcome, and of impressions for which it is not known."""
    for name, statuses in manifest.outcomes.items():
        counts = "".join(f", {rows:,} {status}" for status, rows in statuses.items())
        until = manifest.complete_until.get(name)
        ends = f"; complete until {as_utc(until)}" if until is not None else ""
        yield f"{name}: {manifest.read.get(name, 0):,} rows read{counts}, {_bad_of(manifest, name):,} bad{ends}"
        if causes := manifest.undecided.get(name):
            shown = ", ".join(f"{rows:,} ({cause})" for cause, rows in causes.items())
            yield f"{name}: unknown for {sum(causes.values()):,} impressions: {shown}"


def _bad_of(manifest: Manifest, stream: str) -> int:
    return sum(file.rows for file in manifest.dead_letter_files if file.stream == stream)


def _bad_rows(manifest: Manifest) -> Iterator[str]:
    """The most frequent reasons, each with an example."""
    reasons = most_frequent(manifest.dead_letters)
    for reason, rows in reasons[:MOST]:
        line = f"bad    {rows:>10,} rows   {_cut(reason)}"
        if example := manifest.dead_letter_examples.get(reason):
            line += f"; the first: {Path(example.file).name}, line {example.line}"
            line += "" if example.reason == reason else f": {_cut(example.reason)}"
        yield line
    if more := reasons[MOST:]:
        yield f"bad    {sum(rows for _, rows in more):>10,} rows   {len(more)} other reasons (jobs.inspect lists them)"


def _unseen_ids(card: dict[str, Any]) -> Iterator[str]:
    """The features with most values that the train split does not have."""
    splits = card.get("splits", {})
    shares = {
        name: {split: share for split in SPLITS if (share := _unknown(splits, split, name)) is not None}
        for name in card["ids"]
    }
    worst = sorted(shares, key=lambda name: -max(shares[name].values(), default=0.0))
    for name in worst[:MOST]:
        if max(shares[name].values(), default=0.0) > UNSEEN:
            shown = ", ".join(f"{percent(share)} of {split}" for split, share in shares[name].items())
            yield f"unseen ids  {name}: {shown} (values outside the vocabulary)"


def _unknown(splits: dict[str, Any], split: str, name: str) -> float | None:
    share: float | None = splits.get(split, {}).get(name, {}).get("unknown")
    return share


def _drift(card: dict[str, Any]) -> Iterator[str]:
    """Features that are not as they were in the dataset whose encoders are used."""
    moved = [line for line in card.get("drift", []) if line["verdict"] != "stable"]
    for line in moved[:MOST]:
        unknown = ""
        if line["unknown"] is not None:
            unknown = f", unknown {percent(line['unknown'])} (was {percent(line['unknown_before'])})"
        yield (
            f"drift  {line['feature']} {line['verdict']}: PSI {line['psi']:.3f}, missing {percent(line['missing'])} "
            f"(was {percent(line['missing_before'])}){unknown}"
        )
    if len(moved) > MOST:
        yield f"drift  of {len(moved) - MOST} other features (jobs.inspect lists them)"


def _warnings(manifest: Manifest) -> Iterator[str]:
    """What is right by the rules, and yet often a mistake. One more kind is one more `yield`."""
    for stream, days in manifest.absent_days.items():
        shown = ", ".join(days[:MOST]) + (f" and {len(days) - MOST} more" if len(days) > MOST else "")
        advice = "; where the day had no rows, set open_window: keep" if stream in manifest.undecided else ""
        yield f"warning  {stream}: no file of {shown}{advice}"
    for name, statuses in manifest.outcomes.items():
        rows = sum(statuses.values()) - statuses.get("duplicate", 0)
        if not manifest.read.get(name):
            yield f"warning  {name}: its files are empty: every impression counts as one without it"
        elif not statuses.get("joined") and (rows or _bad_of(manifest, name)):
            yield f"warning  {name}: none of its rows belongs to an impression"
    for name, found in manifest.side_tables.items():
        if found.unmatched_rows:
            impressions = found.matched_rows + found.unmatched_rows + found.early_rows + found.missing_key_rows
            share = percent(found.unmatched_rows / impressions)
            yield f"warning  {name}: {share} of the impressions have a key without a row here ({found.unmatched_keys:,} keys)"
    trained = manifest.observed.get("train", {})
    for task in (name for name, count in trained.items() if not count and any(trained.values())):
        yield f"warning  task {task}: no train row has a label; check its label, observed_when and given"
    for stream, columns in manifest.absent_columns.items():
        for column, rows in list(columns.items())[:MOST]:
            yield f"warning  {stream}: {rows:,} rows are of files without column {column}, and have its default"
        if len(columns) > MOST:
            yield f"warning  {stream}: files lack {len(columns) - MOST} other columns, too (jobs.inspect lists them)"


def _markers(card: dict[str, Any]) -> Iterator[str]:
    """Ids that look like missing values."""
    names = [name for name, found in card["ids"].items() if found.get("markers")]
    for name in names[:MOST]:
        markers = list(card["ids"][name]["markers"].items())
        shown = ", ".join(f"'{value}' ({count:,})" for value, count in markers[:MOST])
        yield f"warning  {name}: {shown}: list it in source.missing where it means a missing value"
    if len(names) > MOST:
        yield f"warning  {len(names) - MOST} other features have such values, too (jobs.inspect lists them)"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
