"""The kustomize base: all three jobs with the demo's arguments, for an overlay to change."""

from pathlib import Path
from typing import get_args

from pipeline.cluster.base import Job, Workload
from pipeline.cluster.kubernetes_manifests import claims, objects, to_yaml
from pipeline.storage.files import write_text

# The demo on the two claims: enough to try a new cluster, and what an overlay replaces first.
DEMO: dict[Job, list[str]] = {
    "preprocess": ["data=demo", "input=/data/raw", "out=/data/demo"],
    "train": ["data=demo", "dataset=/data/demo", "model=adatt", "run=/runs/demo"],
    "nightly": ["run=/runs/demo", "input=/data/today", "out=/runs/nightly"],
}
HEADER = "# Written by `python -m jobs.submit base=k8s/base`: change the values there, or overlay this.\n"
KUSTOMIZATION = """\
# The image is a placeholder: an overlay puts the digest of yours in its place, as k8s/README.md shows.
# The train Job is suspended until there is a dataset. Once preprocess is complete:
#   kubectl patch job taskfuse-train --patch '{"spec":{"suspend":false}}'
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [claims.yaml, preprocess.yaml, train.yaml, nightly.yaml]
configurations: [references.yaml]
"""
# kustomize renames a Service and its references; that `subdomain` is one it does not know by itself.
REFERENCES = """\
nameReference:
  - kind: Service
    version: v1
    fieldSpecs:
      - {path: spec/template/spec/subdomain, group: batch, kind: Job}
"""


def base_files(work: Workload) -> dict[str, str]:
    """Contents by file name: each job with the values of `work`, the demo's arguments, and GPUs for train alone."""
    files = {"kustomization.yaml": KUSTOMIZATION, "references.yaml": REFERENCES, "claims.yaml": to_yaml(claims(work))}
    for name in get_args(Job):
        alone = {} if name == "train" else {"nodes": 1, "ranks_per_node": 1, "gpus_per_node": 0}
        own = {"job": name, "name": f"taskfuse-{name}", "args": DEMO[name], "suspend": name == "train", **alone}
        files[f"{name}.yaml"] = to_yaml(objects(work.model_copy(update=own)))
    return {name: HEADER + text for name, text in files.items()}


def write_base(work: Workload, folder: Path) -> None:
    """Writes the base into `folder`, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in base_files(work).items():
        write_text(folder / name, text)
