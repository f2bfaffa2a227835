"""A schema without labels: for files that are to be scored, which know neither outcomes nor the columns of labels."""

from features.errors import UserError
from features.schema.expressions import columns_of
from features.schema.schema import Schema
from features.schema.splits import HashSplit


def without_labels(schema: Schema) -> Schema:
    """The same features, time and split; every label is missing, every weight 1, and no outcome is read.

    Histories and counters over outcomes are those of a state: a row whose outcomes are not read adds nothing to them. It keeps
    the fingerprints of the whole: what it reads is of that schema.
    """
    used = _read_columns(schema)
    tables = {schema.table_columns[c] for c in schema.roots_of(used) if c in schema.table_columns}
    used |= {schema.source.tables[name].asks for name in tables}
    derived = {name: text for name, text in schema.source.derived.items() if name in used}
    fields = {name: getattr(schema, name) for name in type(schema).model_fields}
    nothing = {name: {"when": "FALSE"} for name in schema.past if _outcomes_of(schema, name)}
    counters = {
        name: counter.model_copy(update={**nothing[name], "of": counter.of and "0"}) if name in nothing else counter
        for name, counter in schema.source.counters.items()
    }
    side_tables = {name: table for name, table in schema.source.tables.items() if name in tables}
    changes = {"outcomes": {}, "key": None, "derived": derived, "counters": counters, "tables": side_tables}
    fields |= {
        "source": schema.source.model_copy(update=changes),
        "bag": {
            name: bag.model_copy(update={"history": bag.history.model_copy(update=nothing[name])})
            if bag.history and name in nothing
            else bag
            for name, bag in schema.bag.items()
        },
        "tasks": {n: t.model_copy(update={"label": "NULL", "observed_when": None}) for n, t in schema.tasks.items()},
        "weight": None,
    }
    part = type(schema).model_construct(**fields)
    part.__dict__ |= {"fingerprint": schema.fingerprint, "inputs_fingerprint": schema.inputs_fingerprint}
    return part


def check_past(schema: Schema) -> None:
    """Raises UserError where a history or counter reads an outcome: an unlabelled log has none, and there is no state."""
    for name in schema.past:
        if read := _outcomes_of(schema, name):
            raise UserError(
                f"labels=none: {name} is made of outcome {read[0]} of earlier rows, and these are not there. Set state.from to "
                "the dataset of the earlier rows."
            )


def _outcomes_of(schema: Schema, name: str) -> list[str]:
    """The outcomes that a history or counter reads."""
    return sorted(outcome for text in schema.past[name].expressions.values() for outcome in schema.outcomes_of(text))


def _read_columns(schema: Schema) -> set[str]:
    """The columns, raw or derived, that features, histories, time, row id and split read."""
    used = [raw.column for raw in schema.raw.values()]
    used += [schema.split.key] if isinstance(schema.split, HashSplit) else []
    for past in schema.past.values():
        used += past.columns + [column for text in past.expressions.values() for column in columns_of(text)]
    return {*used, *(column for column in (schema.source.row_id, schema.event_time) if column)}
