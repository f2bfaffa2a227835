"""Which split a row belongs to: by a hash of a key, by its index, or by time."""

from datetime import date, datetime, time, timezone
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BeforeValidator, Field, model_validator

from features.source import Strict

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
FIRST_DAY, LAST_DAY = 19_900_101, 21_001_231  # as YYYYMMDD


def utc(value: Any) -> Any:
    """Dates and times without a zone are UTC: a split must not move with the machine's zone.

    Raises ValueError for a number such as 20261107, which would be seconds of 1970.
    """
    if isinstance(value, int | float) and FIRST_DAY <= value <= LAST_DAY:
        raise ValueError(f"{value} is no time: write it as 2026-11-07 or 2026-11-07T12:00:00Z")
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    if isinstance(moment, date) and not isinstance(moment, datetime):  # what YAML makes of a date without quotes
        moment = datetime.combine(moment, time())
    return moment.replace(tzinfo=timezone.utc) if isinstance(moment, datetime) and moment.tzinfo is None else value


class HashSplit(Strict):
    """Rows with the same key are in the same split; `valid` and `test` are shares of the keys."""

    by: Literal["hash"]
    key: str
    valid: float = Field(ge=0, lt=1)
    test: float = Field(ge=0, lt=1)

    @model_validator(mode="after")
    def _something_to_train_on(self) -> "HashSplit":
        if self.valid + self.test >= 1:
            raise ValueError("valid and test together must be less than 1")
        return self


class RowIndexSplit(Strict):
    """By a row's index in its file modulo `modulo`."""

    by: Literal["row_index"]
    modulo: int = Field(ge=1, le=100_000)
    train: list[int]
    valid: list[int] = Field([])
    test: list[int] = Field([])

    @model_validator(mode="after")
    def _every_remainder_once(self) -> "RowIndexSplit":
        if sorted(self.train + self.valid + self.test) != list(range(self.modulo)):
            raise ValueError(f"train, valid and test must hold each of 0..{self.modulo - 1} once")
        return self


class TimeSplit(Strict):
    """train | valid_from <= valid < test_from | test, by event time; dates are UTC."""

    by: Literal["time"]
    valid_from: Annotated[AwareDatetime, BeforeValidator(utc)]
    test_from: Annotated[AwareDatetime, BeforeValidator(utc)]

    @model_validator(mode="after")
    def _in_order(self) -> "TimeSplit":
        if self.valid_from > self.test_from:
            raise ValueError("valid_from must not be after test_from")
        return self
