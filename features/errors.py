"""Exceptions that end a job with a message for its user."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any

from features.printable import printable

# Names are compared in time that grows with their number and length.
MOST_KNOWN, LONGEST = 10_000, 200


class UserError(Exception):
    """Bad input, in one line: what, where (file, line or key), what to do. Jobs print it and exit with code 1."""


class OtherRankError(UserError):
    """Another rank failed or is gone: its own error says why."""


class Preempted(Exception):  # noqa: N818
    """A job was asked to end and has saved its work: the same command resumes. Jobs exit with code 75 (EX_TEMPFAIL)."""


def fault_text(error: Any) -> str:
    """The message of a validation error of pydantic (one of its `errors()`), without words for its own classes and tags."""
    context = error.get("ctx", {})
    if error["type"] == "union_tag_invalid":
        near = did_you_mean(context["tag"], re.findall("'(.+?)'", context["expected_tags"]))
        return f"{printable(context['tag'][:LONGEST])} is not one of {context['expected_tags']}{near}"
    if error["type"] == "union_tag_not_found":
        return f"{context['discriminator'].strip(chr(39))} is missing"
    if error["type"] in ("dict_type", "model_type", "model_attributes_type"):
        return "Input should be a mapping"
    return str(error["msg"]).removeprefix("Value error, ")


def join_faults(faults: Sequence[str], most: int = 20) -> str:
    """The first faults, in one line, and how many more there are."""
    more = f"; and {len(faults) - most:,} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean NAME?)` with the known name that is nearest to a mistyped one; empty where none is near."""
    candidates = list(islice(known, MOST_KNOWN))
    near = get_close_matches(name[:LONGEST], candidates, 1) or [c for c in candidates if c.lower() == name.lower()]
    return f" (did you mean {printable(near[0][:LONGEST])}?)" if near else ""


def one_line(error: BaseException) -> str:
    """The message of an exception, shortened, on one line, without a full stop and control characters."""
    return printable(" ".join(str(error).split())[:300].rstrip(".")) or type(error).__name__
