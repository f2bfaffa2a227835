"""Nodes that come and go: hosts as network namespaces, each with a launcher, while a run trains over them."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Host, hosts, require_hosts
from hosts_job import Job
from tiny_training import make_dataset

from pipeline.run.run import Run

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    make_dataset(folder / "data")
    return folder


@pytest.fixture
def pair() -> Iterator[list[Host]]:
    require_hosts()
    with hosts("hA", "hB") as pair:
        yield pair


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        print(job.log())
        job.close()


def no_tracebacks(job: Job) -> bool:
    return not any(sign in job.log() for sign in ("Traceback", "terminate called", "frame #", "Fatal"))


def test_a_run_goes_on_while_nodes_are_added_lose_ranks_are_cut_off_and_die_and_no_row_is_lost_or_repeated(
    folder: Path, pair: list[Host], jobs: list[Job]
) -> None:
    a, b = pair
    job = Job(folder, "changing", pair, "1:2", restarts=1, read_timeout=60)  # a cut connection may be silent for 50 s
    jobs.append(job)
    job.start(a)
    job.trains(1)
    job.start(b)
    joined = job.trains(2)
    assert (joined["step"] - 1) % 10 == 0
    assert job.taken_again() == 0, "new nodes join at a checkpoint"

    newest = job.newest()
    os.kill(job.rank_of(b), signal.SIGKILL)
    job.trains(2, after=newest, steps=11)

    newest = job.newest()
    b.cut()
    job.trains(1, after=newest)
    again = job.taken_again()
    b.reconnect()
    job.trains(2, after=newest)
    assert job.taken_again() == again

    newest = job.newest()
    b.kill()
    job.trains(1, after=newest)
    job.terminate(a)
    assert job.end_of(a) == os.EX_TEMPFAIL
    assert job.account() == (0, 0, 0)
    assert no_tracebacks(job)
    assert "rank 1, pid" in job.log(a)
    reasons = [(start.ranks, start.nodes, start.reason) for start in Run(folder / "changing").starts()]
    assert [ranks for ranks, _, _ in reasons] == [nodes for _, nodes, _ in reasons] == [1, 2, 2, 1, 2, 1]
    assert reasons[0][2] == "start"
    assert reasons[1][2] == reasons[4][2] == "1 more node"
    assert reasons[2][2] == "rank 1 on hB: killed by SIGKILL"
    assert reasons[3][2].startswith("rank 0 on hA: step ")


def test_every_end_by_sigterm_is_75_on_all_nodes_and_a_rendezvous_host_that_is_cut_off_hangs_nobody(
    folder: Path, pair: list[Host], jobs: list[Job]
) -> None:
    a, b = pair
    job = Job(folder, "told", pair, "2", read_timeout=12)
    jobs.append(job)

    job.start_all()
    job.trains(2, steps=12)
    job.terminate(b)
    assert [job.end_of(host) for host in pair] == [os.EX_TEMPFAIL] * 2

    job.start_all()
    job.starts()
    time.sleep(1)  # they import, or wait for each other
    job.terminate(a)
    assert [job.end_of(host) for host in pair] == [os.EX_TEMPFAIL] * 2

    newest = job.newest()
    job.start_all()
    job.trains(2, after=newest)
    b.kill()
    job.wait(lambda: "rank 1" in job.log(a) or "lost contact" in job.log(a), "its end is not noticed")
    time.sleep(1)
    job.terminate(a)  # it waits for the other
    assert job.end_of(a) == os.EX_TEMPFAIL

    newest = job.newest()
    job.start_all()
    job.trains(2, after=newest)
    a.cut()
    assert job.end_of(b) == 1
    assert "error: lost contact with hA:29400, where the nodes meet (no answer for " in job.log(b)
    job.terminate(a)
    assert job.end_of(a) == os.EX_TEMPFAIL
    assert job.account() == (0, 0, 0)
    assert no_tracebacks(job)
