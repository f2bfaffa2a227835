"""What listens while jobs run, and what comes in: nothing beyond this machine, and no pickle is opened.

jobs/SECURITY.md lists the ports. No job on one machine has a port on another interface than loopback.
"""

import base64
import ipaddress
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch.distributed as dist
from hostile_pickle import Payload

from pipeline.synthetic.event_log import LogConfig, generate

ROOT = Path(__file__).parents[2]
TRAIN = ("train.epochs=1", "train.batch_size=64", "log_level=warning")


class Port(NamedTuple):
    """A TCP port that is listened on, or a bound UDP port."""

    address: str
    port: int


def ports(pid: int) -> set[Port]:
    """Those of a process and its descendants."""
    found: set[Port] = set()
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                for used in process.net_connections("inet"):
                    if used.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and used.laddr:
                        found.add(Port(used.laddr.ip, used.laddr.port))
    return found


def on_loopback(port: Port) -> bool:
    address = ipaddress.ip_address(port.address)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@contextmanager
def running(log: Path, *words: Any, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of this Python that prints into a file; its processes are gone afterwards."""
    changed = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        changed.pop(name, None)
    command = [sys.executable, *map(str, words)]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=changed, stdout=file, stderr=file)
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.wait()


def all_ports(log: Path, *words: Any) -> set[Port]:
    """Every port that a command has until it succeeds, looked at all the time."""
    found: set[Port] = set()
    with running(log, *words) as process:
        while process.poll() is None:
            found |= ports(process.pid)
            time.sleep(0.03)
        assert process.returncode == 0, log.read_text()
    return found


def test_one_training_on_two_ranks_listens_on_loopback_only(small_dataset: Path, tmp_path: Path) -> None:
    train = ("-m", "jobs.train", f"dataset={small_dataset}", f"run={tmp_path / 'run'}", "model=ple", *TRAIN)
    found = all_ports(tmp_path / "log", "-m", "jobs.launch", "--nproc-per-node=2", *train)
    assert len(found) >= 3  # the rendezvous, and each rank's gloo
    assert {port for port in found if not on_loopback(port)} == set()


@pytest.mark.system
def test_training_by_one_process_and_evaluation_listen_on_loopback_only(small_dataset: Path, tmp_path: Path) -> None:
    run = f"run={tmp_path / 'run'}"
    found = all_ports(tmp_path / "log", "-m", "jobs.train", f"dataset={small_dataset}", run, *TRAIN)
    assert {port for port in found if not on_loopback(port)} == set()
    assert all_ports(tmp_path / "log", "-m", "jobs.evaluate", run, f"dataset={small_dataset}") == set()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "raw"
    generate(LogConfig(impressions=3000), folder)
    return folder


@pytest.mark.system
@pytest.mark.parametrize("workers", [1, 2])
def test_preprocessing_listens_nowhere(workers: int, raw: Path, tmp_path: Path) -> None:
    words = ("data=demo", f"input={raw}", f"out={tmp_path / 'data'}", f"workers={workers}")
    assert all_ports(tmp_path / "log", "-m", "jobs.preprocess", *words) == set()


RANKS = """
import os, sys, time
from pathlib import Path

import torch.distributed as dist

from pipeline.training.parallel import process_group

folder, attempt = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
(folder / f"begun-{attempt}").touch()
process_group.start()
said = [None, None]
dist.all_gather_object(said, os.getpid())
(folder / f"ready-{attempt}-{os.environ['RANK']}").touch()
while attempt == 0 and not (folder / "attacked").exists():
    time.sleep(0.02)
sys.exit(attempt == 0)
"""


def attack(port: int, payload: bytes) -> None:
    """Sets every key of the store to a pickle; the state of a c10d rendezvous to one in base64, as agents read it."""
    with suppress(dist.DistError, RuntimeError):  # the store is gone
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=2))
        for key in store.list_keys():
            is_state = key.startswith("torch.rendezvous.") and "/" not in key
            store.set(key, base64.b64encode(payload) if is_state else payload)
        time.sleep(0.3)


def attacked(tmp_path: Path, *launcher: str) -> bool:
    """Whether a payload has run, once ranks that this launcher started, and restarted, were attacked."""
    script, payload = tmp_path / "ranks.py", pickle.dumps(Payload(tmp_path / "payload"))
    script.write_text(RANKS)
    words = (*launcher, "--nproc-per-node=2", "--max-restarts=1", script, tmp_path)
    with running(tmp_path / "log", *words, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1") as process:
        begin = time.monotonic()
        while len(list(tmp_path.glob("ready-0-*"))) < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < begin + 60
            time.sleep(0.05)
        stores = {used.laddr.port for used in psutil.Process(process.pid).net_connections("tcp") if not used.raddr}
        assert stores
        for word in ("ready-0-1", "begun-1"):  # while ranks train, while they are started again, and while they start
            while process.poll() is None and not (tmp_path / word).exists():
                for port in stores:
                    attack(port, payload)
            for port in stores:
                attack(port, payload)
            (tmp_path / "attacked").touch()
    return (tmp_path / "payload").exists()


@pytest.mark.system
@pytest.mark.parametrize("flags", [("--standalone",), ("--nnodes=1", "--rdzv-backend=c10d")])
def test_pickles_that_reach_the_store_of_one_node_are_not_opened(flags: tuple[str, ...], tmp_path: Path) -> None:
    assert not attacked(tmp_path, "-m", "jobs.launch", *flags)


@pytest.mark.system
def test_the_same_attack_runs_code_where_agents_meet_by_c10d(tmp_path: Path) -> None:
    """Torchrun's own --standalone: the reason for the rule, and a check that the attack above is one."""
    assert attacked(tmp_path, "-m", "torch.distributed.run", "--standalone")
