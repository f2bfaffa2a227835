"""Whether a day's data is sound enough to judge models on it: its card and manifest against `data_gates`."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from features.plain_json import Count, validated
from features.printable import printable
from pipeline.dataset.card.card import read_card
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.days import day_of
from pipeline.dataset.manifest import Manifest
from pipeline.release.config import DataGates
from pipeline.release.night import FILE, Night, Strict, Text

MOST = 20  # violations that are recorded


class Checked(Strict):
    """The summary of the step: rows of the day, and the gates that it violates, each in a line.

    Attributes:
        refused: whether they end the night. unusual_rows: whether the number of rows is one of them.
    """

    rows: Count
    violations: list[Text] = Field(max_length=MOST + 1)
    refused: bool = False
    unusual_rows: bool = False


def check_data(gates: DataGates, day: Dataset, reference: Dataset, rows_before: Sequence[int]) -> Checked:
    """Compares the encoded day with the dataset of its encoders, and its rows with those of the last nights.

    Raises:
        UserError: a card is missing or damaged.
    """
    card, before = (read_card(dataset.encoded_by, dataset.schema) for dataset in (day, reference))
    rows = sum(day.manifest.rows.values())
    of_rows = [*_rows(gates, rows, rows_before)]
    found = [
        printable(line)
        for line in (
            *of_rows,
            *_absent(gates, day.manifest),
            *_base_rates(gates, card["tasks"], before["tasks"]),
            *_features(gates, card.get("drift", [])),
        )
    ]
    more = [f"and {len(found) - MOST} more (jobs.inspect {day.path} lists all)"] if len(found) > MOST else []
    refused = bool(found) and gates.action == "stop"
    return Checked(rows=rows, violations=[*found[:MOST], *more], refused=refused, unusual_rows=bool(of_rows))


def checked_of(night: Night) -> Checked | None:
    """What a night's step found; None where it was not done. Raises UserError for a damaged record."""
    found = night.summary("check")
    return None if found is None else validated(Checked, found, f"{night.date}/{FILE}: check")


def rows_of_nights(nights: Sequence[Night], date: str, most: int) -> list[int]:
    """Rows of the last nights before a date, or of all others where dates are no days.

    Nights of unusual rows are left out: a fault that lasts would become what is usual.
    """
    ours = day_of(date)
    earlier = [
        night
        for night in nights
        if night.date != date and not (ours and (theirs := day_of(night.date)) and theirs >= ours)
    ]
    found = [checked for night in earlier if (checked := checked_of(night))]
    return [checked.rows for checked in found if not checked.unusual_rows][-most:]


def _rows(gates: DataGates, rows: int, before: Sequence[int]) -> Iterator[str]:
    if gates.rows and before:
        usual = statistics.median(before)
        if not gates.rows[0] * usual <= rows <= gates.rows[1] * usual:
            yield (
                f"rows: {rows:,}, the median of the last {len(before)} nights is {usual:,.0f} (allowed: {gates.rows[0]:g} to "
                f"{gates.rows[1]:g} times as many)"
            )


def _absent(gates: DataGates, manifest: Manifest) -> Iterator[str]:
    if gates.absent is None:
        return
    for stream, columns in manifest.absent_columns.items():
        for column, rows in columns.items():
            if (share := rows / max(manifest.read.get(stream, 0), 1)) > gates.absent:
                allowed = f"allowed: {gates.absent:.0%}"
                yield f"{stream}: column {column} is absent from the files of {share:.0%} of the rows ({allowed})"


def _base_rates(gates: DataGates, now: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[str]:
    if gates.base_rate is None:
        return
    low, high = gates.base_rate
    for task, entry in now.items():
        rate, then = entry["mean"], before.get(task, {}).get("mean")
        if rate is None and then is not None:
            yield f"{task}: no observed label, in training their mean is {then:.4g}"
        elif entry["kind"] == "binary" and then and not low <= rate / then <= high:
            yield f"{task}: base rate {rate:.4g}, in training {then:.4g} (allowed: {low:g} to {high:g} times as much)"


def _features(gates: DataGates, drift: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for line in drift:
        excess = line["psi"] - line["chance"]
        if gates.psi is not None and excess > gates.psi:
            yield f"{line['feature']}: drift, PSI {excess:.3f} above chance (allowed: {gates.psi:g})"
        for key, limit, what in (
            ("missing", gates.missing, "missing values"),
            ("unknown", gates.unknown, "unseen ids"),
        ):
            now, then = line[key], line[f"{key}_before"]
            if limit is not None and now is not None and then is not None and now - then > limit:
                yield f"{line['feature']}: {now:.1%} {what}, {then:.1%} in training (allowed rise: {limit:.0%})"
