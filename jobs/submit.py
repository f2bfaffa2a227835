"""jobs.submit: runs a job on this machine, or submits it to a Kubernetes cluster.

Examples:
  python -m jobs.submit job=train ranks_per_node=2 args='[data=demo,dataset=DATASET,model=adatt,run=RUN]'
  python -m jobs.submit job=train cluster=k8s nodes=2 ranks_per_node=8 gpus_per_node=8 image=IMAGE \\
      args='[data=demo,dataset=/data/demo,model=adatt,run=/runs/adatt]'
  python -m jobs.submit job=nightly cluster=k8s dry_run=true schedule='30 2 * * *' | kubectl apply -f -
"""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Literal, get_args

from omegaconf import DictConfig
from pydantic import model_validator

from jobs.entry import job, parse
from pipeline.cluster.base import Job, Workload
from pipeline.cluster.kubernetes import INSTANCE, claims, objects, to_yaml
from pipeline.cluster.kubernetes_client import create
from pipeline.storage.files import write_text

# The base runs the demo on the two claims: enough to see a new cluster work, and what an overlay replaces first.
DEMO: dict[Job, list[str]] = {
    "preprocess": ["data=demo", "input=/data/raw", "out=/data/demo"],
    "train": ["data=demo", "dataset=/data/demo", "model=adatt", "run=/runs/demo"],
    "nightly": ["run=/runs/demo", "input=/data/today", "out=/runs/nightly"],
}
WRITTEN = "# Written by `python -m jobs.submit base=k8s/base`: change the values there, or overlay this.\n"
# kustomize renames a Service and what refers to it, once it is told that `subdomain` does.
KUSTOMIZATION = """\
# The train Job is suspended until there is a dataset. Once preprocess is complete:
#   kubectl patch job taskfuse-train --patch '{"spec":{"suspend":false}}'
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [claims.yaml, preprocess.yaml, train.yaml, nightly.yaml]
configurations: [references.yaml]
"""
REFERENCES = """\
nameReference:
  - kind: Service
    version: v1
    fieldSpecs:
      - {path: spec/template/spec/subdomain, group: batch, kind: Job}
"""


class Submission(Workload):
    """A workload, and what to do with it."""

    cluster: Literal["local", "k8s"]
    dry_run: bool
    base: Path | None

    @model_validator(mode="after")
    def _fits_here(self) -> "Submission":
        if self.cluster == "local" and self.nodes > 1 and not self.base:
            raise ValueError(
                f"nodes is {self.nodes}, and cluster=local is one node: raise ranks_per_node, or cluster=k8s"
            )
        return self


def quoted(word: str) -> str:
    """Quotes each KEY=VALUE of `args=[KEY=VALUE,...]`: Hydra's grammar asks for it, and nobody should have to know."""
    if not re.match(r"args=\s*\[", word):
        return word
    return re.sub(r"(?<=[\[,])\s*([^][{},'\"=]+=(?:\[[^]'\"]*\]|[^][{},'\"]*))(?=[,\]])", r"'\1'", word)


def local_command(work: Workload) -> list[str]:
    """The words that run the job on this machine, with the Python that runs this one."""
    torchrun = ["-m", "jobs.launch", "--standalone", f"--nproc-per-node={work.ranks_per_node}"]
    return [sys.executable, *(torchrun if work.job == "train" else []), "-m", f"jobs.{work.job}", *work.args]


def base_files(work: Submission) -> dict[str, str]:
    """The kustomize base, file name to content: what each job is with these values and the demo's arguments."""
    files = {"kustomization.yaml": KUSTOMIZATION, "references.yaml": REFERENCES, "claims.yaml": to_yaml(claims(work))}
    for name in get_args(Job):
        alone = {} if name == "train" else {"nodes": 1, "ranks_per_node": 1, "gpus_per_node": 0}
        own = {"job": name, "name": f"taskfuse-{name}", "args": DEMO[name], "suspend": name == "train", **alone}
        files[f"{name}.yaml"] = to_yaml(objects(work.model_copy(update=own)))
    return {name: WRITTEN + text for name, text in files.items()}


def run(work: Submission) -> None:
    """Does what the submission says. A local job takes this process over: signals and exit code are then its own."""
    if work.base:
        work.base.mkdir(parents=True, exist_ok=True)
        for name, text in base_files(work).items():
            write_text(work.base / name, text)
        print(f"wrote {work.base}: kubectl apply -k {work.base}")
    elif work.cluster == "local":
        command = local_command(work)
        print(shlex.join(command), flush=True)
        if not work.dry_run:
            os.execv(command[0], command)
    elif work.dry_run:
        print(to_yaml(objects(work)), end="")
    else:
        namespace = create(work)
        made = " and ".join(str(part.kind) for part in objects(work))
        verb = "get jobs" if work.job == "nightly" else f"logs -f --prefix --max-log-requests={work.nodes}"
        chosen = f"-n {namespace} -l {INSTANCE}={work.name}"
        print(f"created {made} {work.name} in namespace {namespace}; follow it with: kubectl {verb} {chosen}")


@job("submit")
def main(config: DictConfig) -> None:
    """Checks the values, then runs or submits."""
    run(parse(config, Submission))


if __name__ == "__main__":
    sys.argv[1:] = map(quoted, sys.argv[1:])
    main()
