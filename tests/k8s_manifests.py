"""Manifests for tests: what a workload creates on a Kubernetes cluster, by kind."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubernetes_validate.utils import all_versions, major_minor

from pipeline.cluster.base import JOBS, Workload
from pipeline.cluster.kubernetes.backend import Kubernetes
from pipeline.cluster.kubernetes.manifests import objects, to_yaml

ROOT = Path(__file__).parents[1]
DIGEST = "sha256:" + "0123456789abcdef" * 4
NAMES = list(JOBS)
WORKLOAD: dict[str, Any] = {
    **{"words": [], "nodes": 1, "ranks_per_node": 1, "gpus_per_node": 0, "cpu": "2", "memory": "8Gi"},
    **{"time_limit_s": 86400, "grace_s": 120, "retries": 3},
}


def newest_versions() -> list[str]:
    """The three newest minor versions whose schemas are installed, oldest first."""
    found = {tuple(map(int, major_minor(version).split("."))) for version in all_versions()}
    return [".".join(map(str, version)) for version in sorted(found)[-3:]]


def assert_valid(document: dict[str, Any]) -> None:
    """Fails where one of the newest versions of Kubernetes does not know a field of an object."""
    for version in newest_versions():
        _validate(json.dumps(document), version)


@cache  # most objects come again in each overlay, and one takes a tenth of a second
def _validate(text: str, version: str) -> None:
    kubernetes_validate.validate(json.loads(text), version, strict=True)


def kustomized(folder: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization as kubectl, of the environment that runs the tests, reads them."""
    command = [str(Path(sys.executable).with_name("kubectl")), "kustomize", str(folder)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return list(yaml.safe_load_all(text))


@cache
def defaults() -> dict[str, Any]:
    """Settings of jobs/conf/cluster/k8s.yaml."""
    return dict(yaml.safe_load((ROOT / "jobs" / "conf" / "cluster" / "k8s.yaml").read_text()))


def cluster(**values: Any) -> Kubernetes:
    """The shipped cluster with these settings, the others left out."""
    return Kubernetes.model_validate(defaults() | {k: v for k, v in values.items() if k in Kubernetes.model_fields})


def workload(**values: Any) -> Workload:
    """A workload with these values, settings of a cluster left out."""
    job = values.get("job", "train")
    known = WORKLOAD | {"job": job, "name": f"taskfuse-{job}", "schedule": "0 3 * * *" if job == "nightly" else None}
    return Workload.model_validate(known | {k: v for k, v in values.items() if k not in Kubernetes.model_fields})


def manifests(**values: Any) -> str:
    """YAML of a workload on a cluster."""
    return to_yaml(objects(cluster(**values), workload(**values)))


def documents(**values: Any) -> dict[str, Any]:
    """The objects of a workload, read back from YAML."""
    return {d["kind"]: d for d in yaml.safe_load_all(manifests(**values))}


def main_of(found: dict[str, Any]) -> dict[str, Any]:
    """The object that has the pods."""
    (main,) = (found[kind] for kind in ("Job", "CronJob", "Deployment", "JobSet", "TrainingRuntime") if kind in found)
    return dict(main)


def job_spec(document: dict[str, Any]) -> dict[str, Any]:
    """The spec with the pod template."""
    spec = document["spec"]
    if document["kind"] == "TrainingRuntime":
        spec = spec["template"]["spec"]
    if "replicatedJobs" in spec:
        (one,) = spec["replicatedJobs"]
        return dict(one["template"]["spec"])
    return dict(spec["jobTemplate"]["spec"] if "jobTemplate" in spec else spec)


def pod_of(document: dict[str, Any]) -> dict[str, Any]:
    """The pod of an object that has one: its labels and its spec."""
    template = job_spec(document)["template"]
    return {"labels": template["metadata"]["labels"], **template["spec"]}
