"""k8s/: JobSet and TrainJob hold what their own types know, and the same pod as an Indexed Job."""

import copy
from typing import Any

import pytest
from k8s_manifests import documents, job_spec, main_of
from kubeflow_trainer_api import models

MODELS: dict[str, Any] = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}
VALUES: list[dict[str, Any]] = [
    {"form": "jobset"},
    {"form": "jobset", "nodes": 4, "ranks_per_node": 8, "gpus_per_node": 8, "queue": "gpu", "topology": "rack"},
    {"form": "trainjob", "nodes": 4, "spread": "host", "devices": {"rdma/hca": 1}, "secrets": {"A": "b/c"}},
    {"form": "trainjob", "nodes": 4, "suspend": True, "ttl_s": None},
]


def known(document: dict[str, Any]) -> dict[str, Any]:
    """What the typed model makes of an object: keys that it does not know are gone."""
    return dict(MODELS[document["kind"]].from_dict(copy.deepcopy(document)).to_dict())


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_every_key_is_one_that_the_typed_models_know(values: dict[str, Any]) -> None:
    found = [document for kind, document in documents(**values).items() if kind in MODELS]
    assert [document["kind"] for document in found] == (
        ["JobSet"] if values["form"] == "jobset" else ["TrainingRuntime", "TrainJob"]
    )
    for document in found:
        assert known(document) == document


@pytest.mark.parametrize("place", ["spec", "network", "replicatedJobs", "container"])
def test_a_misspelt_key_would_be_found(place: str) -> None:
    document = documents(form="jobset")["JobSet"]
    spec = document["spec"]
    container = job_spec(document)["template"]["spec"]["containers"][0]
    at = {"spec": spec, "network": spec["network"], "replicatedJobs": spec["replicatedJobs"][0], "container": container}
    at[place]["mispelt"] = True
    assert known(document) != document


@pytest.mark.parametrize("form", ["jobset", "trainjob"])
def test_the_pods_are_those_of_an_indexed_job_and_meet_at_the_name_that_a_job_set_gives_pod_0(form: str) -> None:
    values = {"nodes": 4, "ranks_per_node": 2, "name": "run-7", "words": ["a=$(HOME)"]}
    found, job = documents(form=form, **values), documents(**values)["Job"]
    pods, usual = job_spec(main_of(found))["template"], job["spec"]["template"]
    (container,), (own,) = pods["spec"]["containers"], usual["spec"]["containers"]
    # A JobSet names its Job NAME-node-0, its pods by their index, and its Service as network.subdomain says.
    spec = found["JobSet"]["spec"] if form == "jobset" else found["TrainingRuntime"]["spec"]["template"]["spec"]
    (replicated,) = spec["replicatedJobs"]
    assert (replicated["name"], replicated["replicas"]) == ("node", 1)
    assert (spec["network"]["subdomain"], spec["network"]["enableDNSHostnames"]) == ("run-7", True)
    assert spec["network"]["publishNotReadyAddresses"] is True
    assert "Service" not in found, "the controller makes it"
    assert "--master-addr=$(JOB_NAME)-0.run-7" in container["command"]
    assert container.pop("name") == ("node" if form == "trainjob" else own["name"])
    container["command"] = [word.replace("0.run-7", "0.$(JOB_NAME)") for word in container["command"]]
    own.pop("name")
    assert pods == usual


@pytest.mark.parametrize("form", ["jobset", "trainjob"])
def test_pods_start_anew_together_and_preemption_does_not_count(form: str) -> None:
    found = documents(form=form, nodes=4, retries=2, queue="gpu")
    job = job_spec(main_of(found))
    assert job["backoffLimit"] == 0
    assert {rule["action"] for rule in job["podFailurePolicy"]["rules"]} == {"FailJob"}
    spec = found["JobSet"]["spec"] if form == "jobset" else found["TrainingRuntime"]["spec"]["template"]["spec"]
    rules = {rule["onJobFailureReasons"][0]: rule["action"] for rule in spec["failurePolicy"]["rules"]}
    assert rules == {"PodFailurePolicy": "RestartJobSetAndIgnoreMaxRestarts", "DeadlineExceeded": "FailJobSet"}
    assert spec["failurePolicy"]["maxRestarts"] == 2
    submitted = found["JobSet" if form == "jobset" else "TrainJob"]
    assert submitted["spec"]["suspend"] is True
    assert submitted["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"


def test_a_train_job_runs_its_own_runtime_and_finds_its_trainer_there() -> None:
    found = documents(form="trainjob", nodes=4)
    runtime, train = found["TrainingRuntime"], found["TrainJob"]
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": runtime["metadata"]["name"]}
    assert train["spec"]["runtimeRef"] == reference
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    step = "trainer.kubeflow.org/trainjob-ancestor-step"
    assert replicated["template"]["metadata"]["labels"] == {step: "trainer"}
    assert runtime["spec"]["mlPolicy"] == {"numNodes": 4}
    assert "suspend" not in runtime["spec"]["template"]["spec"]


@pytest.mark.parametrize("form", ["jobset", "trainjob"])
@pytest.mark.parametrize("job", ["preprocess", "evaluate"])
def test_other_jobs_are_jobs_in_any_form(form: str, job: str) -> None:
    assert "Job" in documents(form=form, job=job)
