"""A workload as Kubernetes objects: a Job, indexed for train, one pod a node; a CronJob by the clock; a Deployment.

Before it come what its pods need: a NetworkPolicy, a ServiceAccount without rights, for train a headless Service, a
disruption budget for several nodes, and a ConfigMap with the team's configuration.
"""

import os
import re
from typing import Any, TypeAlias

import yaml
from kubernetes import client

from features.errors import UserError
from pipeline.cluster.base import Workload
from pipeline.cluster.kubernetes.config import config_files, keys_of
from pipeline.cluster.kubernetes.forms import jobset, train_job
from pipeline.cluster.kubernetes.network import network_policy, service
from pipeline.cluster.kubernetes.pod import QUEUE, labels, pod_template, selector
from pipeline.cluster.kubernetes.settings import KubernetesSettings

PREEMPTED = os.EX_TEMPFAIL  # the exit code of a job that saved its work, or had none to lose
LONGEST_HOST = 63  # characters of a host name, which each pod of a training has after its Job
MIN_PARALLELISM = "kueue.x-k8s.io/job-min-parallelism"
GROUPS = {
    "NetworkPolicy": "networking.k8s.io/v1",
    "ServiceAccount": "v1",
    "ConfigMap": "v1",
    "Service": "v1",
    "PodDisruptionBudget": "policy/v1",
    "Job": "batch/v1",
    "CronJob": "batch/v1",
    "Deployment": "apps/v1",
    "PersistentVolumeClaim": "v1",
    "JobSet": "jobset.x-k8s.io/v1alpha2",
    "TrainingRuntime": "trainer.kubeflow.org/v1alpha1",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
}
# A typed object of the client, or a mapping where the client has no type.
KubeObject: TypeAlias = Any


def main_kind(cluster: KubernetesSettings, work: Workload) -> str:
    """The kind of object that runs a workload; the others only serve its pods."""
    if work.service:
        return "Deployment"
    if work.schedule:
        return "CronJob"
    return {"job": "Job", "jobset": "JobSet", "trainjob": "TrainJob"}[cluster.form if work.kind.spread else "job"]


def elements(work: Workload) -> list[Workload]:
    """The workload itself, or those of its array, NAME-0 and so on."""
    if not work.array:
        return [work]
    return [
        work.model_copy(update={"name": f"{work.name}-{number}", "words": [*work.words, *words], "array": []})
        for number, words in enumerate(work.array)
    ]


def kinds(cluster: KubernetesSettings, work: Workload) -> list[str]:
    """The kinds of `objects` of one element, each with one object of the workload's name."""
    main = main_kind(cluster, work)
    return [
        "NetworkPolicy",
        "ServiceAccount",
        *(["ConfigMap"] if work.config_dir else []),
        *(["PodDisruptionBudget"] if work.nodes.most > 1 else []),
        *(["Service"] if work.kind.spread and main not in ("JobSet", "TrainJob") else []),
        *(["TrainingRuntime"] if main == "TrainJob" else []),
        main,
    ]


def objects(cluster: KubernetesSettings, work: Workload) -> list[KubeObject]:
    """The objects of one element, in the order in which they are created.

    Raises:
        UserError: the team's configuration does not fit into a ConfigMap.
    """
    content = config_files(work.config_dir) if work.config_dir else {}
    files = keys_of(content)
    main = main_kind(cluster, work)
    # A Job has its Service's name where it runs: kustomize may have put a prefix before both.
    template = pod_template(cluster, work, files, service="$(JOB_NAME)" if main == "Job" else work.name)
    made: list[KubeObject] = []
    for kind in kinds(cluster, work):
        head = _head(cluster, work, kind, queued=kind == main)
        match kind:
            case "NetworkPolicy":
                made.append(network_policy(cluster, work, head))
            case (
                "ServiceAccount"
            ):  # of its own, bound to no role: nothing that others allow `default` reaches these pods
                made.append(client.V1ServiceAccount(**head, automount_service_account_token=False))
            case "ConfigMap":
                made.append(client.V1ConfigMap(**head, data={files[path]: text for path, text in content.items()}))
            case "PodDisruptionBudget":
                made.append(_budget(work, head))
            case "Service":
                made.append(service(work, head))
            case "Job":
                made.append(client.V1Job(**head, spec=_job_spec(cluster, work, template)))
            case "CronJob":
                made.append(_cron_job(cluster, work, head, template))
            case "Deployment":
                made.append(_deployment(work, head, template))
            case "JobSet":
                made.append(jobset(cluster, work, _plain(head), _plain(template)))
            case "TrainJob":
                runtime, train = train_job(cluster, work, _plain(head), _plain(template))
                made += [runtime, train]
    return made


def claims(cluster: KubernetesSettings) -> list[KubeObject]:
    """The two volume claims. Pods of several nodes share them, so the storage class must offer ReadWriteMany."""
    return [
        client.V1PersistentVolumeClaim(
            api_version="v1",
            kind="PersistentVolumeClaim",
            metadata=client.V1ObjectMeta(name=name, namespace=cluster.namespace),
            spec=client.V1PersistentVolumeClaimSpec(
                access_modes=["ReadWriteMany"],
                resources=client.V1VolumeResourceRequirements(requests={"storage": cluster.storage}),
            ),
        )
        for name in (cluster.data_claim, cluster.runs_claim)
    ]


class _Dumper(yaml.SafeDumper):
    """Quotes more than PyYAML: kubectl's YAML reads 1e3 as a number and y as true."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "'" if re.match(r"[+-]?[0-9.]|[yYnN]\Z", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)


def to_yaml(parts: list[KubeObject]) -> str:
    """One multi-document stream for `kubectl apply -f -`."""
    return str(yaml.dump_all(_plain(parts), Dumper=_Dumper, explicit_start=True, sort_keys=False, width=120))


def _plain(part: Any) -> Any:
    """Mappings and lists instead of the client's types."""
    if isinstance(part, dict) and "api_version" in part:
        part = {{"api_version": "apiVersion"}.get(key, key): value for key, value in part.items()}
    return client.ApiClient().sanitize_for_serialization(part)


def _head(cluster: KubernetesSettings, work: Workload, kind: str, queued: bool = False) -> dict[str, Any]:
    own = labels(work) | ({QUEUE: cluster.queue} if cluster.queue and queued and kind != "CronJob" else {})
    partial = (
        {MIN_PARALLELISM: str(work.nodes.least)} if cluster.queue and kind == "Job" and work.nodes.is_elastic else None
    )
    metadata = client.V1ObjectMeta(name=work.name, namespace=cluster.namespace, labels=own, annotations=partial)
    return {"kind": kind, "api_version": GROUPS[kind], "metadata": metadata}


def _budget(work: Workload, head: dict[str, Any]) -> client.V1PodDisruptionBudget:
    """Drains take the nodes of a training one at a time: each costs all of them the way back to a checkpoint."""
    least, most = work.nodes
    spec = client.V1PodDisruptionBudgetSpec(
        min_available=min(least, most - 1), selector=selector(work), unhealthy_pod_eviction_policy="AlwaysAllow"
    )
    return client.V1PodDisruptionBudget(**head, spec=spec)


def _cron_job(
    cluster: KubernetesSettings, work: Workload, head: dict[str, Any], template: client.V1PodTemplateSpec
) -> client.V1CronJob:
    queue = {QUEUE: cluster.queue} if cluster.queue else {}
    return client.V1CronJob(
        **head,
        spec=client.V1CronJobSpec(
            schedule=work.schedule,
            time_zone="Etc/UTC",
            concurrency_policy="Forbid",
            starting_deadline_seconds=3600,
            successful_jobs_history_limit=3,
            failed_jobs_history_limit=3,
            suspend=work.suspend,
            job_template=client.V1JobTemplateSpec(
                metadata=client.V1ObjectMeta(labels=labels(work) | queue),
                spec=_job_spec(cluster, work.model_copy(update={"suspend": False}), template),
            ),
        ),
    )


def _deployment(work: Workload, head: dict[str, Any], template: client.V1PodTemplateSpec) -> client.V1Deployment:
    """One pod, which ends before the next one starts: two of them would do the same work."""
    return client.V1Deployment(
        **head,
        spec=client.V1DeploymentSpec(
            replicas=0 if work.suspend else 1,
            strategy=client.V1DeploymentStrategy(type="Recreate"),
            selector=selector(work),
            revision_history_limit=3,
            template=template,
        ),
    )


def _job_spec(cluster: KubernetesSettings, work: Workload, template: client.V1PodTemplateSpec) -> client.V1JobSpec:
    least, most = work.nodes
    preempted = client.V1PodFailurePolicyOnPodConditionsPattern(type="DisruptionTarget", status="True")
    kept = client.V1PodFailurePolicyOnExitCodesRequirement(operator="In", values=[PREEMPTED])
    rules = [
        client.V1PodFailurePolicyRule(action="Ignore", on_pod_conditions=[preempted]),
        client.V1PodFailurePolicyRule(action="Ignore", on_exit_codes=kept),
    ]
    if work.kind.final:
        final = client.V1PodFailurePolicyOnExitCodesRequirement(operator="In", values=list(work.kind.final))
        rules.append(client.V1PodFailurePolicyRule(action="FailJob", on_exit_codes=final))
    first = client.V1SuccessPolicyRule(succeeded_indexes="0", succeeded_count=1)
    elastic = {
        # Each node has its own retries, and as many as are not needed may use theirs up. Pod 0, where all meet, ends last.
        "backoff_limit_per_index": work.retries,
        "max_failed_indexes": most - least,
        "success_policy": client.V1SuccessPolicy(rules=[first]),
    }
    fixed = {"backoff_limit": work.retries * most}  # when one pod goes, the others lose their peer and fail with it
    return client.V1JobSpec(
        completion_mode="Indexed" if work.kind.spread else None,
        completions=most,
        parallelism=most,
        pod_failure_policy=client.V1PodFailurePolicy(rules=rules),
        active_deadline_seconds=work.time_limit_s,
        ttl_seconds_after_finished=cluster.ttl_s,
        suspend=work.suspend or bool(cluster.queue) or None,
        template=template,
        **(elastic if work.nodes.is_elastic else fixed),
    )


def check(cluster: KubernetesSettings, work: Workload) -> None:
    """Raises UserError for what this backend cannot do."""
    if work.after:
        raise UserError(
            f"after={','.join(work.after)}: Kubernetes starts no Job after another: submit it once the other has "
            "succeeded, or with suspend=true, to be started by hand"
        )
    if work.suspend and cluster.queue and not work.schedule and not work.service:
        raise UserError(
            f"suspend=true: the queue {cluster.queue} starts whatever is suspended in it: leave one of the two out"
        )
    suffix = {"CronJob": "-12345678", "JobSet": "-node-0", "TrainJob": "-node-0"}.get(main_kind(cluster, work), "")
    longest = max(len(one.name) for one in elements(work))
    over = longest + len(f"{suffix}-{work.nodes.most - 1}{'-abcde' if suffix == '-node-0' else ''}") - LONGEST_HOST
    if work.kind.spread and over > 0:
        raise UserError(f"name={work.name}: too long by {over} characters: pods are named after it")
    if work.service and (work.schedule or work.nodes.most > 1 or work.array):
        raise UserError("a service is one pod that runs on: leave schedule, nodes and array out")
    if cluster.form != "job" and work.kind.spread and (work.schedule or work.nodes.is_elastic):
        raise UserError(f"form={cluster.form} takes a fixed number of nodes and no schedule: set form=job")
