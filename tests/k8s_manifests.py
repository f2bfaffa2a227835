"""Manifests for tests: what a submission with given values creates, by kind."""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from jobs.submit import Submission
from pipeline.cluster.kubernetes_manifests import objects, to_yaml

ROOT = Path(__file__).parents[1]
DIGEST = "sha256:" + "0123456789abcdef" * 4


def kustomized(folder: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization as kubectl, of the environment that runs the tests, reads them."""
    command = [str(Path(sys.executable).with_name("kubectl")), "kustomize", str(folder)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return list(yaml.safe_load_all(text))


@cache
def defaults(job: str) -> dict[str, Any]:
    """Settings of jobs/conf/submit.yaml for a job."""
    settings = yaml.safe_load((ROOT / "jobs" / "conf" / "submit.yaml").read_text())
    del settings["defaults"]
    content = OmegaConf.to_container(OmegaConf.create(settings | {"job": job}), resolve=True)
    assert isinstance(content, dict)
    return content


def submission(**values: Any) -> Submission:
    """The defaults of jobs/conf/submit.yaml, and these values."""
    return Submission.model_validate(defaults(values.get("job", "train")) | values)


def documents(**values: Any) -> dict[str, Any]:
    """The objects of a workload, read back from YAML."""
    return {d["kind"]: d for d in yaml.safe_load_all(to_yaml(objects(submission(cluster="k8s", **values))))}


def pod_of(document: dict[str, Any]) -> dict[str, Any]:
    """The pod of a Job or CronJob: its labels and its spec."""
    spec = document["spec"]
    template = (spec["jobTemplate"]["spec"] if document["kind"] == "CronJob" else spec)["template"]
    return {"labels": template["metadata"]["labels"], **template["spec"]}
