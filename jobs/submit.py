"""jobs.submit: runs a job on this machine, or submits it to a Kubernetes cluster.

Examples:
  python -m jobs.submit job=train ranks_per_node=2 args='[data=demo,dataset=DATASET,model=adatt,run=RUN]'
  python -m jobs.submit job=train cluster=k8s nodes=2 ranks_per_node=8 gpus_per_node=8 image=IMAGE@sha256:DIGEST \\
      args='[data=demo,dataset=/data/demo,model=adatt,run=/runs/adatt]'
  python -m jobs.submit job=nightly cluster=k8s image=IMAGE@sha256:DIGEST schedule='30 2 * * *' dry_run=true \\
      | kubectl apply -f -
"""

import re
import sys
from pathlib import Path

from omegaconf import DictConfig
from pydantic import field_validator

from features.errors import UserError
from jobs import command_line
from jobs.entry import job, parse
from pipeline.cluster.base import Workload
from pipeline.cluster.kustomize import write_base
from pipeline.cluster.registry import BACKENDS
from pipeline.cluster.values import refuse_lookups


class Submission(Workload):
    """A workload, and what to do with it."""

    cluster: str
    dry_run: bool
    base: Path | None

    @field_validator("cluster")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        if name not in BACKENDS:
            raise ValueError(f"{name} is not one of {', '.join(BACKENDS)}")
        return name


def quoted(word: str) -> str:
    """Quotes each KEY=VALUE of `args=[KEY=VALUE,...]`: Hydra's grammar asks for it, and nobody should have to know."""
    if not re.match(r"args=\s*\[", word):
        return word
    return re.sub(r"(?<=[\[,])\s*([^][{},'\"=]+=(?:\[[^]'\"]*\]|[^][{},'\"]*))(?=[,\]])", r"'\1'", word)


def run(work: Submission) -> None:
    """Writes the kustomize base, prints what would be submitted, or submits it."""
    if work.base:
        write_base(work, work.base)
        print(f"wrote {work.base}: kubectl apply -k {work.base}")
        return
    backend = BACKENDS[work.cluster]
    if work.dry_run or work.cluster == "local":  # a local job takes this process over: its command is printed first
        print(backend.render(work), end="", flush=True)
    if not work.dry_run:
        print(backend.submit(work))


@job("submit")
def main(config: DictConfig) -> None:
    """Checks the values, then runs or submits."""
    for place, text in command_line.texts(config):
        try:
            refuse_lookups(text)  # before check_plain, whose hint is no way to hand over a secret
        except ValueError as error:
            raise UserError(f"configuration: {place}: {error}") from None
    command_line.check_plain(config, "configuration")  # all of it is written into a Job
    run(parse(config, Submission))


if __name__ == "__main__":
    sys.argv[1:] = map(quoted, sys.argv[1:])
    main()
