"""pipeline/cluster: what every cluster that is shipped does."""

from pathlib import Path

import pytest
import yaml
from k8s_manifests import NAMES, workload
from kubernetes.config import kube_config

from pipeline.cluster.registry import BACKENDS, open_cluster
from pipeline.storage.store_path import place

CLUSTERS = sorted((Path(__file__).parents[2] / "jobs" / "conf" / "cluster").glob("*.yaml"))
IDS = [path.stem for path in CLUSTERS]
WORDS = ["data=demo", "against=a b"]


def content(path: Path) -> dict[str, object]:
    """What a cluster's file holds; an image is there, though it is one by its tag."""
    found = dict(yaml.safe_load(path.read_text()))
    return found | ({"allow_tag": True} if "allow_tag" in found else {})


def test_every_backend_has_a_cluster_that_is_shipped() -> None:
    assert {str(content(path)["backend"]) for path in CLUSTERS} <= BACKENDS.keys()


@pytest.mark.parametrize("job", NAMES)
@pytest.mark.parametrize("path", CLUSTERS, ids=IDS)
def test_a_dry_run_names_the_job_all_its_words_and_its_ranks(path: Path, job: str) -> None:
    ranks = 3 if job == "train" else 1
    work = workload(job=job, words=WORDS, ranks_per_node=ranks, schedule=None)
    text = open_cluster(content(path), path.name).render(work)
    assert f"jobs.{job}" in text
    assert [word for word in WORDS if word not in text] == []
    assert ("--nproc-per-node=3" in text) == (job == "train")
    assert text.endswith("\n")


@pytest.mark.parametrize("path", CLUSTERS, ids=IDS)
def test_a_dry_run_needs_no_cluster_and_is_the_same_twice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", "none")
    found = open_cluster(content(path), path.name)
    assert found.render(workload()) == found.render(workload())


@pytest.mark.parametrize("path", CLUSTERS, ids=IDS)
def test_a_url_is_the_same_for_jobs_and_this_machine(path: Path) -> None:
    cluster = open_cluster(content(path) | {"paths": {"/runs": "/mnt/runs"}}, path.name)
    run = place("s3://bucket/runs/a")
    assert [str(cluster.of_job(run)), str(cluster.seen_here(cluster.of_job(run)))] == ["s3://bucket/runs/a"] * 2
