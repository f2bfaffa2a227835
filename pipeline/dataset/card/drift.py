"""How far a dataset drifted from an earlier one: population stability indices per feature."""

from typing import Any

import numpy as np
import polars as pl

from features.errors import UserError
from features.fit.encoders import Encoders
from features.fit.statistics import Statistics
from features.schema.schema import Schema
from pipeline.dataset.card.statistics import cells, rounded, shares_of, total, value_counts

FLOOR = 1e-4  # keeps the index finite where a cell is empty on one side
MOVES, SHIFTS = 0.1, 0.25  # the usual reading of a population stability index


def psi(share: np.ndarray, before: np.ndarray) -> float:
    """Population stability index: the sum over cells of (p - q) ln(p / q), no share counting as less than FLOOR.

    Args:
        share, before: of the same cells, each adding up to 1.
    """
    p, q = np.maximum(share, FLOOR), np.maximum(before, FLOOR)
    return float(((p - q) * np.log(p / q)).sum())


def verdict(index: float, chance: float = 0.0) -> str:
    """The usual reading of a population stability index, less the part that chance explains.

    Args:
        chance: the index to expect of two samples of one distribution: (cells - 1)(1 / rows + 1 / rows before).
    """
    excess = index - chance
    return "stable" if excess < MOVES else "moves" if excess <= SHIFTS else "shifted"


def drift(
    schema: Schema, encoders: Encoders, statistics: Statistics, found: dict[str, Any], reference: dict[str, Any]
) -> list[dict[str, Any]]:
    """Drift by feature, the largest first; features without statistics on either side are left out."""
    lines = []
    for part in ("numbers", "ids"):
        for name, now in found[part].items():
            before = reference[part].get(name)
            if before is None or before["missing"] is None or now["missing"] is None or not reference["rows"]:
                continue
            if len(now.get("groups", ())) != len(before.get("groups", ())):
                raise UserError(f"statistics.json of the dataset of the encoders: {name} has another number of groups")
            if part == "numbers":
                edges, shares_before = (np.array(before["cells"][key]) for key in ("edges", "shares"))
                shares = cells(statistics.digests[name], edges)
            elif "groups" in now:
                shares, shares_before = np.array(now["groups"]), np.array(before["groups"])
            else:
                shares, shares_before = _id_cells(value_counts(schema, encoders, statistics, name), before)
            index = psi(_with_missing(shares, now["missing"]), _with_missing(shares_before, before["missing"]))
            chance = len(shares) * (1 / found["rows"] + 1 / reference["rows"])
            line = {
                "feature": name,
                "psi": rounded(index),
                "chance": rounded(chance),
                "verdict": verdict(index, chance),
            }
            for key in ("missing", "unknown"):
                line |= {key: now.get(key), f"{key}_before": before.get(key)}
            lines.append(line)
    return sorted(lines, key=lambda line: (-line["psi"], line["feature"]))


def _id_cells(counts: pl.DataFrame, before: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Shares now and before of the values listed before, of all other known ones, and of all other unknown ones."""
    listed = pl.DataFrame(before["top"], schema={"value": pl.String, "share": pl.Float64}, orient="row")
    found = listed.join(counts, on="value", how="left", maintain_order="left")["count"].fill_null(0).to_list()
    rest = counts.join(listed, on="value", how="anti")
    cells = [*found, total(rest, pl.col("known")), total(rest, ~pl.col("known"))]
    cells_before = [*listed["share"].to_list(), before["other_known"], before["other_unknown"]]
    return shares_of(np.array(cells), sum(cells)), np.array(cells_before)


def _with_missing(shares: np.ndarray, missing: float) -> np.ndarray:
    """Shares of the present values as shares of all, with the missing ones as a last cell."""
    return np.append(shares * (1 - missing), missing)
