"""The forms of a training beside an Indexed Job: a JobSet, and a TrainJob of Kubeflow Trainer, which makes a JobSet.

Both have no types in the Kubernetes client: they are mappings here, with the API's own keys.
"""

from typing import Any

from pipeline.cluster.base import Workload
from pipeline.cluster.kubernetes.settings import KubernetesSettings

NODE = "node"  # the replicated job of a JobSet; Kubeflow's name for it as well
ANCESTOR = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}  # by which a TrainJob finds it


def jobset(
    cluster: KubernetesSettings, work: Workload, head: dict[str, Any], template: dict[str, Any]
) -> dict[str, Any]:
    """A JobSet of one replicated job. Its own headless Service has the name of the workload.

    Args:
        head: apiVersion, kind and metadata. template: of the pods.
    """
    ttl = {} if cluster.ttl_s is None else {"ttlSecondsAfterFinished": cluster.ttl_s}
    return {**head, "spec": {**_jobset_spec(work, template), **ttl, **_suspended(cluster, work)}}


def train_job(
    cluster: KubernetesSettings, work: Workload, head: dict[str, Any], template: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A TrainingRuntime with the pods, and the TrainJob that runs it. No policy of a framework: our command says it all."""
    queueless = {key: value for key, value in head["metadata"]["labels"].items() if "kueue" not in key}
    runtime = {
        **head,
        "kind": "TrainingRuntime",
        "metadata": {**head["metadata"], "labels": queueless},
        "spec": {
            "mlPolicy": {"numNodes": work.nodes.most},
            "template": {"spec": _jobset_spec(work, template, ANCESTOR)},
        },
    }
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": work.name}
    return runtime, {**head, "spec": {"runtimeRef": reference, **_suspended(cluster, work)}}


def _suspended(cluster: KubernetesSettings, work: Workload) -> dict[str, bool]:
    return {"suspend": True} if work.suspend or cluster.queue else {}


def _jobset_spec(work: Workload, template: dict[str, Any], labels: dict[str, str] | None = None) -> dict[str, Any]:
    """All pods start anew together: one that fails takes its peers along, and one that was preempted does not count."""
    preempted = {"type": "DisruptionTarget", "status": "True"}
    rules = [
        {"action": "FailJob", "onPodConditions": [preempted]},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [75]}},
    ]
    job = {
        "completionMode": "Indexed",
        "completions": work.nodes.most,
        "parallelism": work.nodes.most,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": rules},
        "activeDeadlineSeconds": work.time_limit_s,
        "template": template,
    }
    uncounted = {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    overtime = {"name": "overtime", "action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]}
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": work.name},
        "failurePolicy": {"maxRestarts": work.retries, "rules": [uncounted, overtime]},
        "successPolicy": {"operator": "All"},
        "replicatedJobs": [
            {
                "name": NODE,
                "replicas": 1,
                "template": {**({"metadata": {"labels": labels}} if labels else {}), "spec": job},
            }
        ],
    }
