"""Settings of a Kubernetes cluster: what every pod there gets, where it may run and what it may reach."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.cluster.base import Cluster
from pipeline.cluster.values import (
    Bytes,
    DeviceName,
    Image,
    LabelKey,
    LabelValue,
    Namespace,
    Network,
    ObjectName,
    SecretKey,
    Variable,
    amount,
)

# Variables of a pod that are the job's own, or Kubernetes'.
RESERVED = {"HOME", "PATH", "JOB_NAME", "JOB_COMPLETION_INDEX", "OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}


# MiB of /dev/shm: of a pod, and of each of its ranks, for segments of NCCL between GPUs; decoding does not use it.
SHARED_MIB, SHARED_MIB_RANK, SHARED_MIB_GPU = 1024, 512, 2048


class Toleration(BaseModel):
    """A taint of nodes that pods may run on nevertheless, as Kubernetes spells it."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    key: LabelKey | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "Toleration":
        if (self.operator == "Equal") != (self.value is not None):
            raise ValueError("operator Equal takes a value, Exists none")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("operator Equal takes a key")
        return self


class KubernetesSettings(Cluster):
    """What jobs/conf/cluster/k8s.yaml sets; it says what each means."""

    backend: Literal["kubernetes"] = "kubernetes"
    context: str | None = None
    namespace: Namespace | None = None
    form: Literal["job", "jobset", "trainjob"] = "job"
    image: Image = "taskfuse:0.1.0"
    allow_tag: bool = False
    pull_secret: ObjectName | None = None
    data_claim: ObjectName = "taskfuse-data"
    runs_claim: ObjectName = "taskfuse-runs"
    storage: Bytes = "100Gi"
    shared_memory: Bytes | None = None
    ephemeral_storage: Bytes = "4Gi"
    devices: dict[DeviceName, int] = Field({})
    ipc_lock: bool = False
    egress: list[Network] = Field([])
    secrets: dict[Variable, SecretKey] = Field({})
    ttl_s: int | None = Field(604_800, ge=0)
    queue: ObjectName | None = None
    priority_class: ObjectName | None = None
    runtime_class: ObjectName | None = None
    node_selector: dict[LabelKey, LabelValue] = Field({})
    tolerations: list[Toleration] = Field([])
    topology: LabelKey | None = None
    spread: LabelKey | None = None

    @model_validator(mode="after")
    def _variables_are_free(self) -> "KubernetesSettings":
        for field, names in (("secrets", self.secrets), ("environment", self.environment)):
            if taken := sorted(RESERVED & names.keys()):
                raise ValueError(f"{field}.{taken[0]}: the pods set {taken[0]} themselves, choose another variable")
        if both := sorted(self.secrets.keys() & self.environment.keys()):
            raise ValueError(f"secrets.{both[0]}: environment sets {both[0]} too, remove one of the two")
        if wrong := [name for name, number in self.devices.items() if number < 1]:
            raise ValueError(f"devices.{wrong[0]}: a node gets 1 or more")
        if self.ipc_lock and not self.devices:
            raise ValueError("ipc_lock: it is for devices of RDMA, name them in devices")
        return self

    def shared_memory_of(self, ranks: int, gpus: int) -> str:
        """Size of /dev/shm of a pod, a quantity."""
        return self.shared_memory or f"{SHARED_MIB + ranks * (SHARED_MIB_GPU if gpus else SHARED_MIB_RANK)}Mi"

    def shared_bytes(self, ranks: int, gpus: int) -> int:
        """Bytes of /dev/shm of a pod, which are part of its memory."""
        return int(amount(self.shared_memory_of(ranks, gpus)))
