"""The kustomize base: the demo's jobs as they are submitted, for an overlay to change."""

from pathlib import Path

from pipeline.cluster.base import Workload
from pipeline.cluster.kubernetes.manifests import claims, objects, to_yaml
from pipeline.cluster.kubernetes.settings import KubernetesSettings
from pipeline.cluster.values import NodeRange
from pipeline.storage.files import write_text

# The demo on the two claims: enough to try a new cluster, and what an overlay replaces first.
DEMO: dict[str, list[str]] = {
    "preprocess": ["data=demo", "input=/data/raw", "out=/data/demo"],
    "train": ["data=demo", "dataset=/data/demo", "model=adatt", "run=/runs/demo"],
    "nightly": ["run=/runs/demo", "input=/data/today", "out=/runs/nightly"],
}
DEADLINES_S = {"train": 7 * 86400, "preprocess": 86400, "nightly": 86400}
HEADER = "# Written by `python -m jobs.submit base k8s/base`: change the values there, or overlay this.\n"
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


def demo_workload(job: str, cluster: KubernetesSettings) -> Workload:
    """The demo's job of this name, with what the cluster gives such jobs, or else one node, 2 CPUs and 8Gi."""
    given = cluster.resources_of(job)
    return Workload(
        job=job,
        words=DEMO[job],
        name=f"taskfuse-{job}",
        nodes=given.nodes or NodeRange(1, 1),
        ranks_per_node=given.ranks_per_node or 1,
        gpus_per_node=given.gpus_per_node or 0,
        cpu=given.cpu or "2",
        memory=given.memory or "8Gi",
        time_limit_s=given.time_limit_s or DEADLINES_S[job],
        grace_s=120 if given.grace_s is None else given.grace_s,
        retries=3 if given.retries is None else given.retries,
        schedule="0 3 * * *" if job == "nightly" else None,
        suspend=job == "train",
    )


def base_files(cluster: KubernetesSettings) -> dict[str, str]:
    """Contents by file name: each job of the demo, and the claims."""
    files = {
        "kustomization.yaml": KUSTOMIZATION,
        "references.yaml": REFERENCES,
        "claims.yaml": to_yaml(claims(cluster)),
    }
    files |= {f"{job}.yaml": to_yaml(objects(cluster, demo_workload(job, cluster))) for job in DEMO}
    return {name: HEADER + text for name, text in files.items()}


def write_base(cluster: KubernetesSettings, folder: Path) -> None:
    """Writes the base into `folder`, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in base_files(cluster).items():
        write_text(folder / name, text)
