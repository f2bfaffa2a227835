"""The seam of raw formats: the columns of a file, the units it is cut into, and a unit read block by block."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from features.source import Format, RawType
from pipeline.ingest.files import RawFile, Unit

OnBytes = Callable[[int], object]  # called with the number of a unit's bytes read so far


@dataclass(frozen=True)
class Wanted:
    """What is read of a unit.

    Attributes:
        types: the wanted columns in the order in which a block has them.
        names: of all columns of the file, as `RawFormat.column_names` gave them.
        lists: the columns that may hold lists, each with the separator of items where they are text.
    """

    types: Mapping[str, RawType]
    names: Sequence[str] | None = None
    lists: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BadLine:
    """A line that is not a row: its number, the reason, and its text."""

    line: int
    reason: str
    raw: str


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a unit.

    Attributes:
        columns: the wanted ones, in order: text, or lists of text; those wanted as numbers also as float64 (float) or
            int64 (int, time), where all values of the block are such; times also as timestamps in whole seconds.
        row: number of rows of the unit before these.
        line_numbers: computes the line of each row in the unit, from 1. Formats without lines, and CSV with line breaks in
            values, give the row's number in the file, from 1, where a header counts and blank lines do not.
        bad: lines of this block that are not rows, numbered in the same way.
        line_count: lines read for this block, the header and blank ones among them; lines of the file's next unit have
            numbers that are higher by the sum over the blocks of this one. 0 where rows are numbered in the file.
    """

    columns: pa.Table
    row: int
    line_numbers: Callable[[], np.ndarray]
    bad: list[BadLine] = field(default_factory=list)
    line_count: int = 0


class RawFormat(ABC):
    """How files of one format are read.

    Attributes:
        options: of the schema: delimiter, names of columns, missing markers, time zone.
        column_fix: what to do where a column is missing, for the error message.
    """

    column_fix = "Fix the schema."

    def __init__(self, options: Format) -> None:
        self.options = options

    @abstractmethod
    def column_names(self, file: RawFile) -> list[str] | None:
        """The names of a file's columns, in order; None where every row has keys of its own.

        Raises:
            UserError: the file cannot be opened, or is not of this format.
        """

    def units(self, file: RawFile, number: int, unit_bytes: int, whole: bool) -> list[Unit]:  # noqa: ARG002
        """A file cut into units of about `unit_bytes`; one unit where a format cannot be cut.

        Args:
            number: of the file within its stream.
            whole: the index of a row in its file is needed; a format that does not know it before it reads must not cut.

        Raises:
            UserError: the file is damaged.
        """
        return [Unit(file, number)]

    @abstractmethod
    def read(self, unit: Unit, wanted: Wanted, on_bytes: OnBytes) -> Iterator[Block]:
        """The blocks of a unit, in order.

        Raises:
            UserError: the file is truncated or damaged, or a column has a type that is neither text, number nor list.
        """
