"""Nodes that are lost, cut off and added while a run trains over two: python tests/benchmarks/node_faults.py.

Hosts are network namespaces (tests/hosts.py: root, iproute2), with one rank each of tests/training/faulty_run.py on a small
dataset: a step takes 0.2 s, a checkpoint is written every 10 steps, train.timeout=5, and the launchers have the short waits of
tests/training/hosts_job.py. Times are from the fault: until a survivor prints what it has noticed, and until the next step
is taken by the ranks that are left or joined. Rows are counted by row_id as in faults.py.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "training")]

from hosts import Host, hosts  # noqa: E402
from hosts_job import Job  # noqa: E402
from tiny_training import make_dataset  # noqa: E402

COLUMNS = [
    "fault",
    "noticed after s",
    "trains again after s",
    "steps taken twice",
    "rows lost",
    "rows twice",
    "exit codes",
]
NOTICED = ("error", "saved, for nodes that wait")


class Fault(NamedTuple):
    """A fault to a run on hosts a and b, of which a holds the rendezvous.

    Attributes:
        act: done to the job. ranks: that train afterwards; 0 if none does. nodes: --nnodes. begins: on how many hosts.
        then: done once it trains again, or at once where none does.
    """

    name: str
    act: Callable[[Job, Host, Host], object]
    ranks: int
    nodes: str = "1:2"
    begins: int = 2
    then: Callable[[Job, Host, Host], object] = lambda *_: None


def cut_and_back(job: Job, a: Host, b: Host) -> None:
    """The link of b is down for 15 s."""
    b.cut()
    time.sleep(15)
    b.reconnect()


FAULTS = [
    Fault("a rank is killed", lambda job, a, b: os.kill(job.rank_of(b), signal.SIGKILL), 2),
    Fault("a node is killed", lambda job, a, b: b.kill(), 1),
    Fault("a node's link is cut", lambda job, a, b: b.cut(), 1, then=lambda job, a, b: job.end_of(b)),
    Fault("a node's link is cut for 15 s", cut_and_back, 2),
    Fault("the link of the rendezvous host is cut", lambda job, a, b: a.cut(), 1, then=lambda job, a, b: job.end_of(b)),
    Fault("a node is killed, SIGTERM while the other waits for it", lambda job, a, b: b.kill(), 0, "2"),
    Fault("a node is added", lambda job, a, b: job.start(b), 2, begins=1),
]


def main() -> None:
    """Does all faults, prints the table and writes results/node_faults.json."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        make_dataset(Path(name) / "data")
        for fault in FAULTS:
            rows.append(suffer(Path(name), fault))
            print(f"{len(rows)}/{len(FAULTS)} {fault.name}", file=sys.stderr, flush=True)
    print(tabulate([row.values() for row in rows], COLUMNS, floatfmt=".1f", tablefmt="github"))
    (Path(__file__).parent / "results" / "node_faults.json").write_text(json.dumps(rows, indent=1) + "\n")


def suffer(folder: Path, fault: Fault) -> dict[str, object]:
    """One run with its fault: a row of the table."""
    with hosts("hA", "hB") as (a, b):
        job = Job(folder, "-".join(filter(str.isalnum, fault.name)), [a, b], fault.nodes)
        try:
            for host in (a, b)[: fault.begins]:
                job.start(host)
            job.trains(fault.begins, steps=14)
            newest, begin = job.newest(), time.time()
            threading.Thread(target=fault.act, args=(job, a, b)).start()
            job.wait(lambda: any(sign in job.log() for sign in NOTICED), "it is not noticed")
            noticed, again = time.time() - begin, None
            if fault.ranks:
                again = job.trains(fault.ranks, after=newest)["time"] - begin
            fault.then(job, a, b)
            job.terminate(a)
            codes = [job.end_of(host) if host.name in job.launchers else None for host in (a, b)]
            lost, repeated, _ = job.account()
        finally:
            job.close()
    return {
        "fault": fault.name, "noticed": noticed, "again": again, "twice": job.taken_again(), "lost": lost,
        "repeated": repeated, "codes": ", ".join(map(str, codes)),
    }  # fmt: skip


if __name__ == "__main__":
    main()
