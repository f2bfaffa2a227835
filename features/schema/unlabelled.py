"""A schema without labels: for files that are to be scored, which know neither outcomes nor the columns of labels."""

from features.errors import UserError
from features.schema.expressions import columns_of
from features.schema.schema import Schema
from features.schema.splits import HashSplit


def without_labels(schema: Schema) -> Schema:
    """The same features, time and split; every label is missing, every weight 1, and no outcome is read.

    It keeps the fingerprints of the whole: what it reads is of that schema.
    """
    used = _read_columns(schema)
    tables = {schema.table_columns[c] for c in schema.roots_of(used) if c in schema.table_columns}
    used |= {schema.source.tables[name].asks for name in tables}
    derived = {name: text for name, text in schema.source.derived.items() if name in used}
    fields = {name: getattr(schema, name) for name in type(schema).model_fields}
    fields |= {
        "source": schema.source.model_copy(
            update={
                "outcomes": {},
                "key": None,
                "derived": derived,
                "tables": {name: table for name, table in schema.source.tables.items() if name in tables},
            }
        ),
        "tasks": {n: t.model_copy(update={"label": "NULL", "observed_when": None}) for n, t in schema.tasks.items()},
        "weight": None,
    }
    part = type(schema).model_construct(**fields)
    part.__dict__ |= {"fingerprint": schema.fingerprint, "inputs_fingerprint": schema.inputs_fingerprint}
    return part


def check_histories(schema: Schema) -> None:
    """Raises UserError where a history reads an outcome: without labels no outcome is read."""
    for name, history in schema.histories.items():
        if history.when and (read := sorted(schema.outcomes_of(history.when))):
            raise UserError(
                f"labels=none: bag {name} is a history of outcome {read[0]}, which is not read. Leave labels=none out, and "
                "give the files of the outcomes"
            )


def _read_columns(schema: Schema) -> set[str]:
    """The columns, raw or derived, that features, histories, time, row id and split read."""
    used = [raw.column for raw in schema.raw.values()]
    used += [schema.split.key] if isinstance(schema.split, HashSplit) else []
    used += [counter.by for counter in schema.source.counters.values()]
    for history in schema.histories.values():
        used += [history.user, history.item, *(columns_of(history.when) if history.when else ())]
    return {*used, *(column for column in (schema.source.row_id, schema.event_time) if column)}
