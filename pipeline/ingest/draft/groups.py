"""Names of raw files to patterns of streams: clicks-2026-11-01.csv to clicks-{date}.csv, part-00000.avro to part-*.avro."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from features.errors import UserError
from features.printable import has_controls
from pipeline.ingest import files as raw_files
from pipeline.ingest.absent_days import day_of
from pipeline.ingest.files import RawFile, file_system

MAX_FILES = 100_000
DEPTHS = ("*", "*/*", "*/*/*", "*/*/*/*")  # of folders below the input
# No logs: pages, settings, pictures, marks of other writers, and what begins with a dot or an underscore.
OTHER_FILES = re.compile(
    r"(^|/)[._]|\.(md|rst|html?|ya?ml|toml|ini|cfg|py|ipynb|sh|sql|pdf|png|jpe?g|svg|crc|md5|sha256|log|lock|tmp|bak)$",
    re.I,
)
VARIES = re.compile(
    r"(?P<uuid>(?<![0-9a-f])[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}(?![0-9a-f]))"
    r"|(?P<date>(?<!\d)\d{4}-\d\d-\d\d(?!\d))|(?P<number>\d+)",
)
PART = re.compile(r"(part|chunk|shard|split|file|of|batch|segment|hour|h)[-_=]?$", re.I)


@dataclass(frozen=True)
class Group:
    """The files of a stream.

    Attributes:
        pattern: as `source.files` of a schema.
        files: in the order of their names.
        days: the dates in place of {date}, in order; empty without.
    """

    pattern: str
    files: list[RawFile]
    days: list[date]


def find_groups(folder: str, patterns: Sequence[str] | None) -> list[Group]:
    """The files below a folder by pattern, in the order of the patterns.

    Args:
        patterns: of each stream; None: made from the names of the files.

    Raises:
        UserError: there are no files, or too many, or the storage reports an error.
    """
    if patterns is not None:
        return [
            _group(pattern, raw_files.find(folder, pattern, key="files=PATTERN")) for pattern in dict.fromkeys(patterns)
        ]
    found: dict[str, list[tuple[str, list[date]]]] = {}
    listed = _listed(folder)
    for name in listed:
        shape, days = shape_of(name)
        found.setdefault(shape, []).append((name, days))
    groups: list[Group] = []
    for shape, members in found.items():
        alone = len(members) == 1 and "{date}" not in shape
        pattern = literal(members[0][0]) if alone else pattern_of(shape, [days for _, days in members])
        groups.append(_group(pattern, [listed[name] for name, _ in members]))
    return sorted(groups, key=lambda group: group.pattern)


def apart(folder: str, group: Group) -> list[Group]:
    """A stream for each file of a group, where the files turn out to hold different columns."""
    root = _root(folder)
    return [Group(literal(_below(root, file)), [file], []) for file in group.files]


def shape_of(name: str) -> tuple[str, list[date]]:
    """A name below the input folder with signs for what varies: {date} for each of its dates, and these.

    Numbers with leading zeros, of several digits or behind words such as `part` vary between the files of a stream. Beside a
    date others belong to the name of the stream: event_1-2026-11-01.csv is no part of event_2.
    """
    dated = any(_day(found[0]) for found in VARIES.finditer(name) if found["date"])
    parts, end, days = list[str](), 0, list[date]()
    for found in VARIES.finditer(name):
        before, text = name[end : found.start()], found[0]
        parts.append(literal(before))
        if found["date"] and (day := _day(text)):
            parts.append("{date}")
            days.append(day)
        elif found["number"] and dated and not (text[0] == "0" or len(text) > 3 or PART.search(before)):
            parts.append(text)
        else:
            parts.append("*")
        end = found.end()
    return "".join([*parts, literal(name[end:])]), days


def pattern_of(shape: str, days: Sequence[Sequence[date]]) -> str:
    """The pattern of names of one shape, each with its dates: {date} where these vary most, else * or the one that all have.

    Of places that vary alike, the earliest dates are those of the rows: an export is named by a later one.
    """
    places = list(zip(*days, strict=True))
    if len(places) < 2:
        return shape
    of_rows = min(range(len(places)), key=lambda i: (-len({*places[i]}), min(places[i]), i))
    first, *others = shape.split("{date}")
    signs = [
        "{date}" if i == of_rows else "*" if len({*place}) > 1 else place[0].isoformat()
        for i, place in enumerate(places)
    ]
    return first + "".join(sign + text for sign, text in zip(signs, others, strict=True))


def literal(name: str) -> str:
    """A name as a pattern that matches it alone."""
    return re.sub(r"[*?\[]", lambda sign: f"[{sign[0]}]", name)


def _group(pattern: str, files: list[RawFile]) -> Group:
    return Group(pattern, files, sorted({day for file in files if (day := day_of(file.path, pattern))}))


def _listed(folder: str) -> dict[str, RawFile]:
    """The files below a folder that may be logs, by name. Raises UserError for none, or where the storage reports an error."""
    root, found = _root(folder), dict[str, RawFile]()
    for pattern in DEPTHS:
        names = {_below(root, file): file for file in raw_files.matching(folder, pattern) if file.size}
        found |= {
            name: file
            for name, file in names.items()
            if not OTHER_FILES.search(name) and not has_controls(name) and "{date}" not in name
        }
        if len(found) > MAX_FILES:
            raise UserError(f"{folder}: more than {MAX_FILES:,} files. Name those to look at: files=PATTERN,PATTERN.")
    if not found:
        raise UserError(f"{folder}: no file that may be a log. Set input=FOLDER, or files=PATTERN.")
    return dict(sorted(found.items()))


def _root(folder: str) -> str:
    system, root = file_system(folder)
    return str(system.unstrip_protocol(root)).rstrip("/")


def _below(root: str, file: RawFile) -> str:
    """The name of a file below the input folder."""
    return file.path.removeprefix(root.removeprefix("file://") if not file.path.startswith(root) else root).lstrip("/")


def _day(text: str) -> date | None:
    try:
        return date.fromisoformat(text)
    except ValueError:
        return None
