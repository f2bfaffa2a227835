"""What every cluster backend offers, and the workload that it is given: a job, its arguments and its resources."""

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.cluster.values import (
    Argument,
    Bytes,
    Cpu,
    Cron,
    Image,
    Label,
    Namespace,
    Network,
    ObjectName,
    SecretKey,
    Variable,
)

Job: TypeAlias = Literal["train", "preprocess", "nightly"]
State: TypeAlias = Literal["suspended", "pending", "running", "succeeded", "failed"]


# Variables of a pod that are the job's own, or Kubernetes'.
RESERVED = {"HOME", "PATH", "JOB_NAME", "JOB_COMPLETION_INDEX", "OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}


class Workload(BaseModel):
    """One job and the resources it requests; jobs/conf/submit.yaml has the defaults, its --help the meanings."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    job: Job
    args: list[Argument]
    nodes: int = Field(ge=1)
    ranks_per_node: int = Field(ge=1)
    gpus_per_node: int = Field(ge=0)
    name: Label
    namespace: Namespace | None
    image: Image
    allow_tag: bool
    data_claim: ObjectName
    runs_claim: ObjectName
    storage: Bytes
    cpu: Cpu
    memory: Bytes
    shared_memory: Bytes
    ephemeral_storage: Bytes
    egress: list[Network]
    secrets: dict[Variable, SecretKey]
    grace_s: int = Field(ge=0)
    retries: int = Field(ge=0)
    deadline_s: int | None = Field(ge=1)
    ttl_s: int | None = Field(ge=0)
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
        if taken := sorted(RESERVED & self.secrets.keys()):
            raise ValueError(f"secrets.{taken[0]}: the pods set {taken[0]} themselves, choose another variable")
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
