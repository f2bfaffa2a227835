"""What any cluster backend is told: a job, its arguments, and what it asks of the cluster."""

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Job: TypeAlias = Literal["train", "preprocess", "nightly"]


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
    """One job and what it asks of a cluster; jobs/conf/submit.yaml holds the defaults, its --help the meanings."""

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
