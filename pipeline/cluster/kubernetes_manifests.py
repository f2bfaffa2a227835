"""A job as typed Kubernetes objects: train an Indexed Job, one pod a node; preprocess a Job; nightly a CronJob.

Each comes after a NetworkPolicy of its own: the rendezvous of torchrun and gloo do not authenticate clients.
"""

import math
import os
import re
from decimal import Decimal
from typing import Any, TypeAlias

import yaml
from kubernetes import client

from pipeline.cluster.base import Workload

Job = str

PORT = 29500  # where the agents of torchrun meet, on pod 0
MEET_S = 1800  # how long they wait for each other: the last node may still be pulling the image
UID = 1000  # the user of k8s/Dockerfile
INSTANCE = "app.kubernetes.io/instance"  # the label that picks the pods of one workload
DNS_CACHE = "169.254.20.10/32"  # where NodeLocal DNSCache listens, outside of any pod
DEADLINES_S: dict[Job, int] = {"train": 7 * 86400, "preprocess": 86400, "nightly": 86400}
KubeObject: TypeAlias = (
    client.V1NetworkPolicy | client.V1Service | client.V1Job | client.V1CronJob | client.V1PersistentVolumeClaim
)


def objects(work: Workload) -> list[KubeObject]:
    """The objects of a workload, in the order in which they are created."""
    match work.job:
        case "train":
            main: list[KubeObject] = [_service(work), client.V1Job(**_head("Job", work), spec=_job_spec(work))]
        case "preprocess":
            main = [client.V1Job(**_head("Job", work), spec=_job_spec(work))]
        case "nightly":
            main = [_cron_job(work)]
    return [_network_policy(work), *main]


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


class _Dumper(yaml.SafeDumper):
    """Quotes more than PyYAML: kubectl's YAML reads 1e3 as a number and y as true."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "'" if re.match(r"[+-]?[0-9.]|[yYnN]\Z", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)


def to_yaml(parts: list[KubeObject]) -> str:
    """One multi-document stream for `kubectl apply -f -`."""
    plain = client.ApiClient().sanitize_for_serialization(parts)
    return str(yaml.dump_all(plain, Dumper=_Dumper, explicit_start=True, sort_keys=False, width=120))


def escaped(text: str) -> str:
    """A text that a container receives as it is: Kubernetes reads $(NAME) as a variable, and $$ as $."""
    return text.replace("$", "$$")


def _head(kind: str, work: Workload) -> dict[str, Any]:
    versions = {"Service": "v1", "NetworkPolicy": "networking.k8s.io/v1"}
    metadata = client.V1ObjectMeta(name=work.name, namespace=work.namespace, labels=_labels(work))
    return {"kind": kind, "api_version": versions.get(kind, "batch/v1"), "metadata": metadata}


def _labels(work: Workload) -> dict[str, str]:
    return {"app.kubernetes.io/name": "taskfuse", "app.kubernetes.io/component": work.job, INSTANCE: work.name}


def _network_policy(work: Workload) -> client.V1NetworkPolicy:
    """Pods of train talk to each other on any port, for gloo and NCCL choose theirs; all others accept nothing.

    Nothing else goes out but DNS and what the networks of `egress` get; volumes are the node's traffic.
    """
    own = client.V1NetworkPolicyPeer(pod_selector=client.V1LabelSelector(match_labels=_labels(work)))
    networks = [client.V1NetworkPolicyPeer(ip_block=client.V1IPBlock(cidr=cidr)) for cidr in work.egress]
    name_server = client.V1NetworkPolicyPeer(
        namespace_selector=client.V1LabelSelector(match_labels={"kubernetes.io/metadata.name": "kube-system"}),
        pod_selector=client.V1LabelSelector(match_labels={"k8s-app": "kube-dns"}),
    )
    name_cache = client.V1NetworkPolicyPeer(ip_block=client.V1IPBlock(cidr=DNS_CACHE))
    names = client.V1NetworkPolicyEgressRule(
        to=[name_server, name_cache],
        ports=[client.V1NetworkPolicyPort(protocol=protocol, port=53) for protocol in ("UDP", "TCP")],
    )
    train = work.job == "train"
    peers = [*([own] if train else []), *networks]
    return client.V1NetworkPolicy(
        **_head("NetworkPolicy", work),
        spec=client.V1NetworkPolicySpec(
            pod_selector=client.V1LabelSelector(match_labels=_labels(work)),
            policy_types=["Ingress", "Egress"],
            # The client's stub calls it var_from, which is dropped without a word, and a rule without from admits all.
            ingress=[client.V1NetworkPolicyIngressRule(_from=[own])] if train else [],  # type: ignore[call-arg]
            egress=[names, client.V1NetworkPolicyEgressRule(to=peers)] if peers else [],
        ),
    )


def _service(work: Workload) -> client.V1Service:
    """Headless: it only gives pod 0 the name JOB-0.SERVICE, and before that pod is ready, for the others wait there."""
    return client.V1Service(
        **_head("Service", work),
        spec=client.V1ServiceSpec(
            cluster_ip="None",
            publish_not_ready_addresses=True,
            selector=_labels(work),
            ports=[client.V1ServicePort(name="rendezvous", port=PORT)],
        ),
    )


def _cron_job(work: Workload) -> client.V1CronJob:
    return client.V1CronJob(
        **_head("CronJob", work),
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
    else:  # 1: bad input; of nightly 2: failed, 3: undecided
        final = client.V1PodFailurePolicyOnExitCodesRequirement(operator="In", values=[1, 2, 3])
        rules.append(client.V1PodFailurePolicyRule(action="FailJob", on_exit_codes=final))
    return client.V1JobSpec(
        completion_mode="Indexed" if work.job == "train" else None,
        completions=work.nodes,
        parallelism=work.nodes,
        backoff_limit=work.retries * work.nodes,  # when one pod goes, the others lose their peer and fail with it
        pod_failure_policy=client.V1PodFailurePolicy(rules=rules),
        active_deadline_seconds=work.deadline_s or DEADLINES_S[work.job],
        ttl_seconds_after_finished=work.ttl_s,
        suspend=work.suspend or None,
        template=client.V1PodTemplateSpec(metadata=client.V1ObjectMeta(labels=_labels(work)), spec=_pod_spec(work)),
    )


def _pod_spec(work: Workload) -> client.V1PodSpec:
    def claim(name: str) -> client.V1PersistentVolumeClaimVolumeSource:
        return client.V1PersistentVolumeClaimVolumeSource(claim_name=name)

    memory = client.V1EmptyDirVolumeSource(medium="Memory", size_limit=work.shared_memory)
    disk = client.V1EmptyDirVolumeSource(size_limit=work.ephemeral_storage)
    return client.V1PodSpec(
        restart_policy="Never",
        subdomain=work.name if work.job == "train" else None,
        termination_grace_period_seconds=work.grace_s,
        automount_service_account_token=False,
        enable_service_links=False,
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
            client.V1Volume(name="tmp", empty_dir=disk),
        ],
    )


def _container(work: Workload) -> client.V1Container:
    gpus = {"nvidia.com/gpu": str(work.gpus_per_node)} if work.gpus_per_node else {}
    shares = {"cpu": work.cpu, "memory": work.memory, "ephemeral-storage": work.ephemeral_storage}
    return client.V1Container(
        name=work.job,
        image=work.image,
        command=_command(work),
        args=[escaped(arg) for arg in work.args] or None,
        env=_environment(work),
        resources=client.V1ResourceRequirements(requests=shares, limits={**shares, **gpus}),
        security_context=client.V1SecurityContext(
            allow_privilege_escalation=False,
            capabilities=client.V1Capabilities(drop=["ALL"]),
            read_only_root_filesystem=True,
        ),
        volume_mounts=[
            client.V1VolumeMount(name="data", mount_path="/data", read_only=work.job != "preprocess" or None),
            client.V1VolumeMount(name="runs", mount_path="/runs"),
            client.V1VolumeMount(name="shared-memory", mount_path="/dev/shm"),
            client.V1VolumeMount(name="tmp", mount_path="/tmp"),
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
    # Caches of libraries, such as ~/.cache, ~/.config/matplotlib and ~/.triton: nothing but /tmp can be written.
    variables = [client.V1EnvVar(name="HOME", value="/tmp")]
    if work.job == "train":
        # The Job's name is read where it runs: kustomize may have put a prefix before it.
        label = client.V1ObjectFieldSelector(field_path="metadata.labels['batch.kubernetes.io/job-name']")
        grace_s = max(work.grace_s - 10, 1)  # torchrun kills its ranks 30 s after SIGTERM unless told otherwise
        variables += [
            client.V1EnvVar(name="JOB_NAME", value_from=client.V1EnvVarSource(field_ref=label)),
            client.V1EnvVar(name="TORCH_ELASTIC_SHUTDOWN_TIMEOUT", value=str(grace_s)),
        ]
    else:  # libraries start a thread a core of the node, whatever the limit; ranks read the limit themselves
        cpus = Decimal(work.cpu[:-1]) / 1000 if work.cpu.endswith("m") else Decimal(work.cpu)
        variables.append(client.V1EnvVar(name="OMP_NUM_THREADS", value=str(math.ceil(cpus))))
    for variable, place in sorted(work.secrets.items()):
        name, key = place.split("/")
        selector = client.V1SecretKeySelector(name=name, key=key)
        source = client.V1EnvVarSource(secret_key_ref=selector)
        variables.append(client.V1EnvVar(name=variable, value_from=source))
    return variables
