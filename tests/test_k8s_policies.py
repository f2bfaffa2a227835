"""k8s/: what every pod may do, asserted over all jobs as submitted, in the base and in an overlay of it."""

import re
import shutil
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_manifests import DIGEST, NAMES, ROOT, assert_valid, documents, job_spec, kustomized, main_of, pod_of

from pipeline.cluster.base import JOBS
from pipeline.cluster.kubernetes.kustomize import DEMO

BASE = ROOT / "k8s" / "base"
OVERLAY = {
    "resources": ["../base"],
    "namePrefix": "stage-",
    "namespace": "ml",
    "labels": [{"pairs": {"stage": "yes"}, "includeSelectors": True}],
    "images": [{"name": "taskfuse", "newName": "registry.example/taskfuse", "digest": DIGEST}],
}
OVERLAYS = sorted(path for path in (ROOT / "k8s" / "overlays").iterdir() if path.is_dir())
SECRETS = {"AWS_SECRET_ACCESS_KEY": "logs-reader/secret.key"}


def by_kind(found: list[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """One mapping of kinds to objects per workload, told apart by the component label."""
    workloads: dict[str, dict[str, dict[str, Any]]] = {}
    for document in found:
        if component := document["metadata"].get("labels", {}).get("app.kubernetes.io/component"):
            workloads.setdefault(component, {})[document["kind"]] = document
    return list(workloads.values())


SUBMITTED: list[dict[str, Any]] = [
    *({"job": job, "name": f"run-{job}", "secrets": SECRETS} for job in NAMES),
    *({"job": job, "egress": ["10.1.0.0/16", "fd00::/8"], "namespace": "ml"} for job in NAMES),
    {"job": "train", "name": "large", "nodes": 4, "ranks_per_node": 8, "gpus_per_node": 8, "suspend": True},
    {"job": "train", "name": "rdma", "nodes": 2, "devices": {"rdma/hca_shared_devices_a": 1}},
    {"job": "train", "name": "elastic", "nodes": "2..8", "queue": "gpu", "topology": "rack", "spread": "host"},
    {"job": "train", "name": "set", "nodes": 4, "form": "jobset"},
    {"job": "train", "name": "kubeflow", "nodes": 4, "form": "trainjob"},
    {"job": "evaluate", "name": "follower", "service": True},
    {"job": "preprocess", "name": "hourly", "schedule": "0 * * * *"},
]


def submitted() -> list[dict[str, dict[str, Any]]]:
    return [documents(**values) for values in SUBMITTED]


def base() -> list[dict[str, dict[str, Any]]]:
    names = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    return by_kind([d for name in names for d in yaml.safe_load_all((BASE / name).read_text())])


@pytest.fixture
def overlay(tmp_path: Path) -> list[dict[str, dict[str, Any]]]:
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay" / "kustomization.yaml").write_text(yaml.safe_dump(OVERLAY))
    return by_kind(kustomized(tmp_path / "overlay"))


# Volume types that the restricted profile allows.
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def assert_restricted(pod: dict[str, Any]) -> None:
    """The rules of the pod security standards, baseline and restricted."""
    for field in ("hostNetwork", "hostPID", "hostIPC", "hostUsers", "initContainers", "ephemeralContainers"):
        assert field not in pod
    assert [set(volume) - {"name"} - VOLUMES for volume in pod["volumes"]] == [set()] * len(pod["volumes"])
    whole = pod["securityContext"]
    assert whole["runAsNonRoot"] is True
    assert whole["runAsUser"] > 0
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"sysctls", "seLinuxOptions", "windowsOptions", "appArmorProfile"} & whole.keys()
    for container in pod["containers"]:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        overriding = {"privileged", "procMount", "runAsUser", "runAsNonRoot", "seccompProfile", "seLinuxOptions"}
        assert not overriding & own.keys()
        assert "ports" not in container


def assert_contained(workload: dict[str, dict[str, Any]]) -> None:
    """What goes beyond the profile: files, credentials, resources, time."""
    pod, spec = pod_of(main_of(workload)), job_spec(main_of(workload))
    assert_restricted(pod)
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    (container,) = pod["containers"]
    job = pod["labels"]["app.kubernetes.io/component"]
    account = workload["ServiceAccount"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert account["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts.keys() == {"/data", "/runs", "/dev/shm", "/tmp"}
    assert {path for path, mount in mounts.items() if mount.get("readOnly")} == (
        set() if job in ("preprocess", "generate") else {"/data"}
    )
    for path in ("/tmp", "/dev/shm"):
        assert volumes[mounts[path]["name"]]["emptyDir"]["sizeLimit"]
    resources = container["resources"]
    assert resources["requests"].keys() == {"cpu", "memory", "ephemeral-storage"}
    assert resources["requests"].items() <= resources["limits"].items()
    environment = {entry["name"]: entry for entry in container["env"]}
    assert environment["HOME"]["value"] == "/tmp"
    assert not {"livenessProbe", "startupProbe", "readinessProbe", "lifecycle"} & container.keys()
    if main_of(workload)["kind"] == "Deployment":
        return
    assert spec["activeDeadlineSeconds"] >= 3600
    if main_of(workload)["kind"] in ("Job", "CronJob"):
        assert spec["ttlSecondsAfterFinished"] >= 3600


def admits(peer: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a peer of a policy is a pod of its namespace with these labels."""
    assert peer.keys() == {"podSelector"}
    assert peer["podSelector"].keys() == {"matchLabels"}
    return bool(peer["podSelector"]["matchLabels"].items() <= labels.items())


def assert_reached_by_its_own_pods_alone(workloads: list[dict[str, dict[str, Any]]]) -> None:
    """No pod without a policy, nothing comes in but what a pod of the same training sends."""
    for workload in workloads:
        pod, spec = pod_of(main_of(workload)), workload["NetworkPolicy"]["spec"]
        assert spec["podSelector"].keys() == {"matchLabels"}
        assert spec["podSelector"]["matchLabels"].items() <= pod["labels"].items()
        assert workload["NetworkPolicy"]["metadata"].get("namespace") == main_of(workload)["metadata"].get("namespace")
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        if pod["labels"]["app.kubernetes.io/component"] not in ("train", "search"):
            assert spec["ingress"] == []
            continue
        (rule,) = spec["ingress"]
        assert rule.keys() == {"from"}, "all ports, for gloo and NCCL choose theirs"
        (peer,) = rule["from"]
        assert admits(peer, pod["labels"])
        instance = "app.kubernetes.io/instance"
        assert not admits(peer, pod["labels"] | {instance: "another"})
        others = [pod_of(main_of(w))["labels"] for w in workloads if w is not workload]
        assert [o for o in others if o[instance] != pod["labels"][instance] and admits(peer, o)] == []


@pytest.mark.parametrize("values", SUBMITTED, ids=str)
def test_every_submitted_workload_is_contained(values: dict[str, Any]) -> None:
    assert_contained(documents(**values))


def test_every_workload_of_the_base_and_of_an_overlay_is_contained(overlay: list[dict[str, dict[str, Any]]]) -> None:
    assert len(base()) == len(overlay) == len(DEMO)
    for workload in [*base(), *overlay]:
        assert_contained(workload)


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_every_object_of_an_overlay_that_is_shipped_is_valid_and_contained(folder: Path) -> None:
    found = kustomized(folder)
    for document in found:
        assert_valid(document)
    workloads = by_kind(found)
    have = {document["metadata"]["name"] for document in found if document["kind"] == "PersistentVolumeClaim"}
    for workload in workloads:
        volumes = pod_of(main_of(workload))["volumes"]
        assert {v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v} <= have
        assert_contained(workload)
    assert_reached_by_its_own_pods_alone(workloads)


def overlay_of(name: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Workloads of an overlay that is shipped, by their component."""
    found = by_kind(kustomized(ROOT / "k8s" / "overlays" / name))
    return {main_of(workload)["metadata"]["labels"]["app.kubernetes.io/component"]: workload for workload in found}


def test_the_overlay_for_gpus_is_the_training_that_the_backend_would_submit() -> None:
    train = overlay_of("gpu")["train"]
    ours = documents(job="train", nodes=2, ranks_per_node=8, gpus_per_node=8, suspend=True)
    spec, expected = job_spec(main_of(train)), job_spec(main_of(ours))
    for key in ("completions", "parallelism", "backoffLimit"):
        assert spec[key] == expected[key]
    (container,), (known,) = spec["template"]["spec"]["containers"], expected["template"]["spec"]["containers"]
    assert container["command"] == known["command"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == known["resources"]["limits"]["nvidia.com/gpu"]
    shared = [
        [volume["emptyDir"] for volume in one["template"]["spec"]["volumes"] if volume["name"] == "shared-memory"]
        for one in (spec, expected)
    ]
    assert shared[0] == shared[1]
    assert train["PodDisruptionBudget"]["spec"] == ours["PodDisruptionBudget"]["spec"]


def test_the_overlay_for_kueue_queues_every_job_as_the_backend_would() -> None:
    for job, workload in overlay_of("kueue").items():
        main, ours = main_of(workload), main_of(documents(job=job, queue="taskfuse"))
        for one in (main, ours):
            template = one["spec"].get("jobTemplate", one)
            assert template["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "taskfuse"
            assert template["spec"]["suspend"] is True


def test_the_overlay_for_the_nightly_job_reads_the_folder_of_its_night() -> None:
    found = overlay_of("nightly")
    assert list(found) == ["nightly"]
    (container,) = pod_of(main_of(found["nightly"]))["containers"]
    assert container["args"][1].replace("$$", "$") == "input=/data/${now:%Y-%m-%d}"


def test_pods_are_reached_by_pods_of_the_same_training_alone(overlay: list[dict[str, dict[str, Any]]]) -> None:
    for workloads in (submitted(), base(), overlay):
        assert_reached_by_its_own_pods_alone(workloads)


def test_an_overlay_can_put_an_image_in_by_its_digest(overlay: list[dict[str, dict[str, Any]]]) -> None:
    images = {pod_of(main_of(workload))["containers"][0]["image"] for workload in overlay}
    assert images == {f"registry.example/taskfuse@{DIGEST}"}


def egress_of(job: str, **values: Any) -> list[dict[str, Any]]:
    return list(documents(job=job, **values)["NetworkPolicy"]["spec"]["egress"])


def assert_names_alone(rule: dict[str, Any]) -> None:
    assert rule["ports"] == [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
    pods, cache = rule["to"]
    assert pods["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}
    assert pods["podSelector"] == {"matchLabels": {"k8s-app": "kube-dns"}}
    network = ip_network(cache["ipBlock"]["cidr"])
    assert network.num_addresses == 1
    assert network.is_link_local


def test_trainings_connect_to_name_servers_and_their_own_pods_and_the_others_to_nothing() -> None:
    names, own = egress_of("train")
    assert_names_alone(names)
    policy = documents(job="train")["NetworkPolicy"]["spec"]
    assert own == {"to": [{"podSelector": policy["podSelector"]}]}
    assert [job for job in NAMES if egress_of(job)] == ["train", "search"]


@pytest.mark.parametrize("job", NAMES)
def test_networks_of_egress_are_connected_to_beside_them(job: str) -> None:
    names, rule = egress_of(job, egress=["10.1.0.0/16", "fd00::/8"])
    assert_names_alone(names)
    blocks = [peer["ipBlock"] for peer in rule["to"] if "ipBlock" in peer]
    assert blocks == [{"cidr": "10.1.0.0/16"}, {"cidr": "fd00::/8"}]
    assert ip_address("10.1.2.3") in ip_network(blocks[0]["cidr"])
    assert len(rule["to"]) == (3 if JOBS[job].spread else 2)


def test_deadlines_and_the_time_to_live_are_those_that_were_given() -> None:
    spec = job_spec(main_of(documents(job="nightly", time_limit_s=7200, ttl_s=60)))
    assert (spec["activeDeadlineSeconds"], spec["ttlSecondsAfterFinished"]) == (7200, 60)
    assert "ttlSecondsAfterFinished" not in job_spec(main_of(documents(job="train", ttl_s=None)))


@pytest.mark.parametrize("job", NAMES)
def test_a_secret_is_in_the_environment_by_reference(job: str) -> None:
    (container,) = pod_of(main_of(documents(job=job, secrets=SECRETS)))["containers"]
    (variable,) = [entry for entry in container["env"] if entry["name"] == "AWS_SECRET_ACCESS_KEY"]
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "logs-reader", "key": "secret.key"}}
    assert "value" not in variable


@pytest.mark.parametrize(("cpu", "threads"), [("8", "8"), ("500m", "1"), ("1500m", "2"), ("2.5", "3")])
def test_libraries_start_no_more_threads_than_the_limit_allows(cpu: str, threads: str) -> None:
    (container,) = pod_of(main_of(documents(job="preprocess", cpu=cpu)))["containers"]
    assert {"name": "OMP_NUM_THREADS", "value": threads} in container["env"]


def test_the_policy_for_prometheus_admits_one_namespace_to_one_port_of_a_training_as_it_is_submitted() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "k8s" / "PODS.md").read_text(), re.M | re.S)
    policy = yaml.safe_load(text)
    assert_valid(policy)
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    assert chosen
    assert chosen.items() <= pod_of(main_of(documents(job="train", name="taskfuse-train")))["labels"].items()
    assert not chosen.items() <= pod_of(main_of(documents(job="train", name="another")))["labels"].items()
    ((rule,),) = (policy["spec"]["ingress"],)
    assert rule["ports"] == [{"protocol": "TCP", "port": 9400}]
    (peer,) = rule["from"]
    assert peer == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert policy["spec"]["policyTypes"] == ["Ingress"]
