"""What a column of a sample holds: its type, how many values, and which of them say that one is missing."""

import re
from dataclasses import dataclass, field
from typing import Literal

import polars as pl

from pipeline.ingest.draft.moments import Moments, moments_of

# In a column of numbers any of them says that a value is missing; in text only the first ones can be nothing else.
MARKERS_OF_TEXT = ("?", "\\N", "NULL", "null", "NaN", "nan")
MARKERS = (*MARKERS_OF_TEXT, "NA", "N/A", "n/a", "None", "none", "-", "--", "missing")
INTEGER = r"^[+-]?\d{1,18}$"
SEPARATORS = ("|", ";", ",", " ")
SHOWN = 40  # characters of a value in a comment

Kind = Literal["int", "float", "text", "list", "numbers", "time", "empty"]


@dataclass(frozen=True)
class Column:
    """A column of a sample.

    Attributes:
        name: as in the files; `word` in lower case with `_` between words.
        kind: `numbers` is a list of as many numbers in every row, `list` any other.
        values: text, numbers or lists of text, null where missing.
        markers: texts that say that a value is missing.
        separator: of items in text.
        moments: of a column of times.
    """

    name: str
    kind: Kind
    values: pl.Series
    markers: frozenset[str] = frozenset()
    separator: str | None = None
    moments: Moments | None = None
    counts: tuple[tuple[str, int], ...] = field(default=())  # of the most frequent values

    @property
    def word(self) -> str:
        """The name as most logs write it: impressionId as impression_id."""
        return word_of(self.name)

    @property
    def known(self) -> int:
        """Rows that have a value."""
        return len(self.values) - self.values.null_count()

    @property
    def missing(self) -> float:
        """Share of the rows without a value."""
        return self.values.null_count() / max(len(self.values), 1)

    @property
    def distinct(self) -> int:
        """Different values of the sample; of lists, items."""
        return self.items.drop_nulls().n_unique()

    @property
    def items(self) -> pl.Series:
        """The values, or those of the lists."""
        return self.values.explode() if self.values.dtype == pl.List else self.values

    @property
    def texts(self) -> pl.Series:
        """The values (of lists the items) as text, one text for one number, without missing ones: to compare columns."""
        found = self.items.drop_nulls()
        if found.dtype == pl.Float64 and (found == found.floor()).all() and found.abs().max() < 2**53:  # type: ignore[operator]
            found = found.cast(pl.Int64)
        return found.cast(pl.String)

    @property
    def estimate(self) -> int:
        """Different values of all rows, by those that were seen once and twice (Chao 1984)."""
        counts = self.items.drop_nulls().value_counts()["count"]
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        return len(counts) + (once * (once - 1) // (2 * (twice + 1)))


def word_of(name: str) -> str:
    """A name in lower case with `_` between its words."""
    return re.sub(r"\W+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)).lower().strip("_")


def column_of(name: str, values: pl.Series, trim: bool) -> Column:
    """What a column holds.

    Args:
        values: text or lists of text, as the readers of raw formats give them.
        trim: spaces around values are stripped.
    """
    if values.dtype == pl.List:
        return _listed(name, values, None)
    texts = values.str.strip_chars() if trim else values
    texts = texts.set(texts == "", None)
    typed, markers = _numbers(texts)
    if typed is None:
        texts, markers = _without(texts, MARKERS_OF_TEXT)
    else:
        texts = _without(texts, MARKERS)[0]
    if not texts.drop_nulls().len():
        return Column(name, "empty", texts, markers)
    if (moments := moments_of(texts, word_of(name))) is not None:
        return Column(name, "time", texts, markers, moments=moments)
    if typed is not None:
        return Column(name, "int" if typed.dtype == pl.Int64 else "float", typed, markers, counts=_counts(texts))
    if (separator := _separator(texts)) is not None:
        return _listed(name, texts.str.split(separator), separator, markers)
    return Column(name, "text", texts, markers, counts=_counts(texts))


def _without(texts: pl.Series, markers: tuple[str, ...]) -> tuple[pl.Series, frozenset[str]]:
    marked = texts.is_in(markers)
    return texts.set(marked, None), frozenset(texts.filter(marked).to_list())


def _numbers(texts: pl.Series) -> tuple[pl.Series | None, frozenset[str]]:
    """Texts as numbers, with the missing markers among them; None where some are neither."""
    known, markers = _without(texts, MARKERS)
    found = known.str.strip_chars(" \t")
    if not found.drop_nulls().len():
        return None, markers
    if found.str.contains(INTEGER).all():
        # 007 is a code, not the number 7.
        return (None, markers) if found.str.contains(r"^0\d").any() else (found.cast(pl.Int64), markers)
    numbers = found.cast(pl.Float64, strict=False)
    is_number = numbers.null_count() == found.null_count() and bool(numbers.drop_nulls().is_finite().all())
    return (numbers if is_number else None), markers


def _counts(texts: pl.Series) -> tuple[tuple[str, int], ...]:
    frame = texts.drop_nulls().alias("value").value_counts().sort(["count", "value"], descending=[True, False])
    return tuple(frame.head(5).rows())


def _separator(texts: pl.Series) -> str | None:
    """The separator of lists in text: items repeat more than the texts do, and are words, not parts of a sentence."""
    known = texts.drop_nulls()
    for separator in SEPARATORS:
        listed = known.str.contains(separator, literal=True)
        if listed.mean() < 0.2:  # type: ignore[operator]
            continue
        items = known.str.split(separator).explode()
        if separator in ", ":  # also signs of sentences
            several = known.filter(listed).str.split(separator)
            if not items.str.contains(r"^[\w.:+-]*$").all() or (separator == " " and several.list.len().mean() < 3):  # type: ignore[operator]
                continue
            if separator == " " and not items.str.contains(r"\d").all():
                continue
        if _is_vector(known.str.split(separator)) or items.n_unique() < 0.7 * known.n_unique() + 5:
            return separator
    return None


def _is_vector(lists: pl.Series) -> bool:
    """Whether every row has as many numbers, several and not all whole: an embedding, for example."""
    lengths = lists.drop_nulls().list.len()
    if lengths.is_empty() or lengths.min() != lengths.max() or lengths.min() < 2:  # type: ignore[operator]
        return False
    numbers = lists.drop_nulls().explode().cast(pl.Float64, strict=False)
    return numbers.null_count() == 0 and bool((numbers != numbers.floor()).mean() > 0.1)  # type: ignore[operator]


def _listed(name: str, lists: pl.Series, separator: str | None, markers: frozenset[str] = frozenset()) -> Column:
    filled = lists.set(lists.list.len() == 0, None)
    if not filled.drop_nulls().len():
        return Column(name, "empty", filled, markers)
    return Column(name, "numbers" if _is_vector(filled) else "list", filled, markers, separator)
