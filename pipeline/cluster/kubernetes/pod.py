"""The pod of a workload, the same in every kind of object that has one: container, volumes, security, placement."""

import math

from kubernetes import client

from pipeline.cluster.base import Workload, command
from pipeline.cluster.kubernetes.settings import KubernetesSettings
from pipeline.cluster.values import amount

PORT = 29500  # where the agents of torchrun meet, on pod 0
STORE_S = 300  # how long elastic ones wait for pod 0, at their start as later on
MEET_S = 1800  # how long they wait for each other: the last node may still be pulling the image
UID = 1000  # the user of k8s/Dockerfile
CONFIG = "/config"  # the team's configuration
INSTANCE = "app.kubernetes.io/instance"  # the label that picks the pods of one workload
QUEUE = "kueue.x-k8s.io/queue-name"
TOPOLOGY = "kueue.x-k8s.io/podset-preferred-topology"


def labels(work: Workload) -> dict[str, str]:
    """Of each object of a workload; those of its pods, by which policy, Service and budget find them."""
    return {"app.kubernetes.io/name": "taskfuse", "app.kubernetes.io/component": work.job, INSTANCE: work.name}


def selector(work: Workload) -> client.V1LabelSelector:
    """Picks the pods of a workload."""
    return client.V1LabelSelector(match_labels=labels(work))


def escaped(text: str) -> str:
    """A text that a container receives as it is: Kubernetes reads $(NAME) as a variable, and $$ as $."""
    return text.replace("$", "$$")


def pod_template(
    cluster: KubernetesSettings, work: Workload, files: dict[str, str], service: str
) -> client.V1PodTemplateSpec:
    """The pod of one node.

    Args:
        files: paths of the team's configuration to the keys of its ConfigMap; empty: there is none.
        service: the headless Service of a training, as a container's argument names it.
    """
    user = 0 if cluster.ipc_lock else UID
    topology = {TOPOLOGY: cluster.topology} if cluster.topology and cluster.queue and work.nodes.most > 1 else None
    return client.V1PodTemplateSpec(
        metadata=client.V1ObjectMeta(labels=labels(work), annotations=topology),
        spec=client.V1PodSpec(
            restart_policy="Always" if work.service else "Never",
            subdomain=work.name if work.kind.spread else None,
            termination_grace_period_seconds=work.grace_s,
            service_account_name=work.name,
            # The pull secrets of the account `default` are not those of a workload's own.
            image_pull_secrets=[client.V1LocalObjectReference(name=cluster.pull_secret)]
            if cluster.pull_secret
            else None,
            automount_service_account_token=False,
            enable_service_links=False,
            share_process_namespace=True,  # process 1 ignores SIGTERM unless it handles it: a job must not be process 1
            security_context=client.V1PodSecurityContext(
                run_as_non_root=True if user else None,
                run_as_user=user,
                run_as_group=UID,
                fs_group=UID,
                fs_group_change_policy="OnRootMismatch",
                seccomp_profile=client.V1SeccompProfile(type="RuntimeDefault"),
            ),
            containers=[_container(cluster, work, bool(files), service)],
            volumes=_volumes(cluster, work, files),
            **_placement(cluster, work),
        ),
    )


def _placement(cluster: KubernetesSettings, work: Workload) -> dict[str, object]:
    """On which nodes: `topology` draws the pods of a training together, `spread` keeps them apart."""
    affinity = spread = None
    if cluster.topology and not cluster.queue and work.nodes.most > 1:
        term = client.V1PodAffinityTerm(label_selector=selector(work), topology_key=cluster.topology)
        near = client.V1WeightedPodAffinityTerm(weight=100, pod_affinity_term=term)
        pod_affinity = client.V1PodAffinity(preferred_during_scheduling_ignored_during_execution=[near])
        affinity = client.V1Affinity(pod_affinity=pod_affinity)
    if cluster.spread and work.nodes.most > 1:
        spread = [
            client.V1TopologySpreadConstraint(
                max_skew=1,
                topology_key=cluster.spread,
                when_unsatisfiable="ScheduleAnyway",
                label_selector=selector(work),
            )
        ]
    return {
        "priority_class_name": cluster.priority_class,
        "runtime_class_name": cluster.runtime_class,
        "node_selector": dict(cluster.node_selector) or None,
        "tolerations": [client.V1Toleration(**dict(one)) for one in cluster.tolerations] or None,
        "affinity": affinity,
        "topology_spread_constraints": spread,
    }


def _volumes(cluster: KubernetesSettings, work: Workload, files: dict[str, str]) -> list[client.V1Volume]:
    def claim(name: str) -> client.V1PersistentVolumeClaimVolumeSource:
        return client.V1PersistentVolumeClaimVolumeSource(claim_name=name)

    shared = cluster.shared_memory_of(work.ranks_per_node, work.gpus_per_node)
    memory = client.V1EmptyDirVolumeSource(medium="Memory", size_limit=shared)
    disk = client.V1EmptyDirVolumeSource(size_limit=cluster.ephemeral_storage)
    found = [
        client.V1Volume(name="data", persistent_volume_claim=claim(cluster.data_claim)),
        client.V1Volume(name="runs", persistent_volume_claim=claim(cluster.runs_claim)),
        client.V1Volume(name="shared-memory", empty_dir=memory),
        client.V1Volume(name="tmp", empty_dir=disk),
    ]
    if files:
        items = [client.V1KeyToPath(key=key, path=path) for path, key in files.items()]
        source = client.V1ConfigMapVolumeSource(name=work.name, items=items)
        found.append(client.V1Volume(name="config", config_map=source))
    return found


def _container(cluster: KubernetesSettings, work: Workload, has_config: bool, service: str) -> client.V1Container:
    gpus = {"nvidia.com/gpu": str(work.gpus_per_node)} if work.gpus_per_node else {}
    devices = {name: str(number) for name, number in cluster.devices.items()} if work.kind.spread else {}
    shares = {"cpu": work.cpu, "memory": work.memory, "ephemeral-storage": cluster.ephemeral_storage}
    words = _command(work, has_config, service)
    own = len(words) - len(work.words)
    mounts = [
        client.V1VolumeMount(name="data", mount_path="/data", read_only=not work.kind.writes_data or None),
        client.V1VolumeMount(name="runs", mount_path="/runs"),
        client.V1VolumeMount(name="shared-memory", mount_path="/dev/shm"),
        client.V1VolumeMount(name="tmp", mount_path="/tmp"),
    ]
    if has_config:
        mounts.append(client.V1VolumeMount(name="config", mount_path=CONFIG, read_only=True))
    return client.V1Container(
        # The name by which Kubeflow's TrainJob knows the container of its trainer.
        name="node" if cluster.form == "trainjob" and work.kind.spread else work.job,
        image=cluster.image,
        command=words[:own],
        args=[escaped(word) for word in words[own:]] or None,
        env=_environment(cluster, work, "jobs.launch" in words[:own]),
        resources=client.V1ResourceRequirements(requests=shares, limits={**shares, **gpus, **devices}),
        security_context=client.V1SecurityContext(
            allow_privilege_escalation=False,
            capabilities=client.V1Capabilities(
                drop=["ALL"], add=["IPC_LOCK"] if devices and cluster.ipc_lock else None
            ),
            read_only_root_filesystem=True,
        ),
        volume_mounts=mounts,
    )


def _command(work: Workload, has_config: bool, service: str) -> list[str]:
    """By static rendezvous, whose failures count as the pods': a pod that joins anew must meet others that begin anew.

    Elastic nodes meet by c10d at pod 0, and go on where one is missing, which the launcher counts as a restart.
    """
    meet: list[str] = []
    host = f"$(JOB_NAME)-0.{service}"
    if work.kind.spread and work.nodes.is_elastic:
        wait = f"--rdzv-conf=read_timeout={STORE_S}"
        meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{PORT}", "--rdzv-id=$(JOB_NAME)", wait]
    elif work.kind.spread:
        wait = f"--rdzv-conf=timeout={MEET_S}"
        meet = ["--node-rank=$(JOB_COMPLETION_INDEX)", f"--master-addr={host}", f"--master-port={PORT}", wait]
    restarts = None if work.nodes.is_elastic else 0
    return command(work, "python", *meet, config_dir=CONFIG if has_config else None, restarts=restarts)


def _environment(cluster: KubernetesSettings, work: Workload, launched: bool) -> list[client.V1EnvVar]:
    # Caches of libraries, such as ~/.cache, ~/.config/matplotlib and ~/.triton: nothing but /tmp can be written.
    variables = [client.V1EnvVar(name="HOME", value="/tmp")]
    if launched:
        # The Job's name is read where it runs: kustomize may have put a prefix before it.
        label = client.V1ObjectFieldSelector(field_path="metadata.labels['batch.kubernetes.io/job-name']")
        grace_s = max(work.grace_s - 10, 1)  # by default torchrun kills its ranks 30 s after SIGTERM
        if work.kind.spread:
            variables.append(client.V1EnvVar(name="JOB_NAME", value_from=client.V1EnvVarSource(field_ref=label)))
        variables.append(client.V1EnvVar(name="TORCH_ELASTIC_SHUTDOWN_TIMEOUT", value=str(grace_s)))
    else:  # libraries start a thread a core of the node, whatever the limit; ranks read the limit themselves
        variables.append(client.V1EnvVar(name="OMP_NUM_THREADS", value=str(math.ceil(amount(work.cpu)))))
    for variable, value in sorted(cluster.environment.items()):
        variables.append(client.V1EnvVar(name=variable, value=escaped(value)))
    for variable, place in sorted(cluster.secrets.items()):
        name, key = place.split("/")
        source = client.V1EnvVarSource(secret_key_ref=client.V1SecretKeySelector(name=name, key=key))
        variables.append(client.V1EnvVar(name=variable, value_from=source))
    return variables
