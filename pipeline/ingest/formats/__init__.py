"""Raw file formats: one file a format, registered here."""

import json
from collections.abc import Callable, Iterable, Sequence

from features.errors import UserError, did_you_mean
from features.source import Format
from pipeline.ingest.files import RawFile, Unit
from pipeline.ingest.formats.avro import Avro
from pipeline.ingest.formats.base import RawFormat
from pipeline.ingest.formats.csv import Csv
from pipeline.ingest.formats.jsonl import JsonLines
from pipeline.ingest.formats.parquet import Parquet

FORMATS: dict[str, Callable[[Format], RawFormat]] = {
    "csv": Csv, "jsonl": JsonLines, "parquet": Parquet, "avro": Avro,
}  # fmt: skip
DELIMITERS = ",;\t|"  # that a header may be cut by where the schema's does not cut it


def raw_format(options: Format, key: str = "source") -> RawFormat:
    """The registered format of these options. Raises UserError for an unknown one; `key` is their place in the schema."""
    if options.format not in FORMATS:
        raise UserError(f"{key}.format: {options.format!r} is not a raw format. Use one of {', '.join(FORMATS)}.")
    return FORMATS[options.format](options)


class MissingColumnError(UserError):
    """A file lacks a column."""

    def __init__(self, message: str, column: str) -> None:
        super().__init__(message)
        self.column = column


def check_columns(file: RawFile, options: Format, wanted: Sequence[str], added: Iterable[str] = ()) -> list[str] | None:
    """The names of a file's columns; None where every row has keys of its own, which may be absent.

    Args:
        added: further columns that expressions may read, for the suggestion where a name is mistyped.

    Raises:
        MissingColumnError: the file lacks a wanted column.
        UserError: it cannot be opened, or has a wanted column twice.
    """
    form = raw_format(options)
    found = form.column_names(file)
    if found is None:
        return None
    if missing := [c for c in wanted if c not in found]:
        padded = any(name.strip() == missing[0] for name in found)
        if padded:
            raise UserError(
                f"{file.path}: the header has spaces around {missing[0]}. Set trim: true in the schema's source."
            )
        shown = ", ".join(found)[:1000]
        near = did_you_mean(missing[0], [*found, *added])
        fix = _delimiter_fix(options, found, missing[0]) or form.column_fix
        message = f"{file.path}: column {missing[0]} is missing{near}, the file has {shown}. {fix}"
        raise MissingColumnError(message, missing[0])
    if twice := [c for c in wanted if found.count(c) > 1]:
        raise UserError(f"{file.path}: there are two columns {twice[0]}. Rename one of them. {form.column_fix}")
    return found


def _delimiter_fix(options: Format, found: Sequence[str], wanted: str) -> str:
    """What to do where a header is one name for the schema's delimiter, and has the wanted one for another; else empty."""
    for sign in DELIMITERS if options.format == "csv" and len(found) == 1 else ():
        if wanted in (name.strip() for name in found[0].split(sign)):
            return f"Set delimiter: {json.dumps(sign)} in the schema's source."
    return ""


def units(files: Sequence[RawFile], options: Format, unit_bytes: int, whole: bool = False) -> list[Unit]:
    """The units of all files of a stream (see RawFormat.units)."""
    form = raw_format(options)
    return [unit for number, file in enumerate(files) for unit in form.units(file, number, unit_bytes, whole)]
