"""What every cluster backend offers, and the workload that it is given: a job, its arguments and its resources."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, Protocol, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Job: TypeAlias = Literal["train", "preprocess", "nightly"]
State: TypeAlias = Literal["suspended", "pending", "running", "succeeded", "failed"]


def _like(pattern: str, what: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r} is not {what}")
        return text

    return AfterValidator(check)


# 52 characters: a CronJob appends eleven to its own.
Label = Annotated[
    str,
    _like(
        r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?",
        "a DNS label: lower-case letters, digits and '-', a letter first, at most 52 characters",
    ),
]
Name = Annotated[str, _like(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", "a name of lower-case letters, digits and '-'")]
Quantity = Annotated[str, _like(r"\d+(\.\d+)?(m|k|[KMGTP]i|[MGTP])?", "a Kubernetes quantity such as 4, 500m or 16Gi")]
Cron = Annotated[str, _like(r"\s*\S+(\s+\S+){4}\s*", "a cron schedule of five fields such as '0 3 * * *'")]
Argument = Annotated[str, _like(r"(?s)[^=]+=.*|~.+|--.+", "KEY=VALUE")]


class Workload(BaseModel):
    """One job and the resources it requests; jobs/conf/submit.yaml has the defaults, its --help the meanings."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    job: Job
    args: list[Argument]
    nodes: int = Field(ge=1)
    ranks_per_node: int = Field(ge=1)
    gpus_per_node: int = Field(ge=0)
    name: Label
    namespace: Name | None
    image: str = Field(min_length=1)
    data_claim: Name
    runs_claim: Name
    storage: Quantity
    cpu: Quantity
    memory: Quantity
    shared_memory: Quantity
    grace_s: int = Field(ge=0)
    retries: int = Field(ge=0)
    schedule: Cron
    suspend: bool

    @model_validator(mode="after")
    def _fits_together(self) -> "Workload":
        if self.job != "train" and (self.nodes, self.ranks_per_node) != (1, 1):
            raise ValueError(f"{self.job} is one process: leave nodes and ranks_per_node at 1")
        if self.job == "preprocess" and self.gpus_per_node:
            raise ValueError("preprocess uses no GPU: leave gpus_per_node at 0")
        if self.job == "train" and self.gpus_per_node not in (0, self.ranks_per_node):
            raise ValueError(
                f"gpus_per_node is {self.gpus_per_node} and ranks_per_node {self.ranks_per_node}: "
                "a rank drives one GPU, so make them equal, or gpus_per_node=0 to train on CPU"
            )
        return self


class Status(NamedTuple):
    """State of a submitted workload, and a detail for a person: pod counts, a reason of failure, a schedule."""

    state: State
    detail: str


class Backend(Protocol):
    """Where workloads run. Each method raises UserError, with the reason, where the backend cannot do it or refuses."""

    def render(self, work: Workload) -> str:
        """The complete text of what `submit` starts, for a dry run: a command line, or a stream of manifests."""

    def submit(self, work: Workload) -> str:
        """Starts the workload, all of it or nothing. Returns one line for a person: what was created, how to follow it."""

    def status(self, work: Workload) -> Status:
        """State of the workload of this job and name."""

    def logs(self, work: Workload) -> Iterator[str]:
        """Log lines so far, each after the name of its process."""

    def stop(self, work: Workload) -> None:
        """Ends the workload: SIGTERM, then SIGKILL after `grace_s`. A run keeps its checkpoints."""
