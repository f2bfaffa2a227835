"""jobs.submit: submits a job to this machine, Slurm or Kubernetes, and follows it. What it prints first is the id.

  python -m jobs.submit train|search|preprocess|evaluate|explain|predict|nightly|compare [cluster=NAME] [nodes=N …] KEY=VALUE …
  python -m jobs.submit list | status ID | logs ID [follow=true] [rank=N] | stop ID | resubmit ID
  python -m jobs.submit base FOLDER                                    a kustomize base of the demo's jobs

KEY=VALUE are the job's own settings, save for those below; what stands after -- is the job's in any case. A job is checked
before it is queued: its settings, whether its tables fit (as by jobs.plan), whether its resources can be right.

Examples:
  python -m jobs.submit train cluster=slurm nodes=2 ranks_per_node=8 gpus_per_node=8 dataset=D model=adatt run=RUN
  python -m jobs.submit evaluate cluster=slurm after=[train-x7k2m] run=RUN follow=true
  python -m jobs.submit nightly cluster=k8s cluster.image=IMAGE@sha256:DIGEST schedule='30 2 * * *' run=/runs/r out=/runs/n
"""

import importlib
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ValidationError

from features.errors import UserError, did_you_mean, fault_text, join_faults
from features.schema.schema import Schema
from jobs import command_line
from jobs.entry import composing, job, parse, read_schema, user_errors
from jobs.quoting import quoted
from pipeline.cluster.base import JOBS, Resources, Workload
from pipeline.cluster.kubernetes.backend import Kubernetes
from pipeline.cluster.kubernetes.kustomize import write_base
from pipeline.cluster.local import Local
from pipeline.cluster.registry import open_cluster
from pipeline.cluster.values import refuse_lookups
from pipeline.run.run import config_hash
from pipeline.submission import manager, resources
from pipeline.submission.records import Record, Records, revision, user

VERBS = ("list", "status", "logs", "stop", "resubmit", "base")
# Keys of a submission that are not the job's; follow and rank are of logs.
OWN = {*Resources.model_fields, "name", "after", "array", "schedule", "suspend", "dry_run", "cluster", "submissions"}
# Of these and those of logs, what verbs take; what others would silently ignore.
TAKEN = {"logs": {"submissions", "follow", "rank"}, "base": {"submissions", "cluster"}}


class Words(NamedTuple):
    """A command line.

    Attributes:
        verb: a job or one of VERBS. name: of the submission that a verb is about, of base the folder; empty if none.
        own: words for jobs/conf/submit.yaml. job: words for the job. config_dirs: folders of --config-dir, for both.
    """

    verb: str
    name: str
    own: list[str]
    job: list[str]
    config_dirs: list[Path]


class Submit(Resources):
    """jobs/conf/submit.yaml, see there."""

    cluster: dict[str, Any]
    name: str | None
    after: list[str]
    array: list[str]
    schedule: str | None
    suspend: bool
    dry_run: bool
    submissions: Path | None
    follow: bool
    rank: int | None


class Checked(NamedTuple):
    """A job's settings as its own checks read them, and the schema of its data group, where it has one."""

    settings: BaseModel
    schema: Schema | None


def split(words: list[str]) -> Words:
    """The words of a command line by whom they are for.

    Raises:
        UserError: no job or verb, a verb without its id, or with words that it does not take.
    """
    verb, rest = (words[0], words[1:]) if words else ("", [])
    if verb not in JOBS and verb not in VERBS:
        known = [*JOBS, *VERBS]
        what = f"{verb}: no job and no verb{did_you_mean(verb, known)}" if verb else "what to submit is missing"
        raise UserError(f"{what}. The first word is one of {', '.join(known)}; see --help.")
    name = ""
    if verb in VERBS and verb != "list":
        if not rest or "=" in rest[0] or rest[0].startswith("-"):
            missing = "folder is missing: python -m jobs.submit base FOLDER"
            if verb != "base":
                missing = f"id is missing: python -m jobs.submit {verb} ID. jobs.submit list shows them."
            raise UserError(f"the {missing}")
        name, rest = rest[0], rest[1:]
    end = rest.index("--") if "--" in rest else len(rest)
    own, job_words, dirs = list[str](), list[str](), list[Path]()
    for word in rest[:end]:
        if word.startswith("--config-dir="):
            dirs.append(Path(word.partition("=")[2]))
            own.insert(0, word)  # Hydra's parser takes flags before settings, or after them, not between
        elif word in ("--config-dir", "-cd"):
            raise UserError(f"{word}: write --config-dir=DIR")
        elif (key := word.lstrip("+~").partition("=")[0].split(".")[0]) in OWN or verb in VERBS:
            if verb in VERBS and key in (OWN | {"follow", "rank"}) - TAKEN.get(verb, {"submissions"}):
                raise UserError(f"{word}: {verb} has no such setting: {key} is of {_of(key)}")
            own.append(word)
        else:
            job_words.append(word)
    if verb == "base" and not any(word.startswith("cluster=") for word in own):
        own.append("cluster=k8s")
    return Words(verb, name, own, job_words + rest[end + 1 :], dirs)


def _of(key: str) -> str:
    return "logs" if key in ("follow", "rank") else f"a job, as in python -m jobs.submit {next(iter(JOBS))} {key}=VALUE"


def main() -> None:
    """Splits the command line, and hands Hydra the part that is this job's own."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        job("submit")(lambda config: run(config, Words("list", "", [], [], [])))()
        return
    with user_errors():
        words = split(sys.argv[1:])
        sys.argv[1:] = words.own

        def act(config: DictConfig) -> None:
            run(config, words)

        act.__module__ = __name__
    job("submit")(act)()


def run(config: DictConfig, words: Words) -> None:
    """What the first word asks for."""
    for place, text in command_line.texts(config):
        try:
            refuse_lookups(text)  # before check_plain, whose hint is no way to hand over a secret
        except ValueError as error:
            raise UserError(f"configuration: {place}: {error}") from None
    command_line.check_plain(config, "configuration")  # all of it is written down
    own: Submit = parse(config, Submit)
    records = Records(own.submissions)
    match words.verb:
        case "list":
            print(manager.listed(records))
        case "status":
            print(manager.status(records.read(words.name)))
        case "logs":
            try:
                for line in manager.logs(records.read(words.name), own.rank, own.follow):
                    print(line, flush=True)
            except KeyboardInterrupt:
                of = f"{words.name}{records.option}"
                sys.exit(f"{words.name} goes on: jobs.submit status {of}, jobs.submit stop {of}")
        case "stop":
            found = records.read(words.name)
            found.backend().stop(found.work, found.submitted())
            print(f"stopped {found.name}")
        case "base":
            backend = open_cluster(own.cluster, f"cluster {chosen_cluster(words.own)}")
            if not isinstance(backend, Kubernetes):
                raise UserError(
                    f"cluster={chosen_cluster(words.own)} is not Kubernetes: only that has a kustomize base"
                )
            write_base(backend, Path(words.name))
            print(f"wrote {words.name}: kubectl apply -k {words.name}")
        case "resubmit":
            manager.resubmit(records, records.read(words.name))
        case _:
            new(own, words, records)


def new(own: Submit, words: Words, records: Records) -> None:
    """Checks a job, and submits it."""
    cluster_name = chosen_cluster(words.own)
    where = f"cluster {cluster_name}"
    backend = open_cluster(own.cluster, where)
    checked, *_ = [check(words.verb, [*words.job, *shlex.split(text)]) for text in own.array or [""]]
    given = Resources.model_validate({key: getattr(own, key) for key in Resources.model_fields})
    request = resources.resolve(words.verb, checked.settings, checked.schema, given, backend)
    work = workload(own, words, request.resources, records, getattr(checked.settings, "follow", None))
    for note in request.notes:
        print(note, file=sys.stderr)
    if own.dry_run:
        print(backend.render(work), end="", flush=True)
        return
    if isinstance(backend, Local) and JOBS[words.verb].trains:
        _refuse_missing_dataset(backend, checked.settings)
    folder = getattr(checked.settings, "run", None)
    record = Record(
        name=work.name, job=work.job, cluster=cluster_name, settings=own.cluster | backend.pinned(), work=work,
        run=backend.of_job(folder) if folder else None, command=["jobs.submit", *typed(words)], revision=revision(),
        config=config_hash(checked.settings.model_dump(mode="json")), time=time.time(), user=user(),
    )  # fmt: skip
    manager.submit(records, record)


def _refuse_missing_dataset(backend: Local, settings: Any) -> None:
    """On this machine nothing that it could wait for would still write it: the ranks would fail, and be tried again."""
    from pipeline.dataset.dataset import open_dataset  # which imports pyarrow: other verbs do without

    open_dataset(backend.seen_here(backend.of_job(settings.dataset)), settings.days, settings.missing_days)


def typed(words: Words) -> list[str]:
    """The command line again."""
    return [words.verb, *words.own, *(["--", *words.job] if words.job else [])]


def workload(own: Submit, words: Words, given: Resources, records: Records, follow: object) -> Workload:
    """The complete workload; with `follow` of jobs.evaluate one that never ends. Raises UserError for values that do not go
    together."""
    if len(words.config_dirs) > 1:
        raise UserError("--config-dir is given twice: a job has one")
    content = {
        **{key: getattr(given, key) for key in Resources.model_fields},
        "job": words.verb,
        "words": words.job,
        "config_dir": words.config_dirs[0].absolute() if words.config_dirs else None,
        "name": own.name or records.new_name(words.verb),
        "after": [manager.must_succeed(records.read(name), chosen_cluster(words.own)) for name in own.after],
        "array": [shlex.split(text) for text in own.array],
        "schedule": own.schedule,
        "suspend": own.suspend,
        "service": follow == "always",
    }
    try:
        return Workload.model_validate(content)
    except ValidationError as error:
        places = ((".".join(map(str, e["loc"])), fault_text(e)) for e in error.errors())
        raise UserError(join_faults([f"{place}: {what}" if place else what for place, what in places])) from None


def chosen_cluster(own: list[str]) -> str:
    """The name that cluster= gives; local without one."""
    return next((word.partition("=")[2] for word in reversed(own) if word.startswith("cluster=")), "local")


def check(name: str, words: list[str]) -> Checked:
    """A job's settings, composed and checked as the job itself will on the cluster.

    Raises:
        UserError: an unknown model, a missing setting, and whatever else the job would refuse.
    """
    command_line.check(words)
    with composing():
        config = compose(name, quoted(words), return_hydra_config=True)
    data = config.hydra.runtime.choices.get("data")
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    command_line.check_composed(config)
    settings = importlib.import_module(f"jobs.{name}").checked(config)
    return Checked(settings, read_schema(config, data) if config.get("data") else None)


if __name__ == "__main__":
    main()
