"""A job as typed Kubernetes objects: train an Indexed Job, one pod a node; preprocess a Job; nightly a CronJob."""

import os
from typing import Any, TypeAlias

import yaml
from kubernetes import client

from pipeline.cluster.base import Workload

PORT = 29500  # where the agents of torchrun meet, on pod 0
MEET_S = 1800  # how long they wait for each other: the last node may still be pulling the image
UID = 1000  # the user of k8s/Dockerfile
INSTANCE = "app.kubernetes.io/instance"  # the label that picks the pods of one workload
KubeObject: TypeAlias = client.V1Service | client.V1Job | client.V1CronJob | client.V1PersistentVolumeClaim


def objects(work: Workload) -> list[KubeObject]:
    """The objects of a workload, in the order in which they are created."""
    match work.job:
        case "train":
            return [_service(work), client.V1Job(kind="Job", **_head("batch/v1", work), spec=_job_spec(work))]
        case "preprocess":
            return [client.V1Job(kind="Job", **_head("batch/v1", work), spec=_job_spec(work))]
        case "nightly":
            return [_cron_job(work)]


def claims(work: Workload) -> list[KubeObject]:
    """The two volume claims. Pods of several nodes share them, so the storage class must offer ReadWriteMany."""
    return [
        client.V1PersistentVolumeClaim(
            api_version="v1",
            kind="PersistentVolumeClaim",
            metadata=client.V1ObjectMeta(name=name, namespace=work.namespace),
            spec=client.V1PersistentVolumeClaimSpec(
                access_modes=["ReadWriteMany"],
                resources=client.V1VolumeResourceRequirements(requests={"storage": work.storage}),
            ),
        )
        for name in (work.data_claim, work.runs_claim)
    ]


def to_yaml(parts: list[KubeObject]) -> str:
    """One multi-document stream for `kubectl apply -f -`."""
    plain = client.ApiClient().sanitize_for_serialization(parts)
    return str(yaml.safe_dump_all(plain, explicit_start=True, sort_keys=False, width=120))


def _head(api_version: str, work: Workload) -> dict[str, Any]:
    metadata = client.V1ObjectMeta(name=work.name, namespace=work.namespace, labels=_labels(work))
    return {"api_version": api_version, "metadata": metadata}


def _labels(work: Workload) -> dict[str, str]:
    return {"app.kubernetes.io/name": "taskfuse", "app.kubernetes.io/component": work.job, INSTANCE: work.name}


def _service(work: Workload) -> client.V1Service:
    """Headless: it only gives pod 0 the name JOB-0.SERVICE, and before that pod is ready, for the others wait there."""
    return client.V1Service(
        kind="Service",
        **_head("v1", work),
        spec=client.V1ServiceSpec(
            cluster_ip="None",
            publish_not_ready_addresses=True,
            selector=_labels(work),
            ports=[client.V1ServicePort(name="rendezvous", port=PORT)],
        ),
    )


def _cron_job(work: Workload) -> client.V1CronJob:
    return client.V1CronJob(
        kind="CronJob",
        **_head("batch/v1", work),
        spec=client.V1CronJobSpec(
            schedule=work.schedule,
            time_zone="Etc/UTC",
            concurrency_policy="Forbid",
            starting_deadline_seconds=3600,
            suspend=work.suspend,
            job_template=client.V1JobTemplateSpec(
                metadata=client.V1ObjectMeta(labels=_labels(work)),
                spec=_job_spec(work.model_copy(update={"suspend": False})),
            ),
        ),
    )


def _job_spec(work: Workload) -> client.V1JobSpec:
    preempted = client.V1PodFailurePolicyOnPodConditionsPattern(type="DisruptionTarget", status="True")
    rules = [client.V1PodFailurePolicyRule(action="Ignore", on_pod_conditions=[preempted])]
    if work.job == "train":
        kept = client.V1PodFailurePolicyOnExitCodesRequirement(operator="In", values=[os.EX_TEMPFAIL])  # jobs.launch
        rules.append(client.V1PodFailurePolicyRule(action="Ignore", on_exit_codes=kept))
    else:  # 1: bad input, 2: worse than allowed. torchrun makes 1 of whatever else a rank exits with
        final = client.V1PodFailurePolicyOnExitCodesRequirement(operator="In", values=[1, 2])
        rules.append(client.V1PodFailurePolicyRule(action="FailJob", on_exit_codes=final))
    return client.V1JobSpec(
        completion_mode="Indexed" if work.job == "train" else None,
        completions=work.nodes,
        parallelism=work.nodes,
        backoff_limit=work.retries * work.nodes,  # when one pod goes, the others lose their peer and fail with it
        pod_failure_policy=client.V1PodFailurePolicy(rules=rules),
        suspend=work.suspend or None,
        template=client.V1PodTemplateSpec(metadata=client.V1ObjectMeta(labels=_labels(work)), spec=_pod_spec(work)),
    )


def _pod_spec(work: Workload) -> client.V1PodSpec:
    def claim(name: str) -> client.V1PersistentVolumeClaimVolumeSource:
        return client.V1PersistentVolumeClaimVolumeSource(claim_name=name)

    memory = client.V1EmptyDirVolumeSource(medium="Memory", size_limit=work.shared_memory)
    return client.V1PodSpec(
        restart_policy="Never",
        subdomain=work.name if work.job == "train" else None,
        termination_grace_period_seconds=work.grace_s,
        automount_service_account_token=False,
        share_process_namespace=True,  # process 1 ignores SIGTERM unless it handles it: a job must not be process 1
        security_context=client.V1PodSecurityContext(
            run_as_non_root=True,
            run_as_user=UID,
            run_as_group=UID,
            fs_group=UID,
            fs_group_change_policy="OnRootMismatch",
            seccomp_profile=client.V1SeccompProfile(type="RuntimeDefault"),
        ),
        containers=[_container(work)],
        volumes=[
            client.V1Volume(name="data", persistent_volume_claim=claim(work.data_claim)),
            client.V1Volume(name="runs", persistent_volume_claim=claim(work.runs_claim)),
            client.V1Volume(name="shared-memory", empty_dir=memory),
        ],
    )


def _container(work: Workload) -> client.V1Container:
    gpus = {"nvidia.com/gpu": str(work.gpus_per_node)} if work.gpus_per_node else {}
    return client.V1Container(
        name=work.job,
        image=work.image,
        command=_command(work),
        args=[arg.replace("$(", "$$(") for arg in work.args] or None,  # $(NAME) is Kubernetes' own
        env=_environment(work) or None,
        resources=client.V1ResourceRequirements(
            requests={"cpu": work.cpu, "memory": work.memory}, limits={"memory": work.memory, **gpus}
        ),
        security_context=client.V1SecurityContext(
            allow_privilege_escalation=False, capabilities=client.V1Capabilities(drop=["ALL"])
        ),
        volume_mounts=[
            client.V1VolumeMount(name="data", mount_path="/data", read_only=True if work.job == "train" else None),
            client.V1VolumeMount(name="runs", mount_path="/runs"),
            client.V1VolumeMount(name="shared-memory", mount_path="/dev/shm"),
        ],
    )


def _command(work: Workload) -> list[str]:
    if work.job != "train":
        return ["python", "-m", f"jobs.{work.job}"]
    return [
        "python",
        "-m",
        "jobs.launch",
        f"--nnodes={work.nodes}",
        f"--nproc-per-node={work.ranks_per_node}",
        "--node-rank=$(JOB_COMPLETION_INDEX)",
        "--master-addr=$(JOB_NAME)-0.$(JOB_NAME)",
        f"--master-port={PORT}",
        f"--rdzv-conf=timeout={MEET_S}",
        "-m",
        "jobs.train",
    ]


def _environment(work: Workload) -> list[client.V1EnvVar]:
    if work.job != "train":
        return []
    # The Job's name is read where it runs: kustomize may have put a prefix before it.
    label = client.V1ObjectFieldSelector(field_path="metadata.labels['batch.kubernetes.io/job-name']")
    grace_s = max(work.grace_s - 10, 1)  # torchrun kills its ranks 30 s after SIGTERM unless told otherwise
    return [
        client.V1EnvVar(name="JOB_NAME", value_from=client.V1EnvVarSource(field_ref=label)),
        client.V1EnvVar(name="TORCH_ELASTIC_SHUTDOWN_TIMEOUT", value=str(grace_s)),
    ]
