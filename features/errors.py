"""Exceptions that end a job with a message for its user."""

from collections.abc import Sequence

from features.printable import printable


class UserError(Exception):
    """Bad input, in one line: what, where (file, line or key), what to do. Jobs print it and exit with code 1."""


class Preempted(Exception):  # noqa: N818
    """A job was asked to end and has saved its work: the same command resumes. Jobs exit with code 75 (EX_TEMPFAIL)."""


def join_faults(faults: Sequence[str], most: int = 20) -> str:
    """The first faults, in one line, and how many more there are."""
    more = f"; and {len(faults) - most:,} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more


def one_line(error: BaseException) -> str:
    """The message of an exception, shortened, on one line, without a full stop and control characters."""
    return printable(" ".join(str(error).split())[:300].rstrip(".")) or type(error).__name__
