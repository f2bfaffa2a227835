"""What every cluster backend offers, and what it is given: a job, its command line and its resources."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from features.errors import UserError
from pipeline.cluster.values import Argument, Bytes, Cpu, Cron, Label, Nodes, Value, Variable

State: TypeAlias = Literal["suspended", "pending", "running", "succeeded", "failed", "stopped", "unknown"]
ENDED: tuple[State, ...] = ("succeeded", "failed", "stopped")


class JobKind(NamedTuple):
    """What a backend must know of a kind of job.

    Attributes:
        launched: by jobs.launch: it may have several ranks.
        spread: over several nodes too.
        gpus: it uses GPUs where it gets them.
        trains: it trains a run, whose tables must fit, which has one trainer, and which may take days.
        writes_data: it writes datasets; all others write only below their run or output folder.
        final: exit codes that a second attempt would meet again; 75 is always tried again.
    """

    launched: bool = False
    spread: bool = False
    gpus: bool = True
    trains: bool = False
    writes_data: bool = False
    final: tuple[int, ...] = (1, 2, 3)


# By which ranks find each other.
TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}

# The jobs that can be submitted; each is `python -m jobs.NAME`.
JOBS: dict[str, JobKind] = {
    "train": JobKind(launched=True, spread=True, trains=True, final=()),  # a lost rank ends with 1 as well
    "search": JobKind(launched=True, spread=True, trains=True, final=()),
    "preprocess": JobKind(gpus=False, writes_data=True),
    "evaluate": JobKind(launched=True),
    "explain": JobKind(),
    "predict": JobKind(),
    "nightly": JobKind(),
    "compare": JobKind(),
}


class Resources(BaseModel):
    """What one node of a workload gets; None: the cluster's default for the job, or else derived from the job.

    Attributes:
        nodes: that run it together: a number, or MIN..MAX for one that goes on with fewer.
        ranks_per_node: processes of jobs.launch on each.
        gpus_per_node: 0 for CPU.
        cpu: of a node, a Kubernetes quantity. memory: likewise.
        time_limit_s: after which it is ended as if preempted.
        grace_s: between SIGTERM and SIGKILL.
        retries: failures that are tried again, preemption not counted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    nodes: Nodes | None = None
    ranks_per_node: int | None = Field(None, ge=1)
    gpus_per_node: int | None = Field(None, ge=0)
    cpu: Cpu | None = None
    memory: Bytes | None = None
    time_limit_s: int | None = Field(None, ge=1)
    grace_s: int | None = Field(None, ge=0)
    retries: int | None = Field(None, ge=0)

    def over(self, other: "Resources") -> "Resources":
        """These where they are given, else the other's."""
        return Resources.model_validate({**_given(other), **_given(self)})


def _given(resources: Resources) -> dict[str, Any]:
    return {name: value for name, value in resources if value is not None}


class Workload(BaseModel):
    """One submission, complete.

    Attributes:
        job: one of JOBS. words: its command line, without --config-dir.
        config_dir: folder of the team's configuration, which the job must see too; None: it needs none.
        name: of the submission.
        after: native ids of submissions that must succeed before it starts.
        array: several jobs that differ in these words each, run side by side; empty: one job.
        schedule: it is started by the clock, UTC; None: now.
        suspend: create it stopped.
        service: it never ends by itself, and is started again whenever it does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: str
    words: list[Argument]
    config_dir: Path | None = None
    name: Label
    nodes: Nodes
    ranks_per_node: int = Field(ge=1)
    gpus_per_node: int = Field(ge=0)
    cpu: Cpu
    memory: Bytes
    time_limit_s: int = Field(ge=1)
    grace_s: int = Field(ge=0)
    retries: int = Field(ge=0)
    after: list[str] = []
    array: list[list[Argument]] = []
    schedule: Cron | None = None
    suspend: bool = False
    service: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> "Workload":
        kind = self.kind
        if self.ranks_per_node > 1 and not kind.launched:
            raise ValueError(f"{self.job} is one process: leave ranks_per_node at 1")
        if self.nodes.most > 1 and not kind.spread:
            raise ValueError(f"{self.job} runs on one node: leave nodes at 1")
        if self.gpus_per_node and not kind.gpus:
            raise ValueError(f"{self.job} uses no GPU: leave gpus_per_node at 0")
        if kind.launched and self.gpus_per_node not in (0, self.ranks_per_node):
            raise ValueError(
                f"gpus_per_node is {self.gpus_per_node} and ranks_per_node {self.ranks_per_node}: "
                "a rank drives one GPU, so make them equal, or gpus_per_node=0 for CPU"
            )
        if self.schedule and (self.after or self.array):
            raise ValueError("schedule starts a job by the clock: leave after and array out")
        return self

    @property
    def kind(self) -> JobKind:
        """What the job is."""
        return JOBS[self.job]


class UnansweredError(UserError):
    """A submission that was sent and not answered: the job may be there. native: its id, where that is known."""

    def __init__(self, message: str, native: str | None = None) -> None:
        super().__init__(message)
        self.native = native


class Status(NamedTuple):
    """State of a submission, and a detail for a person: pod counts, nodes, a reason of failure, a schedule.

    Attributes:
        restarts: how often the backend has started it again; None where it does not count.
    """

    state: State
    detail: str
    restarts: int | None = None


class Cluster(BaseModel):
    """A named cluster: a file of jobs/conf/cluster, or of a team's own --config-dir. Backends add their settings.

    Attributes:
        backend: the class that reads the rest, one of BACKENDS.
        environment: variables of every job; values that are secret stand in a backend's own store, by reference.
        resources: of any job there. jobs: of one by its name, before those.
        paths: a folder as jobs see it to the same folder as this machine sees it, for `status` to read runs.
        gpu_memory: bytes of one GPU, as 80GB, for the sharding plan; None: not checked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    backend: str
    environment: dict[Variable, Value] = {}
    resources: Resources = Resources()
    jobs: dict[str, Resources] = {}
    paths: dict[Path, Path] = {}
    gpu_memory: str | None = None

    @field_validator("gpu_memory")
    @classmethod
    def _is_of_a_gpu(cls, text: str | None) -> str | None:
        with suppress(ValidationError):
            if text is None or TypeAdapter(ByteSize).validate_python(text) >= 1 << 20:
                return text
        raise ValueError(f"{text!r} is not bytes of a GPU such as 80GB")

    @field_validator("environment")
    @classmethod
    def _reaches_ranks(cls, environment: dict[str, str]) -> dict[str, str]:
        """NCCL takes what it cannot read for unset, and says nothing; torchrun's own variables would be another's."""
        for name, value in environment.items():
            if name in TORCHRUN:
                raise ValueError(f"{name} is torchrun's own: jobs.launch sets it")
            if name.upper().startswith("NCCL_") and name != name.upper():
                raise ValueError(f"{name}: NCCL reads {name.upper()} alone")
            if name.startswith("NCCL_") and not re.fullmatch(r"[!-~]+", value):
                raise ValueError(f"{name} is {value[:100]!r}: NCCL takes one word, a list by commas without spaces")
        return environment

    @model_validator(mode="after")
    def _knows_its_jobs(self) -> "Cluster":
        if unknown := sorted(self.jobs.keys() - JOBS.keys()):
            raise ValueError(f"jobs.{unknown[0]} is none of {', '.join(JOBS)}")
        return self

    def resources_of(self, job: str) -> Resources:
        """The defaults for a job."""
        return self.jobs.get(job, Resources()).over(self.resources)

    def of_job(self, path: Path) -> Path:
        """A path on a job's command line, absolute."""
        return path.absolute()

    def shared_bytes(self, ranks: int, gpus: int) -> int:  # noqa: ARG002
        """Bytes of a node's memory that its ranks may fill beside their own, such as those of a tmpfs at /dev/shm."""
        return 0

    def pinned(self) -> dict[str, Any]:
        """The settings that depend on where and when they are read, as they are here and now: a record keeps them."""
        return {}

    def seen_here(self, path: Path) -> Path:
        """A path of a job as this machine sees it."""
        for there, here in self.paths.items():
            if path.is_relative_to(there):
                return here / path.relative_to(there)
        return path


class Backend(Protocol):
    """Where workloads run: a `Cluster` with these methods. Each raises UserError, with the reason, where it cannot."""

    def render(self, work: Workload) -> str:
        """The complete text of what `submit` starts: a command line, a batch script, a stream of manifests."""

    def submit(self, work: Workload) -> str:
        """Starts the workload, all of it or nothing. Returns the native id, by which the other methods know it.

        Raises:
            UnansweredError: it may have started.
        """

    def status(self, work: Workload, native: str) -> Status:
        """State of a submitted workload."""

    def logs(self, work: Workload, native: str, rank: int | None, follow: bool) -> Iterator[str]:
        """Log lines, each after the name of its process, without control characters.

        Args:
            rank: of this one alone; None: of all. follow: wait for more until the workload ends.
        """

    def stop(self, work: Workload, native: str) -> None:
        """Ends the workload: SIGTERM, then SIGKILL after `grace_s`. A run keeps its checkpoints."""


def command(
    work: Workload, python: str, *rendezvous: str, config_dir: str | None = None, restarts: int | None = None
) -> list[str]:
    """The words that run a workload on one of its nodes.

    Args:
        python: the interpreter. rendezvous: flags of jobs.launch by which several nodes meet.
        config_dir: where the job sees the team's configuration.
        restarts: of the ranks by jobs.launch, where the backend counts otherwise; None: `retries`.
    """
    module = [f"jobs.{work.job}", *([f"--config-dir={config_dir}"] if config_dir else []), *work.words]
    if not work.kind.launched or (not work.kind.trains and work.ranks_per_node == 1):
        return [python, "-m", *module]
    least, most = work.nodes
    max_restarts = work.retries if restarts is None else restarts
    nodes = f"{least}:{most}" if least < most else str(most)
    flags = [f"--nnodes={nodes}", f"--nproc-per-node={work.ranks_per_node}", f"--max-restarts={max_restarts}"]
    return [python, "-m", "jobs.launch", *flags, *rendezvous, "-m", *module]


def of_rank(line: str, rank: int) -> bool:
    """Whether a line of a job's output is one rank's, as jobs.entry marks it."""
    return re.search(rf"^(?:\S+ )?(?:\d\d:\d\d:\d\d  rank {rank}  |error \(rank {rank}\): )", line) is not None


def state_folder() -> Path:
    """Where this machine keeps what it has submitted: taskfuse in XDG_STATE_HOME, or else in ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "taskfuse"
