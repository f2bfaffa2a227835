"""Bad rows of a stream against max_bad_fraction: at the end of reading, and early where much is still to be read.

Workers share nothing but the job's folder, so each unit leaves a tally there: its bytes, rows and bad rows. While a log is
read, a stream's rows are at most those that were read and as many for each unread byte as in the densest finished unit,
DENSER times over. More bad rows than the fraction of these is too many however good the rest may be: bad rows that stand
together, as in one bad file, stop no job that would pass at its end.
"""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl

from features.errors import UserError
from features.printable import printable
from pipeline.ingest.files import BLOCK_BYTES
from pipeline.ingest.messages import ReadWork
from pipeline.ingest.state import Job
from pipeline.storage.files import write_json

DENSER = 4  # how many more rows a byte may have than in any unit so far
WORTH_BYTES = 256 << 20  # that must be left to be read: else the check at the end names the first bad row of all
AHEAD_BYTES = 2 * BLOCK_BYTES  # of a unit, which its reader may have taken in before their rows come out
SHARE_OF_TIME = 0.01  # that adding up the tallies may take
STOPPED, SUMMED = "stopped", "summed"  # files with the message, and with the seconds of the last sum


@dataclass(frozen=True)
class Tally:
    """What was read of a unit.

    Attributes:
        bytes: of its file, surely read.
        rows, bad: rows, bad ones among them.
        first: where the first bad row is and what is wrong with it.
    """

    bytes: int
    rows: int
    bad: int
    first: str


class BadRows:
    """Counts the bad rows of a unit while it is read.

    Call `record` with the bytes that the reader has taken in, `count` for each block, and `end` after the last. Each raises
    UserError once the stream has too many bad rows, by this unit or by another.
    """

    def __init__(self, job: Job, work: ReadWork) -> None:
        self.job, self.work = job, work
        self.total = job.stream_bytes.get(work.stream, 0)
        self.folder = job.progress / f"bad-{[*job.stream_bytes, work.stream].index(work.stream)}"
        self.bytes = self.rows = self.bad = 0
        self.first = ""
        self.record(0)

    def record(self, bytes_done: int) -> None:
        """Takes note of the unit's bytes."""
        self.bytes = bytes_done
        if self.total >= WORTH_BYTES and (self.folder / STOPPED).exists():
            raise UserError(json.loads((self.folder / STOPPED).read_text()))

    def count(self, rows: int, bad: Sequence[pl.DataFrame], lines: int) -> None:
        """Counts a block.

        Args:
            rows: bad ones among them; lines that bad rows take beside their own count only at the end of reading.
            bad: the dead letters.
            lines: of the block; 0 where rows are numbered in their file.
        """
        self.rows += rows
        found = sum(frame.height for frame in bad)
        if not found:
            return
        if not self.bad:
            line, reason = min((frame["line"][0], frame["reason"][0]) for frame in bad if frame.height)
            within = f" after byte {self.work.unit.start:,}" if lines and self.work.unit.start else ""
            self.first = f"{self.work.unit.file.path}, line {line}{within}: {printable(reason[:500])}"
        self.bad += found
        self._check(max(0, self.bytes - AHEAD_BYTES))

    def end(self) -> None:
        """Counts the whole unit."""
        self._check(self.bytes)

    def _check(self, size: int) -> None:
        """Leaves the tally, and adds those of the stream up where this unit alone has too many bad rows."""
        if self.total < WORTH_BYTES:
            return
        self.folder.mkdir(exist_ok=True)
        tally = Tally(size, self.rows, self.bad, self.first)
        (self.folder / f"{self.work.number}").write_text(json.dumps(asdict(tally)))
        if self.bad > self.job.max_bad_fraction * self.rows and self._may_sum():
            begin = time.monotonic()
            message = too_many(read_tallies(self.folder), self.total, self.job.max_bad_fraction, self.work.stream)
            (self.folder / SUMMED).write_text(str(time.monotonic() - begin))
            if message:
                write_json(self.folder / STOPPED, message)
                raise UserError(message)

    def _may_sum(self) -> bool:
        """Whether the last sum of any worker is so long ago that SHARE_OF_TIME goes into them."""
        try:
            path = self.folder / SUMMED
            return time.time() - path.stat().st_mtime > float(path.read_text()) / SHARE_OF_TIME
        except (OSError, ValueError):  # none yet, or it is written now
            return True


def read_tallies(folder: Path) -> list[Tally]:
    """The tallies of a stream's units, in order; without those that are written just now."""
    found = {}
    for path in folder.glob("[0-9]*"):
        with suppress(OSError, ValueError):
            found[int(path.name)] = Tally(**json.loads(path.read_text()))
    return [found[number] for number in sorted(found)]


def too_many(tallies: Sequence[Tally], total: int, max_bad_fraction: float, stream: str) -> str | None:
    """The message for a stream that has too many bad rows whatever follows, None for one that may still pass.

    Args:
        tallies: of its units, in order.
        total: bytes of its files.
    """
    done, rows, bad = (sum(getattr(tally, name) for tally in tallies) for name in ("bytes", "rows", "bad"))
    density = max((tally.rows / tally.bytes for tally in tallies if tally.bytes), default=None)
    if density is None or total - done < WORTH_BYTES:
        return None
    if bad <= max_bad_fraction * (rows + DENSER * density * (total - done)):
        return None
    first = next(tally.first for tally in tallies if tally.bad)
    return too_many_message(
        bad, rows, stream, max_bad_fraction, f"{first}.", f" after reading {done / total:.1%} of its files"
    )


def too_many_message(
    bad: int, rows: int, stream: str, max_bad_fraction: float, first: str, when: str = "", what: str = "rows"
) -> str:
    """The line for a stream with too many bad rows.

    Args:
        first: a sentence about the first of them.
        what: is counted, rows or lines.
    """
    return (
        f"{bad:,} of {rows:,} {what} of {stream} are bad{when}, more than max_bad_fraction={max_bad_fraction}; the first: "
        f"{first} Fix the log or the schema, or raise the limit."
    )
