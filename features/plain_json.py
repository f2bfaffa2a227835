"""Untrusted JSON: limited size and depth, numbers of 64 bits, errors of one line."""

import json
import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from features.errors import UserError, fault_text, one_line
from features.printable import printable
from features.regular_files import read_regular

MAX_BYTES = 64 << 20  # of a manifest or statistics; parsed they take some ten times as many
INT64_LIMIT = 1 << 63  # of an integer, exclusive

Count = Annotated[int, Field(ge=0, lt=1 << 53)]  # so that sums of them are 64-bit integers
Model = TypeVar("Model", bound=BaseModel)


def parse_json(content: bytes, where: object, strict: bool = True) -> Any:
    """The value of a JSON text in UTF-8.

    Args:
        where: it is, for errors.
        strict: refuse NaN and Infinity, which Python writes and JSON does not have, numbers that overflow, and lone surrogates.
    Raises:
        UserError: it is no JSON, or nested too deep; an integer of more than 64 bits; whatever else `strict` refuses.
    """
    try:
        found = json.loads(
            content.decode(), parse_int=_integer, parse_float=_number if strict else float,
            parse_constant=_refuse if strict else None,
        )  # fmt: skip
        if strict and b"\\ud" in content.lower():  # single surrogates cannot be written; pairs are characters
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError(f"{where}: no valid JSON: nested too deep") from None
    except ValueError as error:
        raise UserError(f"{where}: no valid JSON: {one_line(error)}") from None
    return found


def read_json(folder: Path, name: str, limit: int = MAX_BYTES) -> Any:
    """The value of the JSON file `name` below `folder`. Raises FileNotFoundError, UserError (see read_regular, parse_json)."""
    return parse_json(read_regular(folder, name, limit), folder / name)


def validated(model: type[Model], content: Any, where: object) -> Model:
    """A model of parsed JSON whose types are exact: no text for a number. Raises UserError with the first fault's place."""
    try:
        return model.model_validate(content, strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: {first_fault(error)}") from None


def first_fault(error: BaseException) -> str:
    """The first fault of a validation, its place and what is wrong, in a line of limited length; another error's message."""
    if not isinstance(error, ValidationError):
        return one_line(error)
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    text = fault_text(first)
    return printable(f"{place[:200]}: {text[:300]}" if place else text[:300])


def _integer(text: str) -> int:
    if len(text) > 20 or not -INT64_LIMIT <= (number := int(text)) < INT64_LIMIT:
        raise ValueError(f"the number {text[:30]} has more than 64 bits")
    return number


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:30]} is too large")
    return number


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no number")
