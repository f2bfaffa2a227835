"""The cluster backends by the name that `cluster=` takes."""

from pipeline.cluster.base import Backend
from pipeline.cluster.kubernetes import Kubernetes
from pipeline.cluster.local import Local

BACKENDS: dict[str, Backend] = {"local": Local(), "k8s": Kubernetes()}
