"""Resources of a submission: what was given, else the cluster's default for the job, else derived from the job; and checked.

What is derived is a rule of thumb on the safe side: memory of a process with its libraries, of tables and dense part (the
sharding plan's own figures), of the copy from which a checkpoint is written, and of the rows buffered for shuffling.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from features.errors import UserError
from features.plain_json import first_fault
from features.schema.schema import Schema
from pipeline.cluster.base import JOBS, Cluster, Resources
from pipeline.cluster.values import NodeRange, amount
from pipeline.run.run import Run
from pipeline.storage.store_path import on_store, place
from pipeline.submission.reach import answers, is_seen

GIB = 1 << 30
PROCESS = {"cpu": 3 * GIB // 2, "cuda": 4 * GIB}  # of a rank with its libraries, CUDA's context and pinned buffers
UNKNOWN = {"cpu": 4 * GIB, "cuda": 24 * GIB}  # of a rank whose tables are not known here
DECODER = GIB // 2  # of a decoding process, with the row groups of its lanes
CPUS = {"cpu": 2, "cuda": 8}  # of a rank: one that reads ahead; GPUs are fed by several
FEWEST = {"cpu": 0.5, "cuda": 2}
DAY = 86400
UNPLANNED = 1 << 50  # bytes of main memory, where it is the answer
WRITE = 100e6  # bytes/s that a checkpoint is written at, where no run has shown it
LEAST_GRACE_S, MOST_GRACE_S = 120, 3600


class Request(NamedTuple):
    """Resources, all given, and notes for the person who submits: what was derived, what could not be checked."""

    resources: Resources
    notes: list[str]


class Need(NamedTuple):
    """Of a rank.

    Attributes:
        least: bytes of main memory without which it cannot run. memory: those that it may come to use.
        saving_s: seconds that a checkpoint takes. notes: what is not known here.
    """

    least: int
    memory: int
    saving_s: float
    notes: list[str]


def resolve(job: str, settings: Any, schema: Schema | None, given: Resources, cluster: Cluster) -> Request:
    """All resources of a job.

    Args:
        settings: of the job, checked. schema: of its data group, if it was given one.
    Raises:
        UserError: tables that do not fit, or resources that cannot be right.
    """
    wanted = given.over(cluster.resources_of(job))
    nodes, gpus = wanted.nodes or NodeRange(1, 1), wanted.gpus_per_node or 0
    ranks = wanted.ranks_per_node or (gpus if JOBS[job].launched and gpus else 1)
    device = "cuda" if gpus else "cpu"
    processes = max(ranks, getattr(settings, "ranks", 1), getattr(settings, "workers", 1))
    shared = cluster.shared_bytes(ranks, gpus)
    if wanted.memory and (int(amount(wanted.memory)) - shared) // processes < PROCESS[device]:
        raise UserError(
            f"memory={wanted.memory} is too little: {processes} processes on a node take {PROCESS[device] / GIB:g} GiB each "
            "before they hold a table. Leave memory out to have it derived."
        )
    room = (int(amount(wanted.memory)) - shared) // processes if wanted.memory else None
    cpu = wanted.cpu or str(CPUS[device] * processes)
    if JOBS[job].trains:
        process = PROCESS[device] + decoding_bytes(settings, device, int(amount(cpu) // processes))
        need = _training(settings, schema, nodes.least * ranks, ranks, device, process, room, cluster)
    else:
        need = _other(job, settings, device, cluster)
    memory = wanted.memory or f"{math.ceil((processes * need.memory + shared) / GIB)}Gi"
    if amount(memory) < processes * need.least + shared:
        least, right = (math.ceil((processes * size + shared) / GIB) for size in (need.least, need.memory))
        raise UserError(
            f"memory={memory} is too little: {processes} processes on a node need {least}Gi at least, {right}Gi are right. "
            "Leave memory out to have it derived."
        )
    if amount(cpu) < FEWEST[device] * processes:
        raise UserError(
            f"cpu={cpu} is too little: {processes} processes on a node need {FEWEST[device] * processes:g} at least, "
            f"{CPUS[device] * processes} are right. Leave cpu out to have it derived."
        )
    # SIGTERM may come as one checkpoint begins: that one, then its own.
    grace = min(max(LEAST_GRACE_S, 60 + math.ceil(2 * need.saving_s)), MOST_GRACE_S)
    return Request(
        Resources(
            nodes=nodes, ranks_per_node=ranks, gpus_per_node=gpus, cpu=cpu, memory=memory,
            time_limit_s=wanted.time_limit_s or (7 * DAY if JOBS[job].trains else DAY),
            grace_s=grace if wanted.grace_s is None else wanted.grace_s,
            retries=3 if wanted.retries is None else wanted.retries,
        ),
        need.notes,
    )  # fmt: skip


def _training(
    settings: Any,
    schema: Schema | None,
    ranks: int,
    ranks_per_node: int,
    device: str,
    process: int,
    room: int | None,
    cluster: Cluster,
) -> Need:
    """Of jobs.train and jobs.search: jobs.plan's answer for the fewest nodes that it may run on.

    Args:
        process: bytes of a rank without its model. room: bytes of a rank, where memory is given.
    """
    from pipeline.training.parallel.capacity import PlanConfig, planned
    from pipeline.training.parallel.memory import checkpoint_copy_bytes

    dataset = cluster.seen_here(cluster.of_job(settings.dataset))
    here = _is_seen(dataset, of_days=settings.days is not None)
    if unknown := None if here else _unknown_tables(settings.dataset, schema):
        return Need(process, process + UNKNOWN[device], 0, [f"not checked: {unknown}"])
    if device == "cuda" and not cluster.gpu_memory:
        return Need(
            process, process + UNKNOWN[device], 0,
            ["not checked: whether tables fit on a GPU, since the cluster's file has no gpu_memory"],
        )  # fmt: skip
    hardware = {
        "ranks": ranks, "ranks_per_node": ranks_per_node, "device": device,
        "hbm": cluster.gpu_memory if device == "cuda" else None,
        "ddr": UNPLANNED if room is None else max(room - process, 1 << 20),
    }  # fmt: skip
    content = settings.model_dump(by_alias=True, include={"days", "missing_days", "tasks", "model", "train"})
    if found_in := settings.model.architecture:
        seen = cluster.seen_here(cluster.of_job(place(found_in)))
        if not is_seen(seen):
            return Need(
                process, process + UNKNOWN[device], 0,
                [f"not checked: whether tables fit: {seen} is not on this machine"],
            )  # fmt: skip
        content["model"]["architecture"] = str(seen)
    try:
        config = PlanConfig.model_validate(content | hardware | {"dataset": dataset if here else None})
    except ValidationError as error:
        raise UserError(first_fault(error)) from None
    found = planned(config, schema)
    peak, dense = found.peak, found.dense.total
    memory = process + peak.ddr + checkpoint_copy_bytes(found.dense, settings.train)  # a plan counts the tables'
    memory += dense if device == "cpu" else 0
    size = sum(rank.size.total for rank in found.ranks) + dense
    return Need(memory, memory, _seconds_to_save(cluster.seen_here(cluster.of_job(settings.run)), size), [])


def decoding_bytes(settings: Any, device: str, cpus: int) -> int:
    """Bytes of the decoding of a rank of jobs.train or jobs.search with so many cores."""
    from pipeline.dataset.decoding import MOST_PROCESSES

    given: int | None = settings.train.decode_workers
    processes = given if given is not None else max(0, min(MOST_PROCESSES, cpus - 1)) if device == "cuda" else 0
    ahead = settings.train.read_ahead_bytes if on_store(settings.dataset) else 0
    return DECODER * processes + ahead * max(processes, 1)


def _unknown_tables(dataset: Path, schema: Schema | None) -> str | None:
    """Why the sizes of tables are not known here, where they are not."""
    from pipeline.training.parallel.capacity import largest

    if schema is None:
        return f"whether tables fit: {dataset} is not on this machine (data=NAME checks with the largest of its schema)"
    try:
        largest(schema)
    except UserError as error:
        return str(error)
    return None


def _is_seen(dataset: Path, of_days: bool) -> bool:
    """Whether a dataset, or a folder of datasets of days, is seen from here."""
    return is_seen(dataset / "manifest.json") or (of_days and is_seen(dataset))


def _seconds_to_save(run: Path, size: int) -> float:
    """Of a checkpoint: as measured in the run that goes on, or else by its bytes."""
    try:
        status = Run(run).status() if answers(run) else None
    except (UserError, OSError):
        status = None
    return size / WRITE if status is None or status.saving_s is None else status.saving_s


def _other(job: str, settings: Any, device: str, cluster: Cluster) -> Need:
    """Of the jobs that hold no optimiser: those that score hold a model whole, preprocess its units of work."""
    if job == "preprocess":
        units = 6 * settings.unit_bytes + 4 * settings.bucket_bytes + 2 * settings.broadcast_bytes
        return Need(GIB // 2, GIB + units, 0, [])
    run: Path | None = getattr(settings, "run", None)
    model = _model_bytes(cluster.seen_here(cluster.of_job(run))) if run else None
    rows = int(getattr(settings, "memory", 0) * GIB)  # of rows kept for exact metrics, at most
    least = PROCESS[device] + (model or 0)
    notes = []
    if model is None:
        which = f"the model of {run} is not on this machine" if run else f"{job} names no run whose model it holds"
        notes = [f"not checked: memory, since {which}"]
    return Need(least, least + (UNKNOWN[device] if model is None else 0) + rows, 0, notes)


def _model_bytes(run: Path) -> int | None:
    """Bytes of the files of a run's newest checkpoint: more than its weights, which are part of them."""
    from pipeline.run import checkpoint

    if not answers(run):
        return None
    try:
        steps = checkpoint.steps(run / "checkpoints")
    except OSError:
        return None
    if not steps:
        return None
    return sum(size for size, _ in checkpoint.read(checkpoint.folder(run / "checkpoints", steps[-1])).files.values())
