"""A schema without labels: for files that are to be scored, which know neither outcomes nor the columns of labels."""

from collections.abc import Iterable, Sequence

from features.errors import UserError
from features.schema.expressions import columns_of
from features.schema.schema import Schema
from features.schema.splits import HashSplit
from features.schema.table_checks import table_inputs


def without_labels(schema: Schema) -> Schema:
    """The same features, time and split; every label is missing, every weight 1, and no outcome is read.

    Histories and counters over outcomes or columns of labels are those of a state: a row of which these are not read adds
    nothing to them. Kept columns of outcomes, labels and the weight stay, without values. It keeps the fingerprints of the
    whole: what it reads is of that schema.
    """
    nothing = {name: {"when": "FALSE"} for name in schema.past if _labels_read(schema, name)}
    keep = _known_kept(schema)
    used = _read_columns(schema) | {*keep}
    for name in schema.past.keys() - nothing.keys():
        used |= {column for text in schema.past[name].expressions.values() for column in columns_of(text)}
    tables = {schema.table_columns[c] for c in schema.roots_of(used) if c in schema.table_columns}
    used |= {schema.source.tables[name].foreign_key for name in tables}
    derived = {name: text for name, text in schema.source.derived.items() if name in used}
    fields = {name: getattr(schema, name) for name in type(schema).model_fields}
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
        "keep": keep,
    }
    part = type(schema).model_construct(**fields)
    whole = {key: getattr(schema, key) for key in ("fingerprint", "inputs_fingerprint", "kept")}
    part.__dict__ |= whole
    return part


def for_scoring(schema: Schema, columns: Sequence[str], where: str) -> Schema:
    """The same features for rows to be scored: it keeps the key and `columns`, and all rows are in the split `test`.

    No row then lacks what decides its split, and rows stay in the order of the log. Its fingerprint is its own.

    Args:
        columns: raw, derived or added ones that are kept, in place of the schema's `keep`.
        where: names these in errors.
    Raises:
        UserError: a column that does not exist, that a dataset cannot hold, or that rows to be scored lack.
    """
    key = schema.source.key
    content = schema.model_dump(mode="json", exclude_unset=True)
    content["keep"] = [*dict.fromkeys([*([key] if key else []), *columns])]
    content["split"] = {"by": "row_index", "modulo": 1, "train": [], "test": [0]}
    found = Schema.parse(content, where)
    if lacking := [name for name in columns if name not in _known_kept(found)]:
        raise UserError(
            f"{where}: {lacking[0]} is of outcomes, labels or the weight alone, which rows to be scored lack: leave it out"
        )
    return found


def check_past(schema: Schema) -> None:
    """Raises UserError where a history or counter reads labels or outcomes: the log has none, and there is no state."""
    for name in schema.past:
        if read := _labels_read(schema, name):
            raise UserError(
                f"labels=none: {name} is made of {read[0]} of earlier rows, an outcome or label, and these are not there. Set "
                "state.from to the dataset of the earlier rows."
            )


def _labels_read(schema: Schema, name: str) -> list[str]:
    """The columns of outcomes, and those of labels alone, that a history or counter reads: files to be scored lack them."""
    texts = [text for task in schema.tasks.values() for text in (task.label, task.observed_when) if text]
    past = schema.past[name].expressions.values()
    read = schema.roots_of(column for text in past for column in columns_of(text)) - schema.source.derived.keys()
    return sorted(read & _alone(schema, texts))


def _known_kept(schema: Schema) -> list[str]:
    """The kept columns that files to be scored have: neither of outcomes, nor read by labels or the weight alone."""
    texts = [text for task in schema.tasks.values() for text in (task.label, task.observed_when) if text]
    later = _alone(schema, [*texts, *([schema.weight] if schema.weight else [])])
    return [name for name in schema.keep if not schema.roots_of([name, *table_inputs(schema, [name])]) & later]


def _alone(schema: Schema, texts: Iterable[str]) -> set[str]:
    """The columns of outcomes, and those that these expressions of labels read and no feature, time, row id, split or past."""
    read = schema.roots_of(column for text in texts for column in columns_of(text))
    known = schema.roots_of(_read_columns(schema)) | schema.table_columns.keys()  # of tables at the impression
    return schema.outcome_columns.keys() | (read - known)


def _read_columns(schema: Schema) -> set[str]:
    """The columns, raw or derived, that features, time, row id and split read, and those that histories and counters are by."""
    used = [raw.column for raw in schema.raw.values()]
    used += [schema.split.key] if isinstance(schema.split, HashSplit) else []
    used += [column for past in schema.past.values() for column in past.columns]
    return {*used, *(column for column in (schema.source.row_id, schema.event_time) if column)}
