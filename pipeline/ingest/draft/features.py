"""Columns of the impressions as features: which kind, which table, and why others are left out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from features.printable import has_controls, printable
from features.schema.checks import MAX_COLUMN_BYTES, MAX_NAME_BYTES, RESERVED
from pipeline.ingest.draft.column import SHOWN, Column
from pipeline.ingest.draft.labels import Label

ID = re.compile(r"(^|_)(id|ids|uid|guid|uuid|key|code|hash|sku|asin|isbn|zip|postcode|ip|type|category|class|version)$")
# Whole numbers that name somebody or something.
ENTITY = re.compile(
    r"^(user|member|item|product|ad|campaign|advertiser|creative|query|video|movie|film|book|article|news|song|track|artist"
    r"|author|shop|store|seller|brand|page|publisher|site|app|post|city|region|country|category|device|browser|session)$"
)
LATER = re.compile(
    r"(^|_)(dwell|revenue|watch_?time|play_?time|time_spent|conversion|convert|purchase|bought|refund|checkout|completion"
    r"|post_click|order_value|clicked|click_time|label)"
)
FEW, MANY = 32, 50_000  # values: fewer whole numbers are codes, more values get hash buckets
LONG_TEXT, WORDS = 60, 6  # characters and words on average from which on a text is prose
NUMERIC = ("int", "float")


@dataclass(frozen=True)
class Feature:
    """An entry of a section of the schema: its name, its settings, and why."""

    section: str
    name: str
    settings: dict[str, Any]
    why: str


@dataclass(frozen=True)
class Features:
    """Those of a draft.

    Attributes:
        tables: shared embedding tables, with the settings and the reason of each.
        left_out: why columns are no features, by name.
    """

    found: list[Feature]
    tables: dict[str, tuple[dict[str, Any], str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def features_of(
    columns: Sequence[Column], used: dict[str, str], labels: Sequence[Label], answers: pl.Series | None
) -> Features:
    """The features of a draft.

    Args:
        used: columns that are something else, with what they are.
        labels: of columns of the impressions, whose answers no feature may give away.
        answers: the first of them for each row of the sample; None without.
    """
    candidates, left_out = list[Column](), dict[str, str]()
    for column in columns:
        why = used.get(column.name) or unfit_name(column.name) or _useless(column) or _leaks(column, labels, answers)
        if why:
            left_out[column.name] = why
        else:
            candidates.append(column)
    tables, shared = _shared(candidates)
    names, found = {*tables}, list[Feature]()
    for column in candidates:
        name = _name(column.name, names)
        names.add(name)
        section, settings, why = _kind(column, shared.get(column.name))
        found.append(
            Feature(section, name, {**({"column": column.name} if name != column.name else {}), **settings}, why)
        )
    return Features(found, tables, left_out)


def unfit_name(name: str) -> str | None:
    """Why a schema cannot name a column; None where it can."""
    if not name:
        return "has no name"
    if has_controls(name):
        return "has a control character in its name"
    if len(name.encode()) > MAX_COLUMN_BYTES:
        return f"has a name of more than {MAX_COLUMN_BYTES:,} bytes"
    return "has ${ in its name, which a configuration takes for a reference" if "${" in name else None


def _useless(column: Column) -> str | None:
    """Why nothing can be learnt from a column; None where something can."""
    if column.kind == "empty":
        return "has no values"
    if column.kind == "time":
        return "is a time"
    if column.distinct == 1:
        return (
            f"is {str(column.items.drop_nulls()[0])[:40]!r} in all rows" if not column.missing else "has a single value"
        )
    texts = column.kind == "text"
    if column.known >= 100 and column.distinct == column.known and (texts or (column.kind == "int" and _is_id(column))):
        return "has another value in every row"
    if texts:
        known = column.values.drop_nulls()
        length = float(known.str.len_chars().to_numpy().mean())
        words = float(known.str.count_matches(" ").to_numpy().mean()) + 1
        if length > LONG_TEXT and words > WORDS and column.distinct > FEW:
            return f"is prose, {length:.0f} characters on average"
    return None


def _leaks(column: Column, labels: Sequence[Label], answers: pl.Series | None) -> str | None:
    """Why a column may give a label away; None where it does not look so."""
    if answers is None or not labels:
        return None
    if LATER.search(column.word):
        return "looks like something that is known only after the impression"
    if column.values.dtype == pl.List:
        return None
    both = pl.DataFrame({"value": column.values.cast(pl.String).fill_null(""), "answer": answers}).drop_nulls()
    per_value = both.group_by("value").agg(pl.col("answer").n_unique().alias("answers"))
    if 1 < per_value.height <= FEW and (per_value["answers"] == 1).all() and both["answer"].n_unique() > 1:
        return f"gives the label {labels[0].name} away: each of its values goes with one answer in all sampled rows"
    missing = column.values.is_null()
    if 0.001 < column.missing < 0.999 and _follows(missing, answers):
        return f"gives the label {labels[0].name} away: it is missing where that is the same in all sampled rows"
    return None


def _follows(missing: pl.Series, answers: pl.Series) -> bool:
    """Whether all rows without a value have one answer, and all others another one."""
    known = answers.is_not_null()
    absent, present = answers.filter(missing & known), answers.filter(~missing & known)
    return absent.n_unique() == 1 == present.n_unique() and absent[0] != present[0]


def _is_id(column: Column) -> bool:
    return ID.search(column.word) is not None or ENTITY.search(column.word) is not None


def _name(column: str, taken: set[str]) -> str:
    """A name of a feature for a column: the same, unless it cannot name files or is taken."""
    name = re.sub(r"[./\\]", "_", column)
    while len(name.encode()) > MAX_NAME_BYTES - 20:
        name = name[:-1]
    if name in RESERVED:
        name += "_value"
    number = 2
    first = name
    while name in taken or f"{name}_missing" in taken:
        name, number = f"{first}_{number}", number + 1
    return name


def _kind(column: Column, table: str | None) -> tuple[str, dict[str, Any], str]:
    """Section, settings and reason."""
    seen = f"{column.distinct:,} different values"
    if column.kind == "numbers":
        length = int(column.values.drop_nulls().list.len()[0])
        separator = {"separator": column.separator} if column.separator not in (None, ",") else {}
        return "vector", {"length": length, **separator, **_flag(column)}, f"{length} numbers in every row"
    if column.kind == "list":
        lengths = column.values.drop_nulls().list.len().to_numpy()
        most = int(lengths.max())
        settings: dict[str, Any] = {"table": table} if table else _table(column)
        if column.separator not in (None, "|"):
            settings["separator"] = column.separator
        if most > 50:
            settings["max_length"] = min(200, most)
        return "bag", settings, f"lists of {lengths.mean():.1f} items on average, at most {most}; {seen}"
    if column.kind in NUMERIC and not (column.kind == "int" and (column.distinct <= FEW or _is_id(column))):
        settings, why = _dense(column)
        return "dense", settings, why
    if column.counts:
        seen += f", most often {printable(column.counts[0][0][:SHOWN])!r}"
    if column.missing:
        seen += f", {column.missing:.1%} missing"
    return "categorical", {"table": table} if table else _table(column), seen


def _dense(column: Column) -> tuple[dict[str, Any], str]:
    numbers = column.values.drop_nulls().cast(pl.Float64).to_numpy()
    low, middle, high = np.min(numbers), np.median(numbers), np.max(numbers)
    why = f"{low:g} to {high:g}, median {middle:g}"
    settings: dict[str, Any] = {}
    spread = np.std(numbers)
    skew = float(np.mean(((numbers - np.mean(numbers)) / spread) ** 3)) if spread else 0.0
    if low >= 0 and skew > 2 and high > 10:
        settings["transform"] = "log1p"
        why += f", skewed ({skew:.1f})"
    if column.missing:
        why += f", {column.missing:.1%} missing"
    return {**settings, **_flag(column)}, why


def _flag(column: Column) -> dict[str, Any]:
    return {"missing_flag": True} if column.missing > 0.01 else {}


def _table(column: Column) -> dict[str, Any]:
    """How values become ids: hash buckets where there are many."""
    many = column.estimate
    if many > MANY:
        digits = 10 ** int(np.floor(np.log10(2 * many)))
        return {"dim": 32, "hash": int(min(-(-2 * many // digits) * digits, 10_000_000))}
    if many > 1_000:
        return {"dim": 16, "vocabulary": {"min_count": 2}}
    return {"dim": 16 if many > 50 else 8}


def _shared(columns: Sequence[Column]) -> tuple[dict[str, tuple[dict[str, Any], str]], dict[str, str]]:
    """Tables of ids that lists and single columns share, and the table of each of these columns."""
    tables, shared = dict[str, tuple[dict[str, Any], str]](), dict[str, str]()
    names = {column.name for column in columns}
    for column in columns:
        if column.kind not in ("text", "int") or column.distinct <= FEW:
            continue
        own = column.texts.unique()
        lists = [
            other
            for other in columns
            if other.kind == "list" and other.name not in shared and _alike(column, other)
            and other.texts.unique().is_in(own.implode()).mean() > 0.3  # type: ignore[operator]
        ]  # fmt: skip
        if lists:
            table = re.sub(r"_?ids?$", "", column.word) or "ids"
            while table in names or table in tables or table in RESERVED:
                table += "_ids"
            tables[table] = (_table(column), f"ids of {', '.join(c.name for c in (column, *lists))}")
            shared |= dict.fromkeys([column.name, *(c.name for c in lists)], table)
    return tables, shared


def _alike(column: Column, other: Column) -> bool:
    """Whether equal values are more than chance: whole numbers are only where the names have a word in common."""
    words = {word.rstrip("s") for word in column.word.split("_")} & {word.rstrip("s") for word in other.word.split("_")}
    return bool(words - {"id", "of"}) or bool((column.texts.str.contains(r"\D")).mean() > 0.9)  # type: ignore[operator]
