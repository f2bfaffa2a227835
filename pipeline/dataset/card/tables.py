"""A dataset's manifest and card as short tables, for a terminal and for a page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.printable import printable
from features.schema.schema import SPLITS
from pipeline.dataset.manifest import Manifest

NOTHING = "–"
LONGEST = 24  # characters of a raw value in a table


@dataclass(frozen=True)
class Table:
    """A title, a line of headers and lines of cells, the first of each line naming it; without control characters."""

    title: str
    header: list[str]
    lines: list[list[str]]


def tables(manifest: Manifest, card: dict[str, Any]) -> list[Table]:
    """All tables that have a line: where rows went, outcomes, tasks, numbers, ids, kept columns, drift."""
    made = [
        _rows(manifest),
        _bad_rows(manifest),
        _outcomes(manifest),
        _side_tables(manifest),
        _absent_columns(manifest),
        _types(manifest),
        _undecided(manifest),
        _absent_days(manifest),
        _tasks(manifest, card),
        _correlations(card),
        _numbers(card),
        _ids(card),
        _markers(card),
        _others(card),
        _kept(card),
        _drift(card),
    ]
    return [_printable(table) for table in made if table.lines]


def _printable(table: Table) -> Table:
    lines = [[printable(cell) for cell in line] for line in table.lines]
    return Table(table.title, [printable(cell) for cell in table.header], lines)


def percent(share: float | None) -> str:
    """A share as a percentage of three digits or so."""
    if share is None:
        return NOTHING
    return f"{share * 100:.2f}%" if 0 < share < 0.1 or 0.99 < share < 1 else f"{share * 100:.1f}%"


def most_frequent(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Items in order of their counts, the largest first; of equal counts by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def number(value: float | None) -> str:
    """A number in few characters."""
    return NOTHING if value is None else f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _rows(manifest: Manifest) -> Table:
    total = manifest.read.get("impressions", 0)
    bad = sum(file.rows for file in manifest.dead_letter_files if file.stream == "impressions")
    went: dict[str, int] = {name: manifest.rows.get(name, 0) for name in SPLITS}
    went |= {f"left out: {rule}": count for rule, count in manifest.left_out.items()}
    went |= {"bad (dead letters)": bad, "read": total}
    lines = [[name, f"{count:,}", percent(count / total if total else None)] for name, count in went.items()]
    return Table("Where the rows went", ["impressions", "rows", "share"], lines)


def _bad_rows(manifest: Manifest) -> Table:
    reasons = most_frequent(manifest.dead_letters)
    if not manifest.dead_letter_examples:
        return Table("Dead letters", ["reason", "rows"], [[reason, f"{count:,}"] for reason, count in reasons])
    places = {k: f"{Path(e.file).name}, line {e.line}" for k, e in manifest.dead_letter_examples.items()}
    lines = [[reason, f"{count:,}", places.get(reason, NOTHING)] for reason, count in reasons]
    return Table("Dead letters", ["reason", "rows", "the first"], lines)


def _outcomes(manifest: Manifest) -> Table:
    kinds = list(dict.fromkeys(kind for counts in manifest.outcomes.values() for kind in counts))
    lines = []
    for name, counts in manifest.outcomes.items():
        bad = sum(file.rows for file in manifest.dead_letter_files if file.stream == name)
        cells = [manifest.read.get(name, 0), *(counts.get(kind, 0) for kind in kinds), bad]
        lines.append([name, *(f"{cell:,}" for cell in cells)])
    return Table("Outcomes by join status", ["outcome", "rows read", *kinds, "bad"], lines)


def _side_tables(manifest: Manifest) -> Table:
    rows = {
        "matched": "matched_rows",
        "unmatched": "unmatched_rows",
        "too early": "early_rows",
        "no key": "missing_key_rows",
    }
    lines = []
    for name, found in manifest.side_tables.items():
        counts = [getattr(found, field) for field in rows.values()]
        shares = [percent(count / sum(counts) if any(counts) else None) for count in counts]
        cells = [found.rows, found.keys, found.duplicates]
        lines.append([name, *(f"{cell:,}" for cell in cells), *shares, f"{found.unmatched_keys:,}"])
    header = ["table", "rows", "keys", "duplicates", *(f"impressions {what}" for what in rows), "unmatched keys"]
    return Table("Side tables", header, lines)


def _absent_columns(manifest: Manifest) -> Table:
    lines = [
        [column, stream, f"{rows:,}", percent(rows / manifest.read[stream] if manifest.read.get(stream) else None)]
        for stream, columns in manifest.absent_columns.items()
        for column, rows in columns.items()
    ]
    return Table("Optional columns that files lack", ["column", "stream", "rows without it", "share"], lines)


def _types(manifest: Manifest) -> Table:
    """The types of each column of Parquet and Avro files; with rows, where files differ."""
    lines = [
        [
            column,
            stream,
            ", ".join(f"{kind}: {count:,}" if len(rows) > 1 else kind for kind, count in most_frequent(rows)),
        ]
        for stream, columns in manifest.types.items()
        for column, rows in columns.items()
    ]
    return Table("Column types in the raw files", ["column", "stream", "types (rows)"], lines)


def _undecided(manifest: Manifest) -> Table:
    """Impressions of which an outcome is not known."""
    lines = [[n, cause, f"{rows:,}"] for n, causes in manifest.undecided.items() for cause, rows in causes.items()]
    return Table("Impressions whose outcome is not known", ["outcome", "cause", "impressions"], lines)


def _absent_days(manifest: Manifest) -> Table:
    lines = [[stream, span] for stream, spans in manifest.absent_days.items() for span in spans]
    return Table("Days without a file", ["stream", "days"], lines)


def _tasks(manifest: Manifest, card: dict[str, Any]) -> Table:
    splits = [split for split in SPLITS if manifest.rows.get(split)]
    header = ["task", "kind", *(f"observed {s}" for s in splits), *(f"mean label {s}" for s in splits)]
    header.append(f"std {rows_of(card)}")
    lines = []
    for name, task in card["tasks"].items():
        observed = {s: manifest.observed.get(s, {}).get(name, 0) for s in splits}
        means = [manifest.positives[s][name] / observed[s] if observed[s] else None for s in splits]
        shown = percent if task["kind"] == "binary" else number  # the mean of a binary label is its base rate
        shares = [percent(observed[s] / manifest.rows[s]) for s in splits]
        lines.append([name, task["kind"], *shares, *map(shown, means), number(task["std"])])
    return Table("Tasks", header, lines)


def _correlations(card: dict[str, Any]) -> Table:
    names = list(card["tasks"])
    title = f"Correlations of labels, over {'rows' if rows_of(card) == 'all rows' else 'train rows'} where both are observed"
    if len(names) < 2:
        return Table(title, [], [])
    rows = zip(names, card["correlations"], strict=True)
    lines = [[name, *(NOTHING if x is None else f"{x:.3f}" for x in row)] for name, row in rows]
    return Table(title, ["task", *names], lines)


def _numbers(card: dict[str, Any]) -> Table:
    quantiles, splits = ["1%", "25%", "50%", "75%", "99%"], card.get("splits", {})
    lines = [
        [name, percent(found["missing"]), *_in_splits(splits, name, "missing", percent)]
        + [number(found["mean"]), *_in_splits(splits, name, "mean", number)]
        + [number(found[key]) for key in ("std", "min")]
        + [number(found["quantiles"].get(key)) for key in quantiles]
        + [number(found["max"])]
        for name, found in card["numbers"].items()
    ]
    header = ["number", *_columns("missing", splits), *_columns("mean", splits), "std", "min"]
    return Table(
        f"Numbers, before any transform ({rows_of(card)})", [*header, *(f"{q} below" for q in quantiles), "max"], lines
    )


def _ids(card: dict[str, Any]) -> Table:
    lines, splits = [], card.get("splits", {})
    for name, found in card["ids"].items():
        distinct, seen, top = "hashed", "", NOTHING
        if "vocabulary" in found:
            top = f"{_cut(found['top'][0][0])} ({percent(found['top'][0][1])})" if found["top"] else NOTHING
            distinct, seen = f"{found['distinct']:,}", f"{found['seen']:,} of {found['vocabulary']:,}"
        missing = [percent(found["missing"]), *_in_splits(splits, name, "missing", percent)]
        unknown = [percent(found.get("unknown")), *_in_splits(splits, name, "unknown", percent)]
        length = number(found["length"]) if found.get("length") is not None else NOTHING
        lines.append([name, *missing, distinct, seen, *unknown, top, length])
    header = ["id", *_columns("missing", splits), "distinct values", "vocabulary seen", *_columns("unknown", splits)]
    return Table(f"Ids ({rows_of(card)})", [*header, "most frequent", "values in a list"], lines)


def _markers(card: dict[str, Any]) -> Table:
    lines = [
        [name, f"'{value}'", f"{count:,}"]
        for name, found in card["ids"].items()
        for value, count in most_frequent(found.get("markers", {}))
    ]
    title = f"Ids that look like missing values ({rows_of(card)}): list them in source.missing if they are"
    return Table(title, ["id", "value", "times"], lines)


def _others(card: dict[str, Any]) -> Table:
    splits = card.get("splits", {})
    lines = [
        [name, percent(found["missing"]), *_in_splits(splits, name, "missing", percent)]
        for name, found in card.get("others", {}).items()
    ]
    return Table(f"Other features ({rows_of(card)})", ["feature", *_columns("missing", splits)], lines)


def _kept(card: dict[str, Any]) -> Table:
    lines = [[name, found["type"], percent(found["missing"])] for name, found in card.get("kept", {}).items()]
    return Table(f"Columns kept for slices and keys, no inputs ({rows_of(card)})", ["column", "type", "missing"], lines)


def rows_of(card: dict[str, Any]) -> str:
    """Which rows a card's statistics are of, but for the columns of splits."""
    return "all rows" if "train" in card.get("splits", {}) else "train"


def _columns(what: str, splits: dict[str, Any]) -> list[str]:
    """The header of a statistic and of the same in the other splits."""
    return [what, *(f"{what} {split}" for split in splits)]


def _in_splits(splits: dict[str, Any], name: str, what: str, shown: Callable[[float | None], str]) -> list[str]:
    return [shown(found.get(name, {}).get(what)) for found in splits.values()]


def _drift(card: dict[str, Any]) -> Table:
    header = [
        "feature",
        "verdict",
        "stability index",
        "of that by chance",
        "missing",
        "missing before",
        "unknown",
        "unknown before",
    ]
    lines = []
    for line in card.get("drift", []):
        shares = [percent(line[key]) for key in ("missing", "missing_before", "unknown", "unknown_before")]
        lines.append([line["feature"], line["verdict"], f"{line['psi']:.4f}", f"{line['chance']:.4f}", *shares])
    title = "Drift from the dataset whose encoders are used (beyond chance: below .1 stable, above .25 shifted)"
    return Table(title, header, lines)


def _cut(value: str) -> str:
    return value if len(value) <= LONGEST else f"{value[: LONGEST - 1]}…"
