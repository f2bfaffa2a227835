"""Section `source` of a schema: files and their format, outcomes, side tables, histories, counters."""

import logging
import re
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, available_timezones

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from features.time_units import DEFAULT, check_unit

logger = logging.getLogger(__name__)

RawType = Literal["int", "float", "string", "time"]
LINE_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20  # a line is in memory several times while it is read
ROW_LINES = 1000  # a stray quote is searched for its end in as many lines; texts that people write have some tens
MAX_ROW_LINES = 1_000_000
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


class Strict(BaseModel):
    """A part of the schema: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _seconds(value: Any) -> Any:
    """30m, 12h, 7d as seconds; a number is seconds already."""
    if isinstance(value, str) and (found := re.fullmatch(r"(\d+)\s*([smhdw])", value.strip())):
        return int(found[1]) * SECONDS[found[2]]
    return value


Duration = Annotated[
    int, BeforeValidator(_seconds), Field(gt=0, le=10**10, description="seconds, or a number with s, m, h, d or w")
]


class Format(Strict):
    """How files are written: what is needed to read text and numbers.

    With `multiline` quoted values may hold line breaks; then a file is read in one piece. A row is named by its first line.
    """

    format: str = Field("csv", description="name of a registered raw format (pipeline/ingest/formats)")
    columns: list[str] | None = Field(None, description="names in order for CSV files without a header line")
    delimiter: str = Field(",", min_length=1, max_length=1)
    quote: str | None = Field('"', min_length=1, max_length=1, description="null: quotes are characters like others")
    multiline: bool = Field(
        False, description="quoted values may hold line breaks; then each file is read in one piece"
    )
    max_line_bytes: int = Field(
        LINE_BYTES,
        ge=1,
        le=MAX_LINE_BYTES,
        description="of text formats; longer lines (with multiline rows) are bad rows",
    )
    max_row_lines: int = Field(
        ROW_LINES,
        ge=1,
        le=MAX_ROW_LINES,
        description="of CSV: lines that a row may take before its quote counts as stray",
    )
    missing: list[str] = [""]
    trim: bool = Field(False, description="strip spaces around every value")
    timezone: str = Field("UTC", description="of times that name none")
    times: dict[str, Annotated[str, AfterValidator(check_unit)]] = Field(
        {}, description="by column s, ms, us or ns since 1970, index (a plain order), or a strptime format"
    )
    optional: dict[str, str | int | float | None] = Field(
        {}, description="columns that only some files have, each with its value in the others; null: missing"
    )

    @field_validator("delimiter", "quote")
    @classmethod
    def _one_byte(cls, sign: str | None) -> str | None:
        if sign is not None and (not sign.isascii() or sign in "\r\n"):
            raise ValueError(f"{sign!r} is not one ASCII character within a line, such as , or \\t")
        return sign

    @model_validator(mode="after")
    def _distinct(self) -> "Format":
        if self.quote == self.delimiter:
            raise ValueError(f"quote and delimiter are both {self.quote!r}: change one of them, or set quote: null")
        return self

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in available_timezones() - {"localtime", "Factory"}:  # the machine's own, and a placeholder
            raise ValueError(f"{name} is no time zone, such as UTC or Europe/Berlin")
        return name

    def unit_of(self, column: str | None) -> str:
        """The unit or strptime format of a column of times."""
        return self.times.get(str(column), DEFAULT)

    @property
    def zone(self) -> ZoneInfo:
        """Of times that name none."""
        return ZoneInfo(self.timezone)


class Outcome(Strict):
    """A stream of later events, joined to impressions by a key.

    Expressions see NAME (one happened), NAME_count, NAME_time where `time` is given, and NAME_COLUMN for each of `columns`.

    Attributes:
        files: as for impressions.
        key: column that names the impression.
        columns: further columns with their types.
        time: column of when it happened. One before its impression does not belong to it.
        window: how long after the impression an outcome counts; later ones are `late`.
        take: which of several outcomes of an impression gives the columns, or what they add up to.
        duplicates: drop counts rows that are equal in all columns read once, as logs that are delivered twice need it.
        late: drop, or keep those after the window (which then only decides when an impression is old enough).
        open_window: impressions whose window was still open when the log ended have their tasks unobserved, or are left out
            of the dataset, or are kept as if it had closed.
        read: how its files are written, where it differs from the impressions'; by default they have a header line.
    """

    files: str
    key: str
    columns: dict[str, RawType] = {}
    time: str | None = None
    window: Duration | None = None
    take: Literal["first", "last", "sum", "min", "max"] = "first"
    duplicates: Literal["drop", "keep"] = "drop"
    late: Literal["drop", "keep"] = "drop"
    open_window: Literal["unobserved", "leave_out", "keep"] = Field("unobserved", serialization_alias="young")
    read: Format | None = None

    @model_validator(mode="before")
    @classmethod
    def _earlier_names(cls, content: Any) -> Any:
        """`young` is the earlier name of `open_window`, read for one more release."""
        if isinstance(content, dict) and "young" in content:
            if "open_window" in content:
                raise ValueError("young is the earlier name of open_window; remove it")
            logger.warning("outcomes: `young` is now `open_window`; the old name goes with the next release")
            content = {**content, "open_window": content["young"]}
            del content["young"]
        return content

    @model_validator(mode="after")
    def _fits(self) -> "Outcome":
        if self.window and not self.time:
            raise ValueError("window needs time, the column of when the outcome happened")
        if self.take not in ("first", "last") and (text := [c for c, t in self.columns.items() if t == "string"]):
            raise ValueError(f"take: {self.take} needs numbers, but column {text[0]} is text")
        if own := [c for c in self.columns if c in (self.key, self.time)]:
            raise ValueError(f"column {own[0]} is read as key or time already: remove it from columns")
        if set(self.columns) & {"count", "time"}:
            raise ValueError("columns count and time have the names of what a join adds itself")
        return self

    @property
    def types(self) -> dict[str, RawType]:
        """The columns that are read beside the key."""
        return {**({self.time: "time"} if self.time else {}), **self.columns}


def outcome_names(name: str, outcome: Outcome) -> list[str]:
    """The columns that the join of an outcome adds."""
    return [name, *(f"{name}_{c}" for c in ["count", *(["time"] if outcome.time else []), *outcome.columns])]


class SideTable(Strict):
    """Facts about what an impression names, such as its item or user, looked up by key.

    Expressions and features see NAME_COLUMN for each of `columns`: the row of the key that was read last, or where rows have
    versions, the version at the impression's time; null where there is none. They are known at the impression.

    Attributes:
        files: as for impressions. Files with {date} are whole snapshots, each from its day's beginning on: with `date` the
            newest one up to that day is read, otherwise an impression sees the one of its time.
        key: column of the table.
        by: column of the impressions, raw or derived, that names a row; by default it is called like `key`.
        columns: further columns with their types.
        valid_from: column of when a version begins, which may be the second of the impression; it ends with the next one.
        read: how its files are written, where it differs from the impressions'; by default they have a header line.
    """

    files: str
    key: str
    by: str | None = None
    columns: dict[str, RawType] = Field(min_length=1)
    valid_from: str | None = None
    read: Format | None = None

    @model_validator(mode="after")
    def _fits(self) -> "SideTable":
        if own := [c for c in self.columns if c in (self.key, self.valid_from)]:
            raise ValueError(f"column {own[0]} is read as key or valid_from already: remove it from columns")
        if self.valid_from == self.key:
            raise ValueError(f"{self.key} is both key and valid_from: a version needs a time of its own")
        return self

    @property
    def types(self) -> dict[str, RawType]:
        """The columns that are read beside the key."""
        return {**({self.valid_from: "time"} if self.valid_from else {}), **self.columns}

    @property
    def foreign_key(self) -> str:
        """The column of the impressions that names a row."""
        return self.by or self.key

    @property
    def in_snapshots(self) -> bool:
        """Whether its files are snapshots of single days."""
        return "{date}" in self.files


class History(Strict):
    """The items of earlier rows of the same user, the latest first.

    Only what was known strictly before the impression counts: the row itself, and what `when` reads. That an outcome
    happened is known when it does (`when: click`); anything else about outcomes, such as `NOT click`, once their window has
    closed. Rows that turn out bad by their label, or are left out since a window is still open, are part of it all the same.

    Attributes:
        user: column whose value the rows share.
        item: column whose values are listed.
        when: SQL expression of the rows that count, such as `click`; by default all.
    """

    user: str
    item: str
    when: str | None = None

    @property
    def key(self) -> str:
        """The column whose value the rows share."""
        return self.user

    @property
    def columns(self) -> list[str]:
        """The columns that it reads beside those of its expressions."""
        return [self.user, self.item]

    @property
    def expressions(self) -> dict[str, str]:
        """Its SQL expressions by their keys."""
        return {"when": self.when} if self.when is not None else {}


class Counter(Strict):
    """A number made of earlier rows with the same key: how many, or the sum or mean of something. It adds a column NAME.

    As in a history, only what was known strictly before the impression counts: that an outcome happened once it has, anything
    else of outcomes once their window has closed, and rows that turn out bad or are left out all the same. Time is when a
    row's part in it became known, also for `window` and `decay`: so clicks and their absence are of equally long periods.

    Attributes:
        by: column whose value the rows share; a row without one has no counter.
        take: count of rows, or the sum or mean of `of`.
        of: SQL expression of a number; rows where it is null, infinite or beyond float32 do not count.
        when: SQL expression of the rows that count; by default all.
        window: how long ago a row may have become known.
        decay: half-life of a row's weight.
        smoothing: of a mean: how many rows with the mean of the train split are added to those that were found.
    """

    by: str
    take: Literal["count", "sum", "mean"]
    of: str | None = None
    when: str | None = None
    window: Duration | None = None
    decay: Duration | None = None
    smoothing: float | None = Field(None, gt=0, le=1e12, allow_inf_nan=False)

    @model_validator(mode="after")
    def _fits(self) -> "Counter":
        if self.take == "count" and self.of is not None:
            raise ValueError("take: count counts rows: choose them with when in place of of")
        if self.take != "count" and self.of is None:
            raise ValueError(f"take: {self.take} needs of, the expression of a number")
        if self.window and self.decay:
            raise ValueError("give one of window and decay")
        if self.smoothing and self.take != "mean":
            raise ValueError(
                f"smoothing is of take: mean; a {self.take} of few rows is no less certain than one of many"
            )
        return self

    @property
    def key(self) -> str:
        """The column whose value the rows share."""
        return self.by

    @property
    def columns(self) -> list[str]:
        """The columns that it reads beside those of its expressions."""
        return [self.by]

    @property
    def expressions(self) -> dict[str, str]:
        """Its SQL expressions by their keys."""
        return {key: text for key, text in (("of", self.of), ("when", self.when)) if text is not None}


class Source(Format):
    """Where raw columns come from. A column is text unless `types` has it, or a feature needs a number."""

    files: str = Field(description="glob below the input folder, or a file's name; {date} stands for a day's date")
    types: dict[str, RawType] = {}
    row_id: str | None = Field(None, description="integer column that is unique; by default file and place in it")
    key: str | None = Field(None, description="column that outcomes refer to")
    outcomes: dict[str, Outcome] = {}
    counters: dict[str, Counter] = {}
    derived: dict[str, str] = Field({}, description="further columns as SQL expressions over the raw ones")
    tables: dict[str, SideTable] = Field({}, description="side tables, looked up by key")

    def format_of(self, stream: str | None) -> Format:
        """How the files of an outcome or side table (None: of the impressions) are written."""
        if stream is None:
            return self
        other = self.outcomes.get(stream) or self.tables[stream]
        return other.read or self.model_copy(update={"columns": None})

    def format_key(self, stream: str | None) -> str:
        """Where the schema has what `format_of` gives."""
        if stream in self.tables:
            return f"source.tables.{stream}.read" if self.tables[stream].read else "source"
        own = stream is not None and self.outcomes[stream].read is not None
        return f"source.outcomes.{stream}.read" if own else "source"
