"""The schema: what a row of a log means, checked when it is read and known by its fingerprint ever after."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time, timezone
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AwareDatetime, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from features.errors import UserError
from features.schema.expressions import columns_of
from features.schema.kinds import Bag, Categorical, Dense, Managed, Table, Vocabulary
from features.schema.source import Format, History, Outcome, RawType, Source, Strict

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
TAKEN = ("weight", "event_time", "row_id")  # columns of every dataset


def utc(value: Any) -> Any:
    """Dates and times without a zone are UTC: a split must not move with the machine's zone."""
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    if isinstance(moment, date) and not isinstance(moment, datetime):  # what YAML makes of a date without quotes
        moment = datetime.combine(moment, time())
    return moment.replace(tzinfo=timezone.utc) if isinstance(moment, datetime) and moment.tzinfo is None else value


class Task(Strict):
    """Something to predict. `label` and `observed_when` are SQL expressions over raw columns."""

    kind: Literal["binary", "regression"]
    label: str
    observed_when: str | None = None
    loss_weight: float = Field(1.0, ge=0, allow_inf_nan=False)


class HashSplit(Strict):
    """Rows with the same key are in the same split; `valid` and `test` are shares of the keys."""

    by: Literal["hash"]
    key: str
    valid: float = Field(ge=0, lt=1)
    test: float = Field(ge=0, lt=1)

    @model_validator(mode="after")
    def _something_to_train_on(self) -> "HashSplit":
        if self.valid + self.test >= 1:
            raise ValueError("valid and test together must be less than 1")
        return self


class RowIndexSplit(Strict):
    """A row's index in its file modulo `modulo` says its split."""

    by: Literal["row_index"]
    modulo: int = Field(ge=1)
    train: list[int]
    valid: list[int] = Field([])
    test: list[int] = Field([])

    @model_validator(mode="after")
    def _every_remainder_once(self) -> "RowIndexSplit":
        if sorted(self.train + self.valid + self.test) != list(range(self.modulo)):
            raise ValueError(f"train, valid and test must hold each of 0..{self.modulo - 1} once")
        return self


class TimeSplit(Strict):
    """train | valid_from <= valid < test_from | test, by event time; dates are UTC."""

    by: Literal["time"]
    valid_from: Annotated[AwareDatetime, BeforeValidator(utc)]
    test_from: Annotated[AwareDatetime, BeforeValidator(utc)]

    @model_validator(mode="after")
    def _in_order(self) -> "TimeSplit":
        if self.valid_from > self.test_from:
            raise ValueError("valid_from must not be after test_from")
        return self


class Schema(Strict):
    """What a row means (features, tasks, weight, time, split). Read one with `Schema.load` or `Schema.parse`."""

    source: Source
    tables: dict[str, Table] = Field({})
    dense: dict[str, Dense] = Field({})
    categorical: dict[str, Categorical] = Field({})
    bag: dict[str, Bag] = Field({})
    tasks: dict[str, Task] = Field(min_length=1)
    weight: str | None = Field(None, description="SQL expression: weight of the row in every loss and metric")
    event_time: str | None = Field(None, description="column: seconds since 1970 UTC, or dates and times (ISO 8601)")
    split: HashSplit | RowIndexSplit | TimeSplit = Field(discriminator="by")

    @classmethod
    def load(cls, path: Path) -> "Schema":
        """Reads and checks a schema file.

        Raises:
            UserError: naming the file, the key and what is allowed.
        """
        try:
            return cls.parse(yaml.safe_load(path.read_text()), where=path.name)
        except FileNotFoundError:
            raise UserError(f"{path}: no such schema file") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not YAML: {error}") from None

    @classmethod
    def parse(cls, content: Any, where: str) -> "Schema":
        """Checks a schema given as plain data; `where` names it in errors. Raises UserError."""
        try:
            schema = cls.model_validate(content)
        except ValidationError as error:
            raise UserError("; ".join(_say(where, e) for e in error.errors())) from None
        if faults := list(_contradictions(schema)):
            raise UserError("; ".join(f"{where}: {fault}" for fault in faults))
        return schema

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of the schema's content; comments and defaults written out do not change it.

        Nor does the order of keys, but for that of features and tasks: it is the order of a model's inputs and logits.
        """
        order = [list(names) for names in (self.dense, self.categorical, self.bag, self.tasks)]
        # Without defaults, so that a release with one more setting still knows yesterday's datasets.
        # By alias, which is the first name of a key: a key that gets another name keeps its fingerprint.
        content = self.model_dump(mode="json", exclude_defaults=True, by_alias=True)
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
        parts = [getattr(self, name) for name in ("tables", "dense", "categorical", "bag")]
        content = [[[n, f.model_dump(mode="json", exclude_defaults=True)] for n, f in part.items()] for part in parts]
        source = self.source.model_dump(mode="json", include={"types", "derived"})
        canonical = json.dumps([content, source], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @cached_property
    def sparse(self) -> dict[str, Categorical]:
        """All id features, categorical first, then bags: the order of a batch's keys."""
        return {**self.categorical, **self.bag}

    @cached_property
    def all_tables(self) -> dict[str, Table]:
        """Every embedding table by name: the shared ones, and one for each feature that has its own."""
        return {**self.tables, **{name: f for name, f in self.sparse.items() if f.table is None}}

    def table_of(self, feature: str) -> str:
        """The name of the table in which an id feature is looked up."""
        return self.sparse[feature].table or feature

    @cached_property
    def dense_columns(self) -> list[str]:
        """Dense input columns in order: each feature, followed by its missing flag where it has one."""
        return [c for name, f in self.dense.items() for c in [name, f"{name}_missing"][: 1 + f.missing_flag]]

    @cached_property
    def raw_types(self) -> dict[str, RawType]:
        """Raw columns that are numbers: as declared, and those that dense features and event time need."""
        numbers = [*self.dense, *(name for name in self.sparse if self.all_tables[self.table_of(name)].bins)]
        implied: dict[str, RawType] = {self.feature_columns[name]: "float" for name in numbers}
        if self.event_time:
            implied[self.event_time] = "time"
        if self.source.row_id:
            implied[self.source.row_id] = "int"
        derived = self.source.derived.keys()
        return {**{c: t for c, t in implied.items() if c not in derived}, **self.source.types}

    @cached_property
    def feature_columns(self) -> dict[str, str]:
        """The raw or derived column that each feature reads."""
        columns = {name: f.column or name for name, f in self.dense.items()}
        columns |= {name: f.column or name for name, f in self.sparse.items()}
        return columns | {name: history.item for name, history in self.histories.items()}

    @cached_property
    def histories(self) -> dict[str, History]:
        """The bags that are made of a user's earlier rows."""
        return {name: bag.history for name, bag in self.bag.items() if bag.history}

    @cached_property
    def raw_columns(self) -> list[str]:
        """The columns that must be read from the impressions' files, in a fixed order."""
        used = list(self.feature_columns.values())
        used += [c for c in (self.source.key, self.source.row_id, self.event_time) if c]
        used += [self.split.key] if isinstance(self.split, HashSplit) else []
        used += [history.user for history in self.histories.values()]
        for expression in self.expressions.values():
            used += columns_of(expression)
        known = self.source.derived.keys() | self.outcome_columns.keys()
        return list(dict.fromkeys(c for c in used if c not in known))

    @cached_property
    def outcome_columns(self) -> dict[str, str]:
        """Columns that a join adds, with the outcome they come from."""
        return {c: name for name, outcome in self.source.outcomes.items() for c in outcome_names(name, outcome)}

    def outcomes_of(self, expression: str) -> set[str]:
        """The outcomes that an expression reads, be it through derived columns."""
        roots = columns_of(expression)
        roots += [c for root in roots if root in self.source.derived for c in columns_of(self.source.derived[root])]
        return {self.outcome_columns[c] for c in roots if c in self.outcome_columns}

    @property
    def used_splits(self) -> set[Split]:
        """The splits that the schema means to have rows."""
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
        return found | ({"weight": self.weight} if self.weight else {})


def outcome_names(name: str, outcome: Outcome) -> list[str]:
    """The columns that the join of an outcome adds."""
    return [name, *(f"{name}_{c}" for c in ["count", *(["time"] if outcome.time else []), *outcome.columns])]


def _contradictions(schema: Schema) -> Iterator[str]:
    """What single keys cannot see: names that clash, tables that are missing, labels among the inputs."""
    reads: dict[str, list[str]] = {}
    for key, expression in schema.expressions.items():
        try:
            reads[key] = columns_of(expression)
        except ValueError as error:
            yield f"{key}: {error}"
            return
    derived = {name: reads[f"source.derived.{name}"] for name in schema.source.derived}
    for name, columns in derived.items():
        if nested := [c for c in columns if c in derived]:
            yield f"source.derived.{name} reads {nested[0]}, which is derived itself: write it from raw columns"
    if schema.source.outcomes and not schema.source.key:
        yield "source.key is missing: outcomes need the column of the impressions that they refer to"
    if isinstance(schema.split, TimeSplit) and not schema.event_time:
        yield "event_time is missing: a split by time needs it"
    yield from _without_time(schema)
    yield from _added_twice(schema)
    names = [*schema.dense_columns, *schema.sparse]
    if twice := {n for n in names if names.count(n) > 1}:
        yield f"feature {sorted(twice)[0]} is defined twice: dense, categorical and bag share one namespace"
    for name in dict.fromkeys([*names, *schema.tables]):
        if name in TAKEN:
            yield f"feature {name} has a name that datasets need themselves: rename it, with column: {name}"
        if not re.fullmatch(r"[^./\\]+", name):
            yield f"feature or table {name!r} has a name that cannot name a file or a module: rename it without . and /"
    for name, feature in schema.sparse.items():
        if feature.table and feature.table not in schema.tables:
            yield f"{name}.table is {feature.table}, allowed are {sorted(schema.tables)} (see tables)"
        elif not feature.table and name in schema.tables:
            yield f"feature {name} has its own table, but tables.{name} exists: write table: {name}, or rename one"
        elif name in schema.bag and schema.all_tables[schema.table_of(name)].bins:
            yield f"bag {name} has table {feature.table}, which is of bins: only a categorical feature can be a number's"
    for table in schema.tables.keys() - {f.table for f in schema.sparse.values()}:
        yield f"tables.{table} is used by no feature: remove it, or write table: {table} in one"
    if schema.source.columns is not None:
        for column in schema.raw_columns:
            if column not in schema.source.columns:
                yield f"column {column} is used, but source.columns does not list it"

    def roots(columns: list[str]) -> set[str]:
        return {root for c in columns for root in [c, *derived.get(c, [])]}

    keys: dict[str, str | None] = {
        "source.key": schema.source.key,
        "source.row_id": schema.source.row_id,
        "event_time": schema.event_time,
    }
    keys |= {"split.key": schema.split.key if isinstance(schema.split, HashSplit) else None}
    for key, used in keys.items():
        if used and (later := sorted(roots([used]) & schema.outcome_columns.keys())):
            yield f"{key} reads {later[0]}, which an outcome adds: it must be a column of the impressions"
    for name, column in schema.feature_columns.items():
        history = schema.histories.get(name)
        inputs = roots([column, history.user] if history else [column])
        if later := sorted(inputs & schema.outcome_columns.keys()):
            yield f"feature {name} reads {later[0]}, an outcome that is known only after the impression. Remove it."
        for task, spec in schema.tasks.items():
            if answer := sorted(inputs & roots(columns_of(spec.label))):
                yield (
                    f"tasks.{task}.label uses column {answer[0]}, which is also read by the feature {name}: "
                    "a model would see its answer. Remove one of the two."
                )


def _added_twice(schema: Schema) -> Iterator[str]:
    """Columns of expressions that two parts of the schema add."""
    outcomes = schema.source.outcomes.items()
    added = [c for name, o in outcomes for c in outcome_names(name, o)] + list(schema.source.derived)
    for column in sorted({c for c in added if added.count(c) > 1}):
        yield f"column {column} is added twice, by source.outcomes or source.derived: rename an outcome or a column of it"


def _without_time(schema: Schema) -> Iterator[str]:
    """What an order in time is needed for, and there is none."""
    for name, stream in schema.source.outcomes.items():
        if stream.time and not schema.event_time:
            yield f"event_time is missing: outcome {name} has a time, which is compared with it"
    for name, history in schema.histories.items():
        if not schema.event_time:
            yield f"event_time is missing: the history of bag {name} is what was before it"
        for outcome in schema.outcomes_of(history.when) if history.when else ():
            stream = schema.source.outcomes[outcome]
            if not stream.time:
                yield f"bag {name}: its history reads outcome {outcome}, which has no time: when was it known?"
            elif str(history.when).strip() != outcome and (stream.window is None or stream.late == "keep"):
                yield (
                    f"bag {name}: history.when asks more of outcome {outcome} than that it happened, which is known only once "
                    "a window has closed: give the outcome a window (and late: drop)"
                )


def _say(where: str, error: Any) -> str:
    """One validation error as: file, key, what is wrong, what is allowed."""
    loc = [
        str(part) for part in error["loc"] if part not in ("hash", "row_index", "time") or error["loc"][0] != "split"
    ]
    key = ".".join(loc) or "the whole file"
    if error["type"] != "extra_forbidden":
        return f"{where}: {key}: {error['msg']}"
    return f"{where}: {key}: unknown key, allowed are {', '.join(_allowed(loc[:-1]))}"


def _allowed(path: list[str]) -> list[str]:
    """The keys that may stand under `path` in a schema."""
    sections: dict[str, type[BaseModel]] = {
        "tables": Table,
        "dense": Dense,
        "categorical": Categorical,
        "bag": Bag,
        "tasks": Task,
    }
    if not path:
        return list(Schema.model_fields)
    if path[0] == "source":
        kind = Source if path[1:2] != ["outcomes"] else Format if path[3:] == ["read"] else Outcome
        return list(kind.model_fields)
    if path[0] == "split":
        return sorted({k for kind in (HashSplit, RowIndexSplit, TimeSplit) for k in kind.model_fields})
    if path[2:] == ["history"]:
        return list(History.model_fields)
    if path[2:] == ["vocabulary"]:
        return list(Vocabulary.model_fields)
    if path[2:] == ["managed"]:
        return list(Managed.model_fields)
    return list(sections[path[0]].model_fields)
