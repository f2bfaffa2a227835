"""A dataset's manifest and card as short tables, for a terminal and for a page."""

from dataclasses import dataclass
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
    """All tables that have a line: where rows went, outcomes, tasks, numbers, ids, drift."""
    made = [
        _rows(manifest),
        _bad_rows(manifest),
        _outcomes(manifest),
        _absent(manifest),
        _tasks(manifest, card),
        _correlations(card),
        _numbers(card),
        _ids(card),
        _others(card),
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
    reasons = sorted(manifest.dead_letters.items(), key=lambda item: (-item[1], item[0]))
    return Table("Dead letters", ["reason", "rows"], [[reason, f"{count:,}"] for reason, count in reasons])


def _outcomes(manifest: Manifest) -> Table:
    kinds = list(dict.fromkeys(kind for counts in manifest.outcomes.values() for kind in counts))
    lines = []
    for name, counts in manifest.outcomes.items():
        bad = sum(file.rows for file in manifest.dead_letter_files if file.stream == name)
        cells = [manifest.read.get(name, 0), *(counts.get(kind, 0) for kind in kinds), bad]
        lines.append([name, *(f"{cell:,}" for cell in cells)])
    return Table("Outcomes by join status", ["outcome", "rows read", *kinds, "bad"], lines)


def _absent(manifest: Manifest) -> Table:
    lines = [
        [column, stream, f"{rows:,}", percent(rows / manifest.read[stream] if manifest.read.get(stream) else None)]
        for stream, columns in manifest.absent_columns.items()
        for column, rows in columns.items()
    ]
    return Table("Optional columns that files lack", ["column", "stream", "rows without it", "share"], lines)


def _tasks(manifest: Manifest, card: dict[str, Any]) -> Table:
    splits = [split for split in SPLITS if manifest.rows.get(split)]
    header = ["task", "kind", *(f"observed {s}" for s in splits), *(f"mean label {s}" for s in splits), "std train"]
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
    title = "Correlations of labels, over train rows where both are observed"
    if len(names) < 2:
        return Table(title, [], [])
    rows = zip(names, card["correlations"], strict=True)
    lines = [[name, *(NOTHING if x is None else f"{x:.3f}" for x in row)] for name, row in rows]
    return Table(title, ["task", *names], lines)


def _numbers(card: dict[str, Any]) -> Table:
    quantiles = ["1%", "25%", "50%", "75%", "99%"]
    lines = [
        [name, percent(found["missing"])]
        + [number(found[key]) for key in ("mean", "std", "min")]
        + [number(found["quantiles"].get(key)) for key in quantiles]
        + [number(found["max"])]
        for name, found in card["numbers"].items()
    ]
    header = ["number", "missing", "mean", "std", "min", *(f"{quantile} below" for quantile in quantiles), "max"]
    return Table("Numbers, before any transform (train)", header, lines)


def _ids(card: dict[str, Any]) -> Table:
    lines = []
    for name, found in card["ids"].items():
        cells = ["hashed", "", NOTHING, NOTHING]
        if "vocabulary" in found:
            top = f"{_cut(found['top'][0][0])} ({percent(found['top'][0][1])})" if found["top"] else NOTHING
            seen = f"{found['seen']:,} of {found['vocabulary']:,}"
            cells = [f"{found['distinct']:,}", seen, percent(found.get("unknown")), top]
        length = number(found["length"]) if found.get("length") is not None else NOTHING
        lines.append([name, percent(found["missing"]), *cells, length])
    header = ["id", "missing", "distinct values", "vocabulary seen", "unknown", "most frequent", "values in a list"]
    return Table("Ids (train)", header, lines)


def _others(card: dict[str, Any]) -> Table:
    lines = [[name, percent(found["missing"])] for name, found in card.get("others", {}).items()]
    return Table("Other features (train)", ["feature", "missing"], lines)


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
