"""A dataset's card: what its train split holds in numbers, and how far it drifted from an earlier dataset's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from features.errors import UserError
from features.fit.digest import Digest
from features.fit.encoders import Encoders
from features.fit.statistics import Moments, Statistics
from features.schema.schema import Schema

VERSION = 1
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BINS = 20  # of a histogram
CELLS = 10  # of a number, for drift
TOP = 50  # values of an id feature that are listed
FLOOR = 1e-4  # a cell that is empty on one side only must not make the index infinite
MOVES, SHIFTS = 0.1, 0.25  # the usual reading of a population stability index
DIGITS = 12  # what a digest gives is no more exact


def card(
    schema: Schema, encoders: Encoders, statistics: Statistics, reference: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The card as plain data for a JSON file; shares are in [0, 1], and None is what nothing is known of.

    Args:
        encoders: those of the dataset: what is not in their vocabularies is unknown.
        statistics: of the rows that the card speaks of.
        reference: the card of the dataset whose encoders are used again; then there is `drift` against it.
    Returns: a dictionary of
        version, rows;
        numbers: per dense feature and feature with a table of bins: missing, mean, std, min, max, quantiles, histogram (edges
            and counts of the middle 98% of values), cells (edges and shares of the present values);
        ids: per other feature: missing, length (mean of a bag's lists that are not empty), and of one with a vocabulary
            vocabulary (its size), seen (how many of its values), distinct, unknown, top, other_known, other_unknown, of a
            hashed one groups; shares but `missing` are of the values that are there;
        tasks: per task kind, observed, mean, std; correlations: in their order, over rows where both are observed;
        drift: per feature, the largest first: feature, psi, chance, verdict, missing, missing_before, unknown, unknown_before.
    """
    found = {
        "version": VERSION,
        "rows": statistics.rows,
        "numbers": {name: _number(statistics, name) for name in statistics.digests},
        "ids": {name: _ids(schema, encoders, statistics, name) for name in schema.sparse if name not in statistics.raw},
        "tasks": _tasks(schema, statistics),
        "correlations": [[_known(x) for x in row] for row in np.atleast_2d(statistics.labels.correlations())],
    }
    return found | ({} if reference is None else {"drift": _drift(schema, encoders, statistics, found, reference)})


def read_card(dataset: Path) -> dict[str, Any]:
    """The card in a dataset's folder.

    Raises:
        UserError: there is none, or it is of another version.
    """
    file = dataset / "statistics.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        version = found["version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is missing or not what jobs.preprocess wrote. Run jobs.preprocess again.") from None
    if version != VERSION:
        raise UserError(f"{file}: of version {version}, this release reads {VERSION}. Run jobs.preprocess again.")
    return found


def psi(share: np.ndarray, before: np.ndarray) -> float:
    """Population stability index: the sum over cells of (p - q) ln(p / q), no share counting as less than FLOOR.

    Args:
        share, before: of the same cells, each adding up to 1.
    """
    p, q = np.maximum(share, FLOOR), np.maximum(before, FLOOR)
    return float(((p - q) * np.log(p / q)).sum())


def verdict(index: float, chance: float = 0.0) -> str:
    """What is usually said of a population stability index, of the part of it that chance does not explain.

    Args:
        chance: the index to expect of two samples of one distribution: (cells - 1)(1 / rows + 1 / rows before).
    """
    excess = index - chance
    return "stable" if excess < MOVES else "moves" if excess <= SHIFTS else "shifted"


def _number(statistics: Statistics, name: str) -> dict[str, Any]:
    digest, moments = statistics.digests[name], statistics.raw[name]
    found: dict[str, Any] = {"missing": _share(statistics.missing[name], statistics.rows)}
    if not digest.count:
        return found | {
            **dict.fromkeys(("mean", "std", "min", "max")),
            "quantiles": {},
            "histogram": {"edges": [], "counts": []},
            "cells": {"edges": [], "shares": [0.0]},
        }
    edge, times = np.unique([_short(digest.quantile(i / CELLS)) for i in range(1, CELLS)], return_counts=True)
    edges = np.repeat(edge, np.minimum(times, 2))
    return found | {
        "mean": _short(moments.mean),
        "std": _short(moments.std),
        "min": digest.minimum,
        "max": digest.maximum,
        "quantiles": {f"{share * 100:.0f}%": _short(digest.quantile(share)) for share in QUANTILES},
        "histogram": _histogram(digest, moments),
        "cells": {"edges": edges.tolist(), "shares": _cells(digest, edges).tolist()},
    }


def _histogram(digest: Digest, moments: Moments) -> dict[str, Any]:
    """Counts of the values between the first and the last percent, which would stretch the picture to nothing."""
    low, high = digest.quantile(QUANTILES[0]), digest.quantile(QUANTILES[-1])
    if low == high:
        low, high = digest.minimum, digest.maximum
    if low == high:
        low, high = low - max(0.5, abs(low) / 2), high + max(0.5, abs(high) / 2)
    edges = np.linspace(low, high, BINS + 1)
    up_to = np.array([digest.below(edges[0]), *map(digest.at_most, edges[1:])])
    counts = np.maximum(np.rint(np.diff(up_to) * moments.count), 0).astype(int)
    return {"edges": [_short(edge) for edge in edges], "counts": counts.tolist()}


def _cells(digest: Digest, edges: np.ndarray) -> np.ndarray:
    """Shares of the values up to the first edge, from each to the next (which is in it), and beyond the last.

    An edge that is there twice is a value of many rows, and a cell of its own.
    """
    if not digest.count:
        return np.zeros(len(edges) + 1)
    first_of_two = np.append(edges[1:] == edges[:-1], False)[: len(edges)]
    up_to = [digest.below(x) if first else digest.at_most(x) for x, first in zip(edges, first_of_two, strict=True)]
    return np.diff([0.0, *up_to, 1.0]).round(DIGITS)


def _ids(schema: Schema, encoders: Encoders, statistics: Statistics, name: str) -> dict[str, Any]:
    counted, missing = name in statistics.values, statistics.missing[name]
    elements = int(statistics.values[name]["count"].sum() if counted else statistics.groups[name].sum())
    found: dict[str, Any] = {"missing": _share(missing, statistics.rows)}
    if name in schema.bag:
        found["length"] = _share(elements, statistics.rows - missing)
    if not counted:
        return found | {"groups": _shares(statistics.groups[name], elements).tolist()}
    counts = _counts(schema, encoders, statistics, name)
    top, rest = counts.head(TOP), counts.slice(TOP)
    return found | {
        "vocabulary": len(encoders.vocabularies[schema.table_of(name)]),
        "seen": int(counts["known"].sum()),
        "distinct": counts.height,
        "unknown": _share(_total(counts, ~pl.col("known")), elements),
        "top": [[value, _share(count, elements)] for value, count in top.select("value", "count").iter_rows()],
        "other_known": _share(_total(rest, pl.col("known")), elements) or 0.0,
        "other_unknown": _share(_total(rest, ~pl.col("known")), elements) or 0.0,
    }


def _tasks(schema: Schema, statistics: Statistics) -> dict[str, Any]:
    sums, found = statistics.labels, {}
    for index, (name, task) in enumerate(schema.tasks.items()):
        count, total, square = (
            float(np.atleast_2d(x)[index, index]) if x.ndim else 0.0
            for x in (sums.count_TT, sums.sum_TT, sums.square_TT)
        )
        mean = _share(total, count)
        std = None if mean is None else max(square / count - mean**2, 0.0) ** 0.5
        found[name] = {"kind": task.kind, "observed": _share(count, statistics.rows), "mean": mean, "std": std}
    return found


def _drift(
    schema: Schema, encoders: Encoders, statistics: Statistics, found: dict[str, Any], reference: dict[str, Any]
) -> list[dict[str, Any]]:
    """What changed, feature by feature; one that either side knows nothing of is left out."""
    lines = []
    for part in ("numbers", "ids"):
        for name, now in found[part].items():
            before = reference[part].get(name)
            if before is None or before["missing"] is None or now["missing"] is None:
                continue
            if part == "numbers":
                edges, shares_before = (np.array(before["cells"][key]) for key in ("edges", "shares"))
                shares = _cells(statistics.digests[name], edges)
            elif "groups" in now:
                shares, shares_before = np.array(now["groups"]), np.array(before["groups"])
            else:
                shares, shares_before = _id_cells(_counts(schema, encoders, statistics, name), before)
            index = psi(_with_missing(shares, now["missing"]), _with_missing(shares_before, before["missing"]))
            chance = len(shares) * (1 / found["rows"] + 1 / reference["rows"])
            line = {"feature": name, "psi": _short(index), "chance": _short(chance), "verdict": verdict(index, chance)}
            for key in ("missing", "unknown"):
                line |= {key: now.get(key), f"{key}_before": before.get(key)}
            lines.append(line)
    return sorted(lines, key=lambda line: (-line["psi"], line["feature"]))


def _id_cells(counts: pl.DataFrame, before: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Shares now and before of the values that were listed before, of other known ones, and of other unknown ones."""
    listed = pl.DataFrame(before["top"], schema={"value": pl.String, "share": pl.Float64}, orient="row")
    found = listed.join(counts, on="value", how="left", maintain_order="left")["count"].fill_null(0).to_list()
    rest = counts.join(listed, on="value", how="anti")
    cells = [*found, _total(rest, pl.col("known")), _total(rest, ~pl.col("known"))]
    cells_before = [*listed["share"].to_list(), before["other_known"], before["other_unknown"]]
    return _shares(np.array(cells), sum(cells)), np.array(cells_before)


def _with_missing(shares: np.ndarray, missing: float) -> np.ndarray:
    """Shares of the present values as shares of all, with the missing ones as a last cell."""
    return np.append(shares * (1 - missing), missing)


def _counts(schema: Schema, encoders: Encoders, statistics: Statistics, name: str) -> pl.DataFrame:
    """The frame (value, count, known) of a feature with a vocabulary, the most frequent first."""
    vocabulary = pl.Series(encoders.vocabularies[schema.table_of(name)], dtype=pl.String)
    counts = statistics.values[name].with_columns(known=pl.col("value").is_in(vocabulary.implode()))
    return counts.sort("count", "value", descending=[True, False])


def _total(counts: pl.DataFrame, which: pl.Expr) -> int:
    return int(counts.filter(which)["count"].sum())


def _shares(counts: np.ndarray, total: float) -> np.ndarray:
    return counts / total if total else np.zeros(len(counts))


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _short(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


def _known(number: float) -> float | None:
    return None if np.isnan(number) else _short(number)
