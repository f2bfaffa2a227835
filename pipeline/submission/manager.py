"""Submitting what a record describes, again if asked, and what is known of it since."""

import sys
import time
from collections.abc import Iterator

from tabulate import tabulate

from features.errors import UserError
from features.printable import printable
from pipeline.cluster.base import ENDED, JOBS, Status, UnansweredError
from pipeline.submission import progress
from pipeline.submission.reach import answers
from pipeline.submission.records import Record, Records, revision, user

SLOW_S = 5.0
ALIVE = ("suspended", "pending", "running")


def submit(records: Records, record: Record) -> None:
    """Submits what a record describes. Its id is printed on stdout, what to do next on stderr.

    Raises:
        UserError: another submission trains the same run, or the cluster refuses this one.
    """
    _refuse_second_trainer(records, record)
    backend = record.backend()
    records.reserve(record)
    try:
        native = backend.submit(record.work)
    except UnansweredError as error:
        records.write(record.model_copy(update={"native": error.native}))
        raise
    except (UserError, OSError):  # refused; cut off by anything else the job may have been submitted
        records.remove(record.name)
        raise
    records.write(record.model_copy(update={"native": native}))
    print(record.name, flush=True)
    print(
        f"{record.job} on cluster={record.cluster} as {native}. Follow it: python -m jobs.submit logs {record.name} "
        f"follow=true{records.option}",
        file=sys.stderr,
    )


def _refuse_second_trainer(records: Records, record: Record) -> None:
    """A run has one trainer: another would fail once it has its nodes, and take over as soon as the first is stopped."""
    if not JOBS[record.job].trains or record.run is None or record.work.after:  # which may be the others
        return
    for other in records.all()[0]:
        same = (other.job, other.cluster, other.run) == (record.job, record.cluster, record.run)
        if same and other.name != record.name and (state := current(other).state) in ALIVE:
            raise UserError(
                f"{other.name} is {state} and trains {record.run}, too: stop it first (jobs.submit stop "
                f"{other.name}{records.option})"
            )


def must_succeed(record: Record, cluster: str) -> str:
    """The native id of a submission that another one on `cluster` waits for.

    Raises:
        UserError: it is on another cluster, or has failed: Slurm takes a job that it has forgotten for one that succeeded.
    """
    if record.cluster != cluster:
        raise UserError(
            f"after: {record.name} was submitted to cluster={record.cluster}, which this one does not know of"
        )
    native = record.submitted()
    if (found := current(record)).state in ("failed", "stopped"):
        raise UserError(
            f"after: {record.name} has {found.state.replace('stopped', 'been stopped')}: {found.detail}. Submit it again "
            f"(jobs.submit resubmit {record.name}), and name the new id"
        )
    return native


def logs(record: Record, rank: int | None, follow: bool) -> Iterator[str]:
    """Lines of its log. Raises UserError for a rank that it does not have."""
    work, ranks = record.work, record.work.nodes.most * record.work.ranks_per_node
    if rank is not None and not 0 <= rank < ranks:
        there = "0 alone" if ranks == 1 else f"0 to {ranks - 1}"
        raise UserError(f"rank={rank}: {record.name} has rank {there}")
    alone = ranks == 1  # whose lines name no rank
    yield from record.backend().logs(work, record.submitted(), None if alone else rank, follow)


def resubmit(records: Records, record: Record) -> None:
    """Submits the same again, once the earlier one has ended: a run goes on from its newest checkpoint."""
    state = current(record)
    if state.state not in (*ENDED, "unknown"):
        stop = f"jobs.submit stop {record.name}{records.option}"
        raise UserError(f"{record.name} is {state.state}: stop it first ({stop})")
    for waited in records.all()[0]:
        if waited.cluster == record.cluster and waited.native in record.work.after:
            must_succeed(waited, record.cluster)
    name = records.next_name(record.name)
    work = record.work.model_copy(update={"name": name})
    update = {"name": name, "work": work, "native": None, "resubmits": record.name, "time": time.time(), "user": user()}
    submit(records, record.model_copy(update={**update, "revision": revision()}))


def listed(records: Records) -> str:
    """A line a submission, the newest first."""
    rows = []
    found, faults = records.all()
    for fault in faults:
        print(f"error: {printable(fault)}", file=sys.stderr)
    silent = set[str]()  # clusters that kept one question waiting, and are asked no other
    for record in found:
        begin = time.monotonic()
        state = "unknown" if record.cluster in silent else current(record).state
        if state == "unknown" and time.monotonic() - begin > SLOW_S:
            silent.add(record.cluster)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.time))
        rows.append([record.name, record.job, record.cluster, state, when, record.run or ""])
    return tabulate(rows, ["id", "job", "cluster", "state", "submitted", "run"], "plain") if rows else "no submissions"


def current(record: Record) -> Status:
    """The state of a submission; unknown, with the reason, where its cluster does not answer."""
    try:
        found: Status = record.backend().status(record.work, record.submitted())
        return found
    except UserError as error:
        return Status("unknown", str(error))


def status(record: Record) -> str:
    """What a person asks about a submission: its state on the cluster, and how far its run has come."""
    found = current(record)
    rows = [("id", record.name), ("job", f"{record.job} on cluster={record.cluster} as {record.native}")]
    rows += [("state", f"{found.state}: {found.detail}")]
    if found.restarts:
        rows.append(("restarts", f"{found.restarts} by the cluster"))
    if record.run and (JOBS[record.job].trains or record.job == "evaluate"):
        here = record.backend().seen_here(record.run)
        nothing = [("run", f"{here}: nothing written yet, or not seen from this machine")]
        try:
            come = progress.read(here) if answers(here) and here.is_dir() else None
            rows += progress.lines(come) if come else nothing
        except (UserError, OSError) as error:  # the state of the job is shown whatever the run's files are
            rows.append(("run", str(error)))
    width = max(len(what) for what, _ in rows) + 2
    return "\n".join(f"{what:<{width}}{value}" for what, value in rows)
