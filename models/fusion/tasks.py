"""What a fusion may need to know of its tasks, from the schema."""

from collections.abc import Mapping
from typing import NamedTuple

from features.schema.expressions import columns_of
from features.schema.schema import Task


class TaskInfo(NamedTuple):
    """A task of a model.

    Attributes:
        name, kind: as in the schema.
        given: the binary task on whose positive rows alone this one is defined, None for one of all rows.
        undeclared: tasks whose labels its `observed_when` reads without a `given` that says so.
    """

    name: str
    kind: str = "binary"
    given: str | None = None
    undeclared: tuple[str, ...] = ()


def task_infos(tasks: Mapping[str, Task]) -> list[TaskInfo]:
    """Of a schema's tasks, in order."""
    infos = []
    for name, task in tasks.items():
        read = set(columns_of(task.observed_when)) if task.observed_when and not task.given else set()
        others = [other for other in tasks if other != name and read & set(columns_of(tasks[other].label))]
        infos.append(TaskInfo(name, task.kind, task.given, tuple(others)))
    return infos
