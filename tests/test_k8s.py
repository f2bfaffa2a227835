"""k8s/: what is printed, submitted and kept in the base is valid, fits together, and is one and the same."""

import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from k8s_manifests import assert_valid, cluster, defaults, documents, job_spec, kustomized, main_of, newest_versions

from pipeline.cluster.kubernetes.backend import Kubernetes
from pipeline.cluster.kubernetes.kustomize import DEMO, base_files, demo_workload
from pipeline.cluster.kubernetes.manifests import claims, objects, to_yaml
from pipeline.cluster.kubernetes.pod import PORT, UID

ROOT = Path(__file__).parents[1]
BASE = ROOT / "k8s" / "base"
REWRITE = "python -m jobs.submit base k8s/base"


FLEET = {
    **{"queue": "gpu", "priority_class": "batch", "runtime_class": "nvidia", "node_selector": {"gpu": "h100"}},
    **{"tolerations": [{"key": "gpu", "effect": "NoSchedule"}, {"key": "team", "operator": "Equal", "value": "a"}]},
    **{"topology": "example.com/rack", "spread": "kubernetes.io/hostname", "devices": {"vpc.amazonaws.com/efa": 4}},
    "environment": {"NCCL_DEBUG": "INFO"},
}
WORKLOADS = {
    "train": {"job": "train"},
    "nodes": {"job": "train", "nodes": 2, "ranks_per_node": 8, "gpus_per_node": 8, "namespace": "ml", "suspend": True},
    "elastic": {"job": "train", "nodes": "2..8", **FLEET},
    "apart": {"job": "train", "nodes": 2, **FLEET, "queue": None},
    "preprocess": {"job": "preprocess", "words": ["data=demo", "out=/data/demo"]},
    "nightly": {"job": "nightly", "gpus_per_node": 1, **FLEET},
    "scheduled": {"job": "preprocess", "schedule": "0 1 * * *"},
    "service": {"job": "evaluate", "service": True, **FLEET},
    "compare": {"job": "compare"},
}


@pytest.mark.parametrize("values", WORKLOADS.values(), ids=WORKLOADS)
def test_every_object_is_valid_in_the_newest_three_versions_of_kubernetes(values: dict[str, Any]) -> None:
    for document in documents(**values).values():
        assert_valid(document)


def test_an_unknown_field_would_not_pass_the_validation() -> None:
    job = documents(job="train")["Job"]
    job["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        assert_valid(job)
    assert len(newest_versions()) == 3


def assert_ranks_can_meet(service: dict[str, Any], job: dict[str, Any]) -> None:
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    flags = dict(word.lstrip("-").split("=", 1) for word in container["command"] if word.startswith("--"))
    assert spec["completionMode"] == "Indexed"
    assert int(flags["nnodes"]) == spec["completions"] == spec["parallelism"]
    assert flags["node-rank"] == "$(JOB_COMPLETION_INDEX)"
    (name,) = [e for e in container["env"] if e["name"] == "JOB_NAME"]
    assert name["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"
    host, subdomain = flags["master-addr"].replace("$(JOB_NAME)", job["metadata"]["name"]).split(".")
    assert host == f"{job['metadata']['name']}-0"
    assert subdomain == pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert int(flags["master-port"]) == service["spec"]["ports"][0]["port"] == PORT


@pytest.mark.parametrize("nodes", [1, 3])
def test_the_pods_of_train_find_pod_0_by_the_name_of_the_service(nodes: int) -> None:
    found = documents(job="train", nodes=nodes, name="run-7")
    budget = ["PodDisruptionBudget"] if nodes > 1 else []
    # In this order: pods look for the name as soon as they start.
    assert list(found) == ["NetworkPolicy", "ServiceAccount", *budget, "Service", "Job"]
    assert_ranks_can_meet(found["Service"], found["Job"])


def test_a_rank_drives_one_gpu_and_retries_count_whole_trainings() -> None:
    job = documents(job="train", nodes=2, ranks_per_node=8, gpus_per_node=8, retries=3)["Job"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert "--nproc-per-node=8" in container["command"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert "--max-restarts=0" in container["command"], "a pod that is new counts from 0, and the others must as well"
    assert job["spec"]["backoffLimit"] == 6
    assert "nvidia.com/gpu" not in str(documents(job="train"))


PREEMPTION = [
    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [75]}},
]


@pytest.mark.parametrize(("job", "final"), [("train", []), ("preprocess", [1, 2, 3]), ("nightly", [1, 2, 3])])
def test_preemption_is_no_failure_and_a_nightly_that_did_not_pass_is_not_tried_again(
    job: str, final: list[int]
) -> None:
    rules = job_spec(main_of(documents(job=job)))["podFailurePolicy"]["rules"]
    more = [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": final}}] if final else []
    assert rules == PREEMPTION + more


def test_nightly_runs_one_at_a_time_on_its_schedule() -> None:
    spec = documents(job="nightly", schedule="30 2 * * 1-5")["CronJob"]["spec"]
    assert (spec["schedule"], spec["concurrencyPolicy"]) == ("30 2 * * 1-5", "Forbid")
    assert (spec["startingDeadlineSeconds"], spec["timeZone"]) == (3600, "Etc/UTC")
    assert (spec["successfulJobsHistoryLimit"], spec["failedJobsHistoryLimit"]) == (3, 3)


def test_any_job_can_be_started_by_the_clock() -> None:
    spec = documents(job="preprocess", schedule="0 1 * * *")["CronJob"]["spec"]
    assert spec["schedule"] == "0 1 * * *"
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] == 86400


def test_a_service_is_one_pod_that_is_started_again_whenever_it_ends() -> None:
    deployment = documents(job="evaluate", service=True)["Deployment"]
    spec = deployment["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert spec["template"]["spec"]["restartPolicy"] == "Always"
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    assert documents(job="evaluate", service=True, suspend=True)["Deployment"]["spec"]["replicas"] == 0


@pytest.mark.parametrize("job", ["train", "preprocess"])
def test_pods_run_as_the_user_of_the_image_with_what_they_were_given(job: str) -> None:
    given = {"data_claim": "logs", "shared_memory": "64Gi", "memory": "96Gi", "grace_s": 300, "words": ["a=$(HOME) $x"]}
    pod = documents(job=job, **given)["Job"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == UID
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 300
    assert container["resources"]["limits"]["memory"] == "96Gi"
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == "logs"
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert {m["mountPath"]: m["name"] for m in container["volumeMounts"]}["/dev/shm"] == "shared-memory"
    assert container["args"] == ["a=$$(HOME) $$x"], "Kubernetes would expand it"


def test_the_base_is_what_submit_prints() -> None:
    written = {path.name: path.read_text() for path in BASE.glob("*.yaml")}
    assert written == base_files(cluster()), f"rewrite it: {REWRITE}"
    for job in DEMO:
        printed = to_yaml(objects(cluster(), demo_workload(job, cluster())))
        assert written[f"{job}.yaml"].endswith(printed)


def test_the_shipped_cluster_has_every_setting_and_its_default_in_a_comment() -> None:
    assert cluster() == Kubernetes(backend="kubernetes")
    assert defaults().keys() == Kubernetes.model_fields.keys()
    lines = (ROOT / "jobs" / "conf" / "cluster" / "k8s.yaml").read_text().splitlines()
    assert [line for line in lines if "#" not in line] == ["backend: kubernetes"]


def test_the_base_is_whole_and_valid() -> None:
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    listed = kustomization["resources"] + kustomization["configurations"] + ["kustomization.yaml"]
    assert sorted(listed) == sorted(path.name for path in BASE.glob("*.yaml"))
    found = [d for name in kustomization["resources"] for d in yaml.safe_load_all((BASE / name).read_text())]
    for document in found:
        assert_valid(document)
    kinds = sorted(d["kind"] for d in found)
    policies, claimed, accounts = ["NetworkPolicy"] * 3, ["PersistentVolumeClaim"] * 2, ["ServiceAccount"] * 3
    assert kinds == ["CronJob", "Job", "Job", *policies, *claimed, "Service", *accounts]
    have = {d["metadata"]["name"] for d in found if d["kind"] == "PersistentVolumeClaim"}
    want = set(re.findall(r"claimName: (\S+)", "".join((BASE / n).read_text() for n in kustomization["resources"])))
    assert have == want == {c.metadata.name for c in claims(cluster()) if c.metadata}


def test_a_base_for_gpus_gives_them_to_train_alone(tmp_path: Path) -> None:
    files = base_files(cluster(jobs={"train": {"nodes": 4, "ranks_per_node": 8, "gpus_per_node": 8}}))
    assert "--nnodes=4" in files["train.yaml"]
    assert [name for name, text in files.items() if "nvidia.com/gpu" in text] == ["train.yaml"]


def test_an_overlay_may_put_a_prefix_before_every_name(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    overlay = {"resources": ["../base"], "namePrefix": "stage-", "namespace": "ml"}
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay" / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    found = {(d["kind"], d["metadata"]["name"]): d for d in kustomized(tmp_path / "overlay")}
    assert_ranks_can_meet(found["Service", "stage-taskfuse-train"], found["Job", "stage-taskfuse-train"])


def test_the_image_holds_every_package_and_runs_as_nobody_special() -> None:
    text = (ROOT / "k8s" / "Dockerfile").read_text()
    packages = re.search(r"include = \[(.*)\]", (ROOT / "pyproject.toml").read_text())
    assert packages
    for package in re.findall(r'"(\w+)\*"', packages[1]):
        assert f"COPY {package} {package}\n" in text
    assert f"USER {UID}\n" in text
    assert f"--uid {UID} " in text
    assert "\nENTRYPOINT []\n" in text
    assert "://" not in text, "which package index to use is said by whoever builds"


def test_the_default_image_is_this_version() -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version
    assert cluster().image == f"taskfuse:{version[1]}"
    assert f"-t taskfuse:{version[1]} ." in (ROOT / "k8s" / "Dockerfile").read_text()


def pod(**values: Any) -> dict[str, Any]:
    return dict(job_spec(main_of(documents(**values)))["template"])


def test_pods_go_where_the_cluster_says() -> None:
    spec = pod(job="nightly", **FLEET)["spec"]
    assert (spec["priorityClassName"], spec["runtimeClassName"]) == ("batch", "nvidia")
    assert spec["nodeSelector"] == {"gpu": "h100"}
    first, second = spec["tolerations"]
    assert first == {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert second == {"key": "team", "operator": "Equal", "value": "a"}
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in spec["containers"][0]["env"]


def test_a_topology_draws_the_pods_of_a_training_together_by_the_queue_or_else_by_affinity() -> None:
    queued = pod(job="train", nodes=4, **FLEET)
    assert queued["metadata"]["annotations"] == {"kueue.x-k8s.io/podset-preferred-topology": "example.com/rack"}
    assert "affinity" not in queued["spec"]
    by_affinity = pod(job="train", nodes=4, **FLEET | {"queue": None})
    (near,) = by_affinity["spec"]["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert near["podAffinityTerm"]["topologyKey"] == "example.com/rack"
    assert near["podAffinityTerm"]["labelSelector"]["matchLabels"].items() <= by_affinity["metadata"]["labels"].items()
    (apart,) = by_affinity["spec"]["topologySpreadConstraints"]
    assert (apart["topologyKey"], apart["maxSkew"]) == ("kubernetes.io/hostname", 1)
    alone = pod(job="train", **FLEET)["spec"]
    assert not {"affinity", "topologySpreadConstraints"} & alone.keys()


def test_a_queue_starts_what_is_created_suspended() -> None:
    job = documents(job="train", nodes=2, **FLEET)["Job"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    assert job["spec"]["suspend"] is True
    assert "suspend" not in documents(job="train")["Job"]["spec"]
    night = documents(job="nightly", **FLEET)["CronJob"]["spec"]
    assert night["suspend"] is False, "the clock starts it, then the queue"
    assert night["jobTemplate"]["spec"]["suspend"] is True
    assert night["jobTemplate"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"


def test_devices_are_those_of_a_node_of_a_training() -> None:
    for job, wanted in (("train", "4"), ("preprocess", None)):
        (container,) = pod(job=job, **FLEET)["spec"]["containers"]
        assert container["resources"]["limits"].get("vpc.amazonaws.com/efa") == wanted


RDMA = {"devices": {"rdma/hca_shared_devices_a": 1}}


def test_memory_is_locked_by_a_capability_only_where_rdma_and_the_cluster_ask_for_it() -> None:
    locked = {"nodes": 2, "ranks_per_node": 8, "gpus_per_node": 8, "ipc_lock": True, **RDMA}
    found = documents(job="train", **locked)
    assert_valid(found["Job"])
    spec = job_spec(found["Job"])["template"]["spec"]
    (container,) = spec["containers"]
    limits = container["resources"]["limits"]
    assert (limits["nvidia.com/gpu"], limits["rdma/hca_shared_devices_a"]) == ("8", "1")
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"add": ["IPC_LOCK"], "drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    user = {key: value for key, value in spec["securityContext"].items() if key.startswith("run")}
    assert user == {"runAsUser": 0, "runAsGroup": UID}, "Kubernetes gives user 1000 no capability that it adds"
    other = pod(job="evaluate", ipc_lock=True, **RDMA)["spec"]  # of the same files, without the devices
    assert other["securityContext"]["runAsUser"] == 0
    assert other["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    with pytest.raises(ValueError, match="ipc_lock: it is for devices of RDMA"):
        cluster(ipc_lock=True)


@pytest.mark.parametrize(
    ("given", "size"),
    [({}, "1536Mi"), ({"ranks_per_node": 4}, "3072Mi"), ({"ranks_per_node": 8, "gpus_per_node": 8}, "17408Mi"),
     ({"ranks_per_node": 8, "shared_memory": "3Gi"}, "3Gi")],
)  # fmt: skip
def test_shared_memory_grows_with_the_ranks_of_a_pod(given: dict[str, Any], size: str) -> None:
    (volume,) = [one for one in pod(job="train", **given)["spec"]["volumes"] if one["name"] == "shared-memory"]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": size}


@pytest.mark.parametrize(("nodes", "least"), [(2, 1), (8, 7), ("2..8", 2), ("7..8", 7)])
def test_drains_take_nodes_of_a_training_one_at_a_time_and_leave_what_it_needs(nodes: Any, least: int) -> None:
    found = documents(job="train", nodes=nodes)
    budget = found["PodDisruptionBudget"]["spec"]
    assert budget["minAvailable"] == least
    assert budget["selector"]["matchLabels"].items() <= found["Job"]["spec"]["template"]["metadata"]["labels"].items()
    assert "PodDisruptionBudget" not in documents(job="train")


def test_elastic_nodes_meet_at_pod_0_with_whose_success_the_job_is_complete() -> None:
    found = documents(job="train", nodes="2..8", name="run-7", queue="gpu")
    spec = found["Job"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    flags = dict(word.lstrip("-").split("=", 1) for word in container["command"] if word.startswith("--"))
    assert (flags["nnodes"], flags["rdzv-backend"]) == ("2:8", "c10d")
    host, _, port = flags["rdzv-endpoint"].replace("$(JOB_NAME)", "run-7").partition(":")
    assert host == f"run-7-0.{found['Service']['metadata']['name']}"
    assert int(port) == found["Service"]["spec"]["ports"][0]["port"]
    assert flags["max-restarts"] == "3", "a lost node is one of them"
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (8, 8, "Indexed")
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (3, 6)
    assert "backoffLimit" not in spec
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0", "succeededCount": 1}]}
    assert found["Job"]["metadata"]["annotations"] == {"kueue.x-k8s.io/job-min-parallelism": "2"}
    assert "successPolicy" not in documents(job="train", nodes=8)["Job"]["spec"]


def test_a_schedule_of_a_training_meets_at_the_service_of_its_cron_job() -> None:
    found = documents(job="train", nodes=2, schedule="0 1 * * *", name="weekly")
    (container,) = job_spec(found["CronJob"])["template"]["spec"]["containers"]
    assert f"--master-addr=$(JOB_NAME)-0.{found['Service']['metadata']['name']}" in container["command"]


def test_the_readme_names_the_versions_that_objects_are_checked_against() -> None:
    text = (ROOT / "k8s" / "README.md").read_text()
    assert f"({newest_versions()[0]} to {newest_versions()[-1]})" in text
    assert "`kubeflow-trainer-api` " + ".".join(metadata.version("kubeflow-trainer-api").split(".")[:2]) in text
