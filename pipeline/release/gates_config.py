"""gates.yaml: what a checkpoint must satisfy before it goes live, and the gates that hold where there is no such file."""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, field_validator, model_validator

from features.errors import UserError
from features.plain_json import Count, validated
from features.yaml_text import read_yaml
from pipeline.evaluation.metrics.evaluated import ALL
from pipeline.run.headline import HEADLINE

NE = ("ne", "ne_train")  # 1 is no better than predicting the base rate

_SHARE = re.compile(r"-?[0-9]+(\.[0-9]+)?%")

Name = Annotated[str, Field(min_length=1, max_length=1000)]


def _one_or_more(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


def _gates_of_task(given: Any) -> Any:
    return {"gates": given} if isinstance(given, list) else given


class Strict(BaseModel):
    """No keys but those that are listed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Change(Strict):
    """A bound on the change to the serving checkpoint: of two keys one, each a number, or a text such as 1% of serving's value.

    Attributes:
        worse_by_at_most: a non-inferiority margin. better_by_at_least: a gain to be shown (superiority).
    """

    worse_by_at_most: int | float | str | None = None
    better_by_at_least: int | float | str | None = None

    @field_validator("worse_by_at_most", "better_by_at_least", mode="plain")
    @classmethod
    def _is_amount(cls, given: Any) -> int | float | str | None:
        if given is not None and _amount(given)[0] < 0:
            raise ValueError("must be at least 0")
        return given

    @model_validator(mode="after")
    def _one_key(self) -> "Change":
        if (self.worse_by_at_most is None) == (self.better_by_at_least is None):
            raise ValueError("give one of worse_by_at_most and better_by_at_least")
        return self

    @property
    def margin(self) -> float:
        """By how much the candidate may be worse; negative: by how much it must be better. A share where `relative`."""
        if self.worse_by_at_most is not None:
            return _amount(self.worse_by_at_most)[0]
        assert self.better_by_at_least is not None
        return -(_amount(self.better_by_at_least)[0] or math.ulp(0.0))  # no change at all is no gain

    @property
    def relative(self) -> bool:
        """Whether the margin is a share of serving's value."""
        return isinstance(self.worse_by_at_most or self.better_by_at_least, str)

    def __str__(self) -> str:
        if self.worse_by_at_most is not None:
            return f"worse by at most {self.worse_by_at_most}"
        return f"better by at least {self.better_by_at_least}"


class Gate(Strict):
    """One condition on a metric.

    Attributes:
        metric: a name of metrics/registry.py. slice: the rows it is of. slices: instead, dimensions or patterns with *, of
            which every slice with rows is judged by itself.
        min, max, band: bounds of the figure, inclusive. change: of its change to serving. Exactly one kind of the two.
        confidence: of each one-sided bound.
        min_rows: fewer leave the gate undecided, or pass it (below_min_rows). Of what was evaluated without intervals the
            value alone is judged if there are as many.
        missing: what a slice without rows, or an undefined figure, does.
        allow_ne_above_one: do not require of a gate on NE that NE is below 1.
    """

    metric: Name
    slice: Name = ALL
    slices: Annotated[list[Name] | None, BeforeValidator(_one_or_more), Field(min_length=1, max_length=100)] = None
    min: FiniteFloat | None = None
    max: FiniteFloat | None = None
    band: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)] | None = None
    change: Change | None = None
    confidence: float = Field(0.95, ge=0.5, lt=1)
    min_rows: Count | None = None
    below_min_rows: Literal["undecided", "pass"] = "undecided"
    missing: Literal["fail", "pass"] = "fail"
    allow_ne_above_one: bool = False

    @model_validator(mode="after")
    def _one_kind_of_bound(self) -> "Gate":
        absolute = [key for key in ("min", "max", "band") if getattr(self, key) is not None]
        if self.change and absolute:
            raise ValueError(f"{absolute[0]} and change are two gates: write each as a gate of its own")
        if not self.change and not absolute:
            raise ValueError("has no bound: give min, max, band or change")
        if self.band and len(absolute) > 1:
            raise ValueError(f"give band or {absolute[0]}, not both")
        low, high = self.bounds
        if low > high:
            raise ValueError(f"the lower bound {low:g} is above the upper one {high:g}")
        if self.slices and self.slice != ALL:
            raise ValueError("give slice or slices, not both")
        if self.below_min_rows == "pass" and self.min_rows is None:
            raise ValueError("below_min_rows needs min_rows")
        if self.allow_ne_above_one and self.metric not in NE:
            raise ValueError(f"allow_ne_above_one is for gates on {' and '.join(NE)}")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest value allowed of a gate without `change`."""
        if self.band:
            return self.band[0], self.band[1]
        return -math.inf if self.min is None else self.min, math.inf if self.max is None else self.max

    def __str__(self) -> str:
        low, high = self.bounds
        if self.change:
            return f"{self.metric} {self.change}"
        if math.isfinite(low) and math.isfinite(high):
            return f"{self.metric} within {low:g} to {high:g}"
        return f"{self.metric} at least {low:g}" if math.isfinite(low) else f"{self.metric} at most {high:g}"


class TaskGates(Strict):
    """A task's own gates; a list stands for `gates`.

    Attributes:
        default: whether those of all tasks hold for it too. allow_ne_above_one: for all of them.
    """

    gates: list[Gate] = Field(default=[], max_length=1000)
    default: bool = True
    allow_ne_above_one: bool = False


class Gates(Strict):
    """The content of gates.yaml.

    Attributes:
        default: for each task that has the metric. tasks: by name, in addition.
    """

    default: list[Gate] = Field(default=[], max_length=1000)
    tasks: dict[Name, Annotated[TaskGates, BeforeValidator(_gates_of_task)]] = Field(default={}, max_length=1000)

    def of_task(self, task: str) -> TaskGates:
        """A task's own gates, none where it is not named."""
        return self.tasks.get(task, TaskGates())


def load_gates(path: Path) -> Gates:
    """Reads gates.yaml. Raises UserError with file and key: it is missing, no YAML, or holds what is no gate."""
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing. pipeline/release/GATES.md has an example.") from None
    return validated(Gates, content, path)


def default_gates(kinds: Mapping[str, str], max_increase: float) -> Gates:
    """Where there is no gates.yaml: each task's headline metric, of which lower is better, rises by max_increase at most.

    NE below 1 is asked of every binary task whatever its gates are.
    """
    change = Change(worse_by_at_most=max_increase)
    metrics = dict.fromkeys(HEADLINE[kind] for kind in kinds.values())
    return Gates(default=[Gate(metric=metric, change=change) for metric in metrics])


def _amount(given: Any) -> tuple[float, bool]:
    """A number, or a text as 1%, as a number and whether it is a share. Raises ValueError."""
    share, number = isinstance(given, str) and _SHARE.fullmatch(given) is not None, math.nan
    if share or (isinstance(given, int | float) and not isinstance(given, bool)):
        with suppress(OverflowError):
            number = float(given[:-1]) / 100 if share else float(given)
    if not math.isfinite(number):
        raise ValueError("must be a number, or a share of the serving checkpoint's value such as 1%")
    return number, share
