"""The schema: what a row of a log means, validated when it is read and identified by its fingerprint from then on."""

import hashlib
import json
import types
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError, create_model

from features.errors import UserError, did_you_mean, fault_text, join_faults
from features.kinds import KINDS, Bag, Categorical, Dense, Feature
from features.kinds.base import Layout, Raw
from features.kinds.tables import Table
from features.schema.checks import contradictions
from features.schema.expressions import columns_of
from features.schema.kept import kept_types
from features.schema.splits import SPLITS, HashSplit, RowIndexSplit, Split, TimeSplit
from features.schema.task import Task
from features.source import Counter, History, RawType, Source, Strict, outcome_names
from features.yaml_text import read_yaml

# Kinds whose names are in every fingerprint, be they used or not; those of later kinds only where they are.
FIRST_KINDS = ("dense", "categorical", "bag")


class Rows(Strict):
    """The first part of a schema."""

    source: Source
    tables: dict[str, Table] = Field({})


if TYPE_CHECKING:

    class Features(Rows):
        """The sections that other modules read by name."""

        dense: dict[str, Dense]
        categorical: dict[str, Categorical]
        bag: dict[str, Bag]

else:
    # A section a kind. `tasks` follow in a subclass, since the order of fields is that of a dataset's schema.yaml.
    Features = create_model(
        "Features", __base__=Rows, **{section: (dict[str, kind], Field({})) for section, kind in KINDS.items()}
    )


class Schema(Features):
    """What a row means (features, tasks, weight, time, split). Read one with `Schema.load` or `Schema.parse`."""

    tasks: dict[str, Task] = Field(min_length=1)
    weight: str | None = Field(None, description="SQL expression: weight of the row in every loss and metric")
    event_time: str | None = Field(
        None, description="column: seconds since 1970 UTC, dates and times (ISO 8601), or as source.times has it"
    )
    split: HashSplit | RowIndexSplit | TimeSplit = Field(discriminator="by")
    keep: list[str] = Field(
        [], description="columns whose values the dataset keeps as they are, for slices and keys of evaluation"
    )

    @classmethod
    def load(cls, path: Path) -> "Schema":
        """Reads and checks a schema file.

        Raises:
            UserError: naming the file, the key and what is allowed.
        """
        try:
            content = read_yaml(path)
        except FileNotFoundError:
            raise UserError(f"{path}: no such schema file") from None
        return cls.parse(content, where=path.name)

    @classmethod
    def parse(cls, content: Any, where: str) -> "Schema":
        """Checks a schema given as plain data; `where` names it in errors. Raises UserError."""
        try:
            schema = cls.model_validate(content)
        except ValidationError as error:
            raise UserError(join_faults([_message(where, e) for e in error.errors()])) from None
        if faults := list(contradictions(schema)):
            raise UserError(join_faults([f"{where}: {fault}" for fault in faults]))
        return schema

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of the schema's content; comments and defaults written out do not change it.

        Nor does the order of keys, but for that of features and tasks: it is the order of a model's inputs and logits. Nor do
        kept columns, which no model sees: a run can be evaluated on a dataset that keeps others than the one it was trained on.
        """
        order = [list(self._section(section)) for section in FIRST_KINDS]
        order += [list(self.tasks), *(list(section) for section in self._later_kinds())]
        # Without defaults, so that a release with one more setting still reads yesterday's datasets.
        # By alias, which is the first name of a key: a key that gets another name keeps its fingerprint.
        content = self.model_dump(mode="json", exclude_defaults=True, by_alias=True, exclude={"keep"})
        canonical = json.dumps([content, order], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def only(self, tasks: Sequence[str] | None) -> "Schema":
        """The same rows and features with some of the tasks (None: all), and still the fingerprint of the whole.

        Raises:
            UserError: a task that does not exist, or none.
        """
        if tasks is None:
            return self
        if not tasks or set(tasks) - self.tasks.keys():
            raise UserError(f"tasks: {list(tasks)}, allowed are some of {', '.join(self.tasks)}")
        fields = {name: getattr(self, name) for name in type(self).model_fields}  # and nothing cached of the whole
        fields["tasks"] = {name: task for name, task in self.tasks.items() if name in tasks}
        part = type(self).model_construct(**fields)
        part.__dict__["fingerprint"] = self.fingerprint
        return part

    @cached_property
    def inputs_fingerprint(self) -> str:
        """As `fingerprint`, of the features alone: schemas where it is the same can share encoders."""
        parts: list[dict[str, Any]] = [self.tables, *map(self._section, FIRST_KINDS), *self._later_kinds()]
        content = [[[n, f.model_dump(mode="json", exclude_defaults=True)] for n, f in part.items()] for part in parts]
        source = self.source.model_dump(mode="json", include={"types", "derived"})
        if self.source.tables:
            source["tables"] = {name: table.columns for name, table in self.source.tables.items()}
        if self.source.counters:  # left out where there are none, as it was before there were any
            source |= self.source.model_dump(mode="json", include={"counters"}, exclude_defaults=True)
        canonical = json.dumps([content, source], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def _section(self, section: str) -> dict[str, Feature]:
        return getattr(self, section)

    def _later_kinds(self) -> list[dict[str, Feature]]:
        return [found for section in KINDS if section not in FIRST_KINDS and (found := self._section(section))]

    @cached_property
    def features(self) -> dict[str, Feature]:
        """All features, kind by kind: the order of a dataset's columns."""
        return {name: feature for section in KINDS for name, feature in self._section(section).items()}

    def _laid_out(self, layout: Layout) -> dict[str, Any]:
        return {name: feature for name, feature in self.features.items() if feature.layout == layout}

    @cached_property
    def single(self) -> dict[str, Categorical]:
        """Features of one id a row."""
        return self._laid_out("id")

    @cached_property
    def lists(self) -> dict[str, Categorical]:
        """Features of a list of ids a row."""
        return self._laid_out("ids")

    @cached_property
    def sparse(self) -> dict[str, Categorical]:
        """All id features, single ones first, then lists: the order of a batch's keys."""
        return {**self.single, **self.lists}

    @cached_property
    def dense_ranges(self) -> dict[str, range]:
        """The columns of a batch's `dense_BD` that each feature of numbers has."""
        found, end = {}, 0
        for name, feature in self._laid_out("numbers").items():
            found[name] = range(end, end := end + feature.width)
        return found

    @cached_property
    def dense_width(self) -> int:
        """Columns of `dense_BD`."""
        return sum(map(len, self.dense_ranges.values()))

    @cached_property
    def columns(self) -> dict[str, pa.DataType]:
        """Columns of a dataset that hold features, with their types."""
        return {c: kind for name, feature in self.features.items() for c, kind in feature.fields(name).items()}

    @cached_property
    def kept(self) -> dict[str, pa.DataType]:
        """Columns of a dataset that hold those of `keep`, with their types; no inputs of a model."""
        return kept_types(self)

    @cached_property
    def all_tables(self) -> dict[str, Table]:
        """Every embedding table by name: the shared ones, and one for each feature that has its own."""
        return {**self.tables, **{name: f for name, f in self.sparse.items() if f.table is None}}

    def table_of(self, feature: str) -> str:
        """The name of the table in which an id feature is looked up."""
        return self.sparse[feature].table or feature

    def table(self, feature: str) -> Table:
        """The table in which an id feature is looked up."""
        return self.all_tables[self.table_of(feature)]

    @cached_property
    def raw(self) -> dict[str, Raw]:
        """The raw or derived column of each feature."""
        return {name: feature.raw(name, self) for name, feature in self.features.items()}

    @cached_property
    def raw_types(self) -> dict[str, RawType]:
        """Raw columns that are numbers: as declared, and those that features, event time and row id need."""
        implied: dict[str, RawType] = {raw.column: raw.type for raw in self.raw.values() if raw.type != "string"}
        if self.event_time:
            implied[self.event_time] = "time"
        implied |= dict.fromkeys(self.source.times, "time")
        if self.source.row_id:
            implied[self.source.row_id] = "int"
        known = self.source.derived.keys() | self.added_columns.keys() | self.table_columns.keys()
        return {**{c: t for c, t in implied.items() if c not in known}, **self.source.types}

    @cached_property
    def histories(self) -> dict[str, History]:
        """The bags that are made of a user's earlier rows."""
        return {name: bag.history for name, bag in self.bag.items() if bag.history}

    @property
    def past(self) -> dict[str, History | Counter]:
        """What is made of earlier rows: histories by the names of their bags, then counters."""
        return {**self.histories, **self.source.counters}

    @property
    def smoothed(self) -> list[str]:
        """The counters that need a mean of the train split."""
        return [name for name, counter in self.source.counters.items() if counter.smoothing is not None]

    @cached_property
    def raw_columns(self) -> list[str]:
        """The columns that must be read from the impressions' files, in a fixed order."""
        used = [raw.column for raw in self.raw.values()]
        used += [c for c in (self.source.key, self.source.row_id, self.event_time) if c]
        used += [self.split.key] if isinstance(self.split, HashSplit) else []
        used += [history.user for history in self.histories.values()]
        used += [table.foreign_key for table in self.source.tables.values()]
        used += [counter.by for counter in self.source.counters.values()]
        for expression in self.expressions.values():
            used += columns_of(expression)
        used += self.keep
        known = self.source.derived.keys() | self.added_columns.keys() | self.table_columns.keys()
        return list(dict.fromkeys(c for c in used if c not in known))

    @cached_property
    def outcome_columns(self) -> dict[str, str]:
        """Columns that a join adds, with the outcome they come from."""
        return {c: name for name, outcome in self.source.outcomes.items() for c in outcome_names(name, outcome)}

    @cached_property
    def table_columns(self) -> dict[str, str]:
        """Columns that side tables add, with the table they come from."""
        return {f"{name}_{column}": name for name, table in self.source.tables.items() for column in table.columns}

    @cached_property
    def added_columns(self) -> dict[str, str]:
        """Columns of expressions that are in no file of the impressions, with the key of what adds them."""
        found = {c: f"source.outcomes.{name}" for c, name in self.outcome_columns.items()}
        return found | {name: f"source.counters.{name}" for name in self.source.counters}

    def roots_of(self, columns: Iterable[str]) -> set[str]:
        """The columns, and those that derived ones among them are computed from."""
        derived = self.source.derived
        return {root for c in columns for root in [c, *(columns_of(derived[c]) if c in derived else [])]}

    def outcomes_of(self, expression: str) -> set[str]:
        """The outcomes that an expression reads, be it through derived columns."""
        roots = self.roots_of(columns_of(expression))
        return {self.outcome_columns[c] for c in roots if c in self.outcome_columns}

    @property
    def used_splits(self) -> set[Split]:
        """The splits that should have rows."""
        split = self.split
        if isinstance(split, HashSplit):
            return {name for name in SPLITS if name == "train" or getattr(split, name)}
        if isinstance(split, RowIndexSplit):
            return {name for name in SPLITS if getattr(split, name)}
        return {name for name in SPLITS if name != "valid" or split.valid_from < split.test_from}

    @cached_property
    def expressions(self) -> dict[str, str]:
        """Every SQL expression by the key it stands under."""
        found = {f"source.derived.{name}": text for name, text in self.source.derived.items()}
        for name, task in self.tasks.items():
            found[f"tasks.{name}.label"] = task.label
            if task.observed_when:
                found[f"tasks.{name}.observed_when"] = task.observed_when
        for name, history in self.histories.items():
            if history.when:
                found[f"bag.{name}.history.when"] = history.when
        for name, counter in self.source.counters.items():
            found |= {f"source.counters.{name}.{key}": text for key, text in counter.expressions.items()}
        return found | ({"weight": self.weight} if self.weight else {})


def _message(where: str, error: Any) -> str:
    """One validation error as: file, key, what is wrong, what is allowed."""
    loc = error["loc"]
    key = ".".join(str(part) for place, part in enumerate(loc) if not _is_tag(loc, place)) or "the whole file"
    if error["type"] != "extra_forbidden":
        return f"{where}: {key}: {fault_text(error)}"
    allowed = _allowed(loc[:-1])
    return f"{where}: {key}: unknown key{did_you_mean(str(loc[-1]), allowed)}, allowed are {', '.join(allowed)}"


def _is_tag(loc: Sequence[int | str], place: int) -> bool:
    """Whether a part of a location is the name of one of several models, which pydantic puts there."""
    if place == 1:
        return loc[0] == "split" and loc[1] in ("hash", "row_index", "time")
    return place == 3 and loc[0] == "tasks" and loc[2] == "loss"


def _allowed(loc: Sequence[int | str]) -> list[str]:
    """The keys that may stand under a location in a schema; pydantic's tags choose among several models."""
    kinds: list[Any] = [Schema]
    for place, key in enumerate(map(str, loc)):
        if _is_tag(loc, place):
            kinds = [kind for kind in kinds if any(key in get_args(f.annotation) for f in kind.model_fields.values())]
        else:
            kinds = [found for kind in kinds for found in _below(kind, key)]
    return list(dict.fromkeys(name for kind in kinds for name in kind.model_fields))


def _below(kind: Any, key: str) -> list[Any]:
    """What may stand under a key of a model or dict: models, and dicts of them."""
    return _options(get_args(kind)[1] if get_origin(kind) is dict else kind.model_fields[key].annotation)


def _options(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [found for option in get_args(annotation) for found in _options(option)]
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if is_model or get_origin(annotation) is dict else []
