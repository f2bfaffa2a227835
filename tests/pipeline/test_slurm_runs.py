"""The Slurm backend on a Slurm that runs: what is submitted, followed, stopped, preempted, requeued and lost."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmLab, require_slurm, slurm_lab
from waiting import wait_for

from features.errors import UserError
from pipeline.cluster.base import ENDED, Status, Workload
from pipeline.cluster.slurm import Slurm

pytestmark = pytest.mark.system

# Stands in for Python on the nodes where Slurm and the script are tested, not training: its last word is a line of shell.
STUB = """#!/bin/bash
word=${!#}
exec bash -c "${word#*=}"
"""
# Saves its work on SIGTERM, as a run does.
SAVES = "trap 'echo saved; exit 75' TERM; echo ready; sleep 600 & wait; wait"


@pytest.fixture(scope="module")
def lab() -> Iterator[SlurmLab]:
    require_slurm()
    with slurm_lab() as lab, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(lab.conf))
        patch.setenv("SUBMITTERS_TOKEN", "not for jobs")
        patch.setenv("SBATCH_EXPORT", "ALL")
        before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, before[1]))  # as on a login node
        yield lab
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


@pytest.fixture(scope="module")
def folder(lab: SlurmLab) -> Path:
    """Where jobs run, beside the lab's own files: sbatch takes no path with the characters of a test's name."""
    folder = lab.folder / "work"
    folder.mkdir()
    (folder / "stub").write_text(STUB)
    (folder / "stub").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def stub(folder: Path) -> Slurm:
    return Slurm(backend="slurm", python=str(folder / "stub"), folder=str(folder))


def workload(job: str, *words: str, **changes: Any) -> Workload:
    given = {
        "name": "stub",
        "nodes": 1,
        "cpu": "500m",
        "memory": "100Mi",
        "time_limit_s": 600,
        "grace_s": 60,
        "retries": 0,
    }
    return Workload(job=job, words=list(words), ranks_per_node=1, gpus_per_node=0, **given | changes)


def end_of(slurm: Slurm, work: Workload, native: str) -> Status:
    """Its state once it has ended."""
    wait_for(lambda: slurm.status(work, native).state in ENDED, f"end of {work.words}")
    return slurm.status(work, native)


def log(slurm: Slurm, work: Workload, native: str, rank: int | None = None) -> list[str]:
    try:
        return list(slurm.logs(work, native, rank, follow=False))
    except UserError:
        return []


def submit(slurm: Slurm, job: str, *words: str, **changes: Any) -> tuple[Slurm, Workload, str]:
    work = workload(job, *words, **changes)
    return slurm, work, slurm.submit(work)


def test_exit_codes_and_signals_decide_what_is_run_again(stub: Slurm, lab: SlurmLab, folder: Path) -> None:
    requeued = submit(stub, "train", f"do=[ -e {folder}/twice ] && exit 0; touch {folder}/twice; {SAVES}")
    wait_for(lambda: "node 0: ready" in log(*requeued), "start")
    lab.ask("scontrol", "requeue", requeued[2])
    once = f"do=[ -e {folder}/once ] || {{ touch {folder}/once; exit 75; }}"
    jobs = {
        "requeued by a person": requeued,
        "preempted once": submit(stub, "train", once),
        "done": submit(stub, "preprocess", "do=env; pwd; ulimit -l"),
        "final": submit(stub, "preprocess", "do=exit 3", retries=1),
        "tried twice": submit(stub, "preprocess", "do=echo again; exit 4", retries=1),
        "failed on one node, preempted on the other": submit(
            stub, "train", "do=exit $((SLURM_NODEID ? 75 : 1))", nodes=2
        ),
        "killed": submit(stub, "train", "do=kill -9 $$"),
        "never begun": submit(stub, "evaluate", "do=echo never", after=[requeued[2]], suspend=True),
    }
    lab.ask("scancel", jobs["never begun"][2])
    ends = {name: end_of(*job) for name, job in jobs.items()}
    assert ends == {
        "requeued by a person": ("succeeded", "exit code 0", 1),
        "preempted once": ("succeeded", "exit code 0", 1),
        "done": ("succeeded", "exit code 0", 0),
        "final": ("failed", "exit code 3", 0),
        "tried twice": ("failed", "exit code 4", 0),
        "failed on one node, preempted on the other": ("failed", "exit code 1", 0),
        "killed": ("failed", "exit code 137", 0),
        "never begun": ("stopped", "CANCELLED: JobHeldUser", 0),
    }
    assert "node 0: saved" in log(*requeued)
    lines = log(*jobs["done"])
    assert f"rank 0: {folder}" in lines
    assert not [line for line in lines if "SUBMITTERS_TOKEN" in line]
    assert "rank 0: 64" not in lines, "the limits of the submitting shell are not the nodes'"
    assert log(*jobs["tried twice"]).count("rank 0: again") == 2

    lab.start_controller()
    wait_for(lab.is_idle, "idle nodes")
    never = ("stopped", "left the queue before it began: cancelled, or a job that it waits for failed", 0)
    assert {name: job[0].status(*job[1:]) for name, job in jobs.items()} == ends | {"never begun": never}


def test_a_job_that_somebody_ends_saves_its_work_and_is_not_requeued(stub: Slurm, lab: SlurmLab) -> None:
    stopped, cancelled = (submit(stub, "train", f"do={SAVES}", name=name) for name in ("stopped", "cancelled"))
    pending = submit(stub, "train", f"do={SAVES}", nodes=2)
    for job in (stopped, cancelled):
        wait_for(lambda job=job: "node 0: ready" in log(*job), "start")
        assert job[0].status(*job[1:]).state == "running"
    assert stub.status(*pending[1:])[:1] == ("pending",)
    stub.stop(*pending[1:])
    stub.stop(*stopped[1:])
    lab.ask("scancel", cancelled[2])
    for job in (stopped, cancelled):
        assert end_of(*job)[:2] == ("stopped", "exit code 143")
        assert "node 0: saved" in log(*job)
    wait_for(lab.is_idle, "idle nodes")
    assert [job[0].status(*job[1:]).state for job in (stopped, cancelled, pending)] == ["stopped"] * 3
    with pytest.raises(UserError, match=r"stopped \(Slurm job [0-9]+\) has ended: stopped, exit code 143"):
        stub.stop(*stopped[1:])


def test_elements_of_an_array_and_what_waits_for_them(stub: Slurm, lab: SlurmLab) -> None:
    held = submit(stub, "preprocess", suspend=True, array=[["do=echo it\\'s first"], ["do=exit 3"]])
    after = submit(stub, "evaluate", "do=echo never", after=[held[2]])
    assert held[0].status(*held[1:]) == ("suspended", "of 2: 2 suspended", 0)
    lab.ask("scontrol", "release", held[2])
    assert end_of(*held) == ("failed", "of 2: 1 failed, 1 succeeded; 1: exit code 3", 0)
    assert log(*held)[0] == "0/rank 0: it's first"
    assert end_of(*after)[0] == "stopped"
    assert log(*after) == []
