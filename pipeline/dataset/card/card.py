"""A dataset's card: statistics of its train split, and drift from an earlier dataset."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import UserError
from features.fit.encoders import Encoders
from features.fit.split_counts import FeatureCounts
from features.fit.statistics import Statistics
from features.plain_json import read_json, validated
from features.schema.kept import NUMBER, TEXT, WHOLE
from features.schema.schema import SPLITS, Schema, Split
from pipeline.dataset.card.content import CardContent
from pipeline.dataset.card.drift import drift
from pipeline.dataset.card.statistics import (
    id_statistics,
    number_statistics,
    or_none,
    share,
    split_statistics,
    task_statistics,
)

VERSION = 1
KEPT_TYPES = {TEXT: "text", WHOLE: "integer", NUMBER: "number"}


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
            hashed one groups; shares but `missing` are of the values that are there; markers, where there are any: how often
            values occur that look like missing ones;
        others: where there are any, per feature that is neither (a vector): missing;
        kept: where there are any, per kept column (raw.NAME): type (text, integer, number), missing;
        tasks: per task kind, observed, mean, std; correlations: in their order, over rows where both are observed;
        drift: per feature, the largest first: feature, psi, chance, verdict, missing, missing_before, unknown, unknown_before.
        Once rows are encoded, `with_splits` adds splits.
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
        **_kept(schema, statistics),
        "tasks": task_statistics(schema, statistics),
        "correlations": [[or_none(x) for x in row] for row in np.atleast_2d(statistics.labels.correlations())],
    }
    return found | ({} if reference is None else {"drift": drift(schema, encoders, statistics, found, reference)})


def with_splits(found: dict[str, Any], counts: Mapping[Split, Mapping[str, FeatureCounts]]) -> dict[str, Any]:
    """A card with `splits`: per split (but train, unless the card is of all rows) and feature missing, unknown and mean."""
    return found | {"splits": {split: split_statistics(counts[split]) for split in SPLITS if split in counts}}


def _others(schema: Schema, statistics: Statistics) -> dict[str, Any]:
    others = [name for name in schema.features if name not in statistics.digests and name not in schema.sparse]
    missing = {name: {"missing": share(statistics.missing[name], statistics.rows)} for name in others}
    return {"others": missing} if missing else {}


def _kept(schema: Schema, statistics: Statistics) -> dict[str, Any]:
    kept = {
        column: {"type": KEPT_TYPES[kind], "missing": share(statistics.missing[column], statistics.rows)}
        for column, kind in schema.kept.items()
    }
    return {"kept": kept} if kept else {}


def read_card(dataset: Path, schema: Schema | None = None) -> dict[str, Any]:
    """The card in a dataset's folder.

    Args:
        schema: of the dataset, to compare features and tasks with.
    Raises:
        UserError: it is missing, damaged, of another version or of another schema.
    """
    file = dataset / "statistics.json"
    again = "Run jobs.preprocess again."
    try:
        found = read_json(dataset, file.name)
        version = found.get("version") if isinstance(found, dict) else None
        if version != VERSION and isinstance(version, int):
            raise UserError(f"{file}: of version {version}, this release reads {VERSION}")
        content = validated(CardContent, found, file)
    except OSError:
        raise UserError(f"{file} is missing or cannot be read. {again}") from None
    except UserError as error:
        raise UserError(f"{error}. {again}") from None
    if schema is None:
        return found
    features = content.numbers.keys() | content.ids.keys() | content.others.keys()
    kinds = {name: task.kind for name, task in schema.tasks.items()}
    features |= {name for found_in in content.splits.values() for name in found_in}
    kept = {column: entry.type for column, entry in content.kept.items()}
    if kept != {column: KEPT_TYPES[kind] for column, kind in schema.kept.items()}:
        raise UserError(f"{file}: its kept columns are not those of the schema. {again}")
    if features != schema.features.keys() or kinds != {name: task.kind for name, task in content.tasks.items()}:
        raise UserError(f"{file}: its features or tasks are not those of the schema. {again}")
    return found
