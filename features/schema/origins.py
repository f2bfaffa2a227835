"""What the values of columns depend on, so that two schemas can be compared by it."""

from collections.abc import Iterable
from typing import Any

from features.schema.expressions import columns_of
from features.schema.schema import Schema


def origins(schema: Schema, columns: Iterable[str]) -> dict[str, Any]:
    """Each column, and those that it is made of, with its type, expression or what adds it.

    Equal ones mean the same in two schemas. Where the files of outcomes and side tables are, and how they are written, is
    left out, and so are other columns of a side table.
    """
    source, found, left = schema.source, dict[str, Any](), [*columns]
    while left:
        column = left.pop()
        if column in found:
            continue
        own: Any = schema.raw_types.get(column, "string")
        reads: list[str] = []
        if counter := source.counters.get(column):
            own = counter.model_dump(mode="json", exclude_defaults=True)
            reads = reads_of(schema, column)
        elif expression := source.derived.get(column):
            own, reads = {"derived": expression}, columns_of(expression)
        elif name := schema.outcome_columns.get(column):
            own = source.outcomes[name].model_dump(mode="json", exclude_defaults=True, exclude={"files", "read"})
            reads = [str(source.key)]
        elif name := schema.table_columns.get(column):
            table = source.tables[name]
            own = table.model_dump(mode="json", exclude_defaults=True, exclude={"files", "read", "columns"})
            own, reads = own | {"type": table.columns[column[len(name) + 1 :]]}, [table.foreign_key]
        found[column] = own
        left += reads
    return found


def reads_of(schema: Schema, past: str) -> list[str]:
    """The columns that the events of a history or counter are made of."""
    made = schema.past[past]
    return [*made.columns, *(column for text in made.expressions.values() for column in columns_of(text))]
