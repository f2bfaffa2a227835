"""A dataset's card: statistics of its train split, and drift from an earlier dataset."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import UserError
from features.fit.encoders import Encoders
from features.fit.statistics import Statistics
from features.schema.schema import Schema
from pipeline.dataset.card.content import CardContent
from pipeline.dataset.card.drift import drift
from pipeline.dataset.card.statistics import id_statistics, number_statistics, or_none, share, task_statistics

VERSION = 1


def card(
    schema: Schema, encoders: Encoders, statistics: Statistics, reference: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The card as plain data for a JSON file; shares are in [0, 1], and None where nothing is known.

    Args:
        encoders: of the dataset; values outside their vocabularies are unknown.
        statistics: of the rows that the card describes.
        reference: the card of the dataset whose encoders are used; the card then has `drift` from it.
    Returns: a dictionary of
        version, rows;
        numbers: per dense feature and feature with a table of bins: missing, mean, std, min, max, quantiles, histogram (edges
            and counts of the middle 98% of values), cells (edges and shares of the present values);
        ids: per other feature: missing, length (mean of a bag's lists that are not empty), and of one with a vocabulary
            vocabulary (its size), seen (how many of its values), distinct, unknown, top, other_known, other_unknown, of a
            hashed one groups; shares but `missing` are of the values that are there;
        others: where there are any, per feature that is neither (a vector): missing;
        tasks: per task kind, observed, mean, std; correlations: in their order, over rows where both are observed;
        drift: per feature, the largest first: feature, psi, chance, verdict, missing, missing_before, unknown, unknown_before.
    """
    found = {
        "version": VERSION,
        "rows": statistics.rows,
        "numbers": {name: number_statistics(statistics, name) for name in statistics.digests},
        "ids": {
            name: id_statistics(schema, encoders, statistics, name)
            for name in schema.sparse
            if name not in statistics.raw
        },
        **_others(schema, statistics),
        "tasks": task_statistics(schema, statistics),
        "correlations": [[or_none(x) for x in row] for row in np.atleast_2d(statistics.labels.correlations())],
    }
    return found | ({} if reference is None else {"drift": drift(schema, encoders, statistics, found, reference)})


def _others(schema: Schema, statistics: Statistics) -> dict[str, Any]:
    others = [name for name in schema.features if name not in statistics.digests and name not in schema.sparse]
    missing = {name: {"missing": share(statistics.missing[name], statistics.rows)} for name in others}
    return {"others": missing} if missing else {}


def read_card(dataset: Path) -> dict[str, Any]:
    """The card in a dataset's folder.

    Raises:
        UserError: it is missing or of another version.
    """
    file = dataset / "statistics.json"
    try:
        text = file.read_bytes()
        version = json.loads(text)["version"]
        content = CardContent.model_validate_json(text) if version == VERSION else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{file} is missing or was not written by jobs.preprocess. Run jobs.preprocess again."
        ) from None
    if content is None:
        raise UserError(f"{file}: of version {version}, this release reads {VERSION}. Run jobs.preprocess again.")
    return content.model_dump(exclude_unset=True)
