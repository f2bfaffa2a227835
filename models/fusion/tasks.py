"""What a fusion may need to know of its tasks, from the schema."""

from collections.abc import Mapping
from typing import NamedTuple

from features.schema.expressions import columns_of
from features.schema.task import Task, given_chain


class TaskInfo(NamedTuple):
    """A task of a model.

    Attributes:
        name, kind: as in the schema.
        given: the binary task on whose positive rows alone this one is defined, None for one of all rows.
        undeclared: tasks whose labels its `observed_when` reads without a `given` that says so. A condition on columns
            of its own label or of none, such as a window that has closed, leaves the probability that of all rows.
    """

    name: str
    kind: str = "binary"
    given: str | None = None
    undeclared: tuple[str, ...] = ()


def task_infos(tasks: Mapping[str, Task]) -> list[TaskInfo]:
    """Of a schema's tasks, in order."""
    infos = []
    for name, task in tasks.items():
        read = set(columns_of(task.observed_when or "NULL")) - set(columns_of(task.label))
        rest = tasks.keys() - {name, *given_chain(tasks, name)}
        others = [other for other in tasks if other in rest and read & set(columns_of(tasks[other].label))]
        infos.append(TaskInfo(name, task.kind, task.given, tuple(others)))
    return infos
