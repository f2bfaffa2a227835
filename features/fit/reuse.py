"""Encoders of a schema that has grown: those of unchanged features are kept, the others are fitted on the new rows."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from features.fit.encoders import Encoders
from features.fit.fitted_files import NO_COUNTS
from features.schema.expressions import columns_of
from features.schema.origins import origins, reads_of
from features.schema.schema import Schema


@dataclass(frozen=True)
class Kept:
    """What two schemas have in common: features, embedding tables and labels of regression tasks that mean the same in both."""

    features: frozenset[str]
    tables: frozenset[str]
    labels: frozenset[str]


def unchanged(schema: Schema, known: Schema) -> Kept:
    """The features of `schema` that `known` has with the same settings and the same origins, and their tables.

    A shared table is kept where its settings are the same and one of its features is: a feature that joins it later finds the
    table's ids, and its own new values are unknown ones.
    """
    features = {
        name
        for name in schema.features.keys() & known.features.keys()
        if _definition(schema, name) == _definition(known, name)
    }
    tables = {schema.table_of(name) for name in features & schema.sparse.keys()}
    labels = {
        name for name in schema.tasks.keys() & known.tasks.keys() if _target(schema, name) == _target(known, name)
    }
    return Kept(frozenset(features), frozenset(tables), frozenset(labels))


def keep(fitted: Encoders, known: Encoders, kept: Kept, known_id: str) -> Encoders:
    """Encoders with what is `kept` of `known` (whose encoders_id is `known_id`), and all else as `fitted`."""

    def chosen(new: Mapping[str, Any], old: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
        return {name: old[name] if name in names and name in old else value for name, value in new.items()}

    return replace(
        fitted,
        vocabularies=chosen(fitted.vocabularies, known.vocabularies, kept.tables),
        counts=chosen(
            fitted.counts, {name: known.counts.get(name, NO_COUNTS) for name in known.vocabularies}, kept.tables
        ),
        moments=chosen(fitted.moments, known.moments, kept.features),
        edges=chosen(fitted.edges, known.edges, kept.features | kept.tables),
        missing=chosen(fitted.missing, known.missing, kept.features),
        # A task of which `known` has no scale is learnt as it is, in later runs as well: their towers start from earlier ones.
        labels={name: value for name, value in fitted.labels.items() if name not in kept.labels}
        | {name: value for name, value in known.labels.items() if name in kept.labels},
        kept_from=known_id,
        kept_tables=tuple(sorted(kept.tables)),
    )


def counter_means(schema: Schema, known: Encoders) -> dict[str, float]:
    """What the smoothed counters that mean the same in both schemas are smoothed towards."""
    return {
        name: mean
        for name, mean in known.counter_means.items()
        if name in schema.smoothed and origins(schema, [name]) == origins(known.schema, [name])
    }


def _target(schema: Schema, name: str) -> Any:
    """All that decides what a task's labels are, and in which scale they are learnt."""
    task = schema.tasks[name]
    reads = {*columns_of(task.label), *columns_of(task.observed_when or "NULL")}
    log = task.transform == "log1p", task.loss.name == "ziln"
    return task.kind, task.label, task.observed_when, log, origins(schema, reads)


def _definition(schema: Schema, name: str) -> Any:
    """All that decides which values a feature has, and how they are encoded."""
    feature = schema.features[name]
    table = schema.table(name).model_dump(mode="json") if name in schema.sparse else None
    columns = [schema.raw[name].column, *(reads_of(schema, name) if name in schema.histories else [])]
    return feature.section, feature.model_dump(mode="json", exclude_defaults=True), table, origins(schema, columns)
