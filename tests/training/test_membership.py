"""What a launcher makes of failed ranks and waiting nodes, and what ranks that wait for others at the start say."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters

from features.errors import OtherRankError, Preempted, UserError
from jobs import launch
from pipeline.training.faults.preemption import PREEMPTED
from pipeline.training.faults.rank_status import NODES_WAITING, REASON, ROUND, STATUS_FOLDER, Alive, RankStatus
from pipeline.training.parallel import launcher, process_group, rendezvous
from pipeline.training.parallel.contact import INTERVAL_S, Contact
from pipeline.training.parallel.exit_codes import lost
from pipeline.training.parallel.launcher import warn_of_clock
from pipeline.training.parallel.membership import Membership
from pipeline.training.parallel.process_group import explained, lost_contact, raise_file_limit, wait_for_ranks


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ROUND, REASON, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "")


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def made() -> Iterator[list[Membership]]:
    made: list[Membership] = []
    yield made
    for membership in made:
        if membership.contact:
            membership.contact.stop()


def member(
    made: list[Membership], folder: Path, port: int, fewest: int, most: int, identity: str, last_call: int = 1
) -> Membership:
    given = {"last_call_timeout": last_call, "join_timeout": 60, "keep_alive_interval": 10, "keep_alive_max_attempt": 9}
    parameters = RendezvousParameters(
        "c10d", f"127.0.0.1:{port}", identity, fewest, most, local_addr="127.0.0.1", is_host=False, **given
    )
    made.append(Membership(parameters, folder, threading.Event()))
    return made[-1]


def write(folder: Path, rank: int, state: str, reason: str = "") -> None:
    (folder / str(rank)).write_text(json.dumps(RankStatus(state, 0, 100 + rank, 2, reason)))


def failed(*codes: int) -> RunResult:
    failures = {8 + rank: ProcessFailure(rank, 100 + rank, code, "none") for rank, code in enumerate(codes)}
    return RunResult(WorkerState.FAILED, failures=failures)


def test_waiting_nodes_join_once_all_ranks_of_this_machine_hold_and_not_before(
    made: list[Membership], store: dist.TCPStore, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = member(made, tmp_path, store.port, 1, 2, "held", last_call=5)
    info = first.next_rendezvous()
    assert (info.rank, info.world_size, os.environ[ROUND]) == (0, 1, "0")
    assert first.num_nodes_waiting() == 0
    second = member(made, tmp_path_factory.mktemp("other"), store.port, 1, 2, "held", last_call=5)
    rounds: list = []
    joining = threading.Thread(target=lambda: rounds.append(second.next_rendezvous()))
    joining.start()
    while not (tmp_path / NODES_WAITING).exists():
        assert first.num_nodes_waiting() == 0
    write(tmp_path, 0, "holding")
    assert first.num_nodes_waiting() == 0, "another rank of this machine still trains"
    write(tmp_path, 1, "holding")
    assert first.num_nodes_waiting() == 1
    info = first.next_rendezvous()
    joining.join()
    places = [(i.bootstrap_store_info.master_addr, i.bootstrap_store_info.master_port) for i in (info, rounds[0])]
    assert places[0] == places[1]
    assert os.environ[ROUND] == "1"
    assert os.environ[REASON] == "1 more node"
    assert list(tmp_path.glob("[0-9]*")) == [], "statuses of ranks that are gone"


def test_ranks_that_hold_for_a_node_that_has_gone_meanwhile_are_started_again(
    made: list[Membership], store: dist.TCPStore, tmp_path: Path
) -> None:
    only = member(made, tmp_path, store.port, 1, 2, "gone")
    only.next_rendezvous()
    (tmp_path / NODES_WAITING).touch()  # which the ranks see, and begin to write their checkpoint
    write(tmp_path, 0, "started")
    write(tmp_path, 1, "started")
    assert only.num_nodes_waiting() == 0
    write(tmp_path, 0, "holding")
    write(tmp_path, 1, "holding")
    assert only.num_nodes_waiting() == 1
    only.next_rendezvous()
    assert os.environ[REASON] == "a node came and went"


def test_where_nodes_come_and_go_a_rank_that_lost_the_others_is_no_failure_and_a_crash_is_one(
    made: list[Membership], store: dist.TCPStore, tmp_path: Path
) -> None:
    elastic = member(made, tmp_path, store.port, 1, 2, "elastic")
    write(tmp_path, 0, "lost", "step 5: lost contact")
    assert elastic.judge(failed(1)).state is WorkerState.HEALTHY
    assert elastic.num_nodes_waiting() == 1  # torchrun starts its ranks again, and counts no restart
    elastic.next_rendezvous()
    assert os.environ[REASON].endswith(": step 5: lost contact")
    assert elastic.num_nodes_waiting() == 0
    write(tmp_path, 0, "lost", "step 5: lost contact")
    write(tmp_path, 1, "failed", "no room")
    assert elastic.judge(failed(1, 1)).state is WorkerState.FAILED
    write(tmp_path, 0, "started")
    assert elastic.judge(failed(-signal.SIGKILL)).state is WorkerState.FAILED
    elastic.next_rendezvous()
    assert os.environ[REASON].endswith(": killed by SIGKILL")

    fixed = member(made, tmp_path, store.port, 2, 2, "fixed")
    write(tmp_path, 0, "lost", "step 5: lost contact")
    assert fixed.judge(failed(1)).state is WorkerState.FAILED


def test_nodes_that_never_reach_each_other_do_not_start_for_ever(
    made: list[Membership], store: dist.TCPStore, tmp_path: Path
) -> None:
    only = member(made, tmp_path, store.port, 1, 2, "in-vain")
    write(tmp_path, 0, "lost", "at the start: lost contact")
    states = [only.judge(failed(1)).state for _ in range(6)]
    assert states == [WorkerState.HEALTHY] * 4 + [WorkerState.FAILED] * 2
    (tmp_path / "0.alive").write_text(json.dumps(Alive(100, 60, 7, 0)))
    only.num_nodes_waiting()
    assert only.judge(failed(1)).state is WorkerState.FAILED, "no step was taken since"
    (tmp_path / "0.alive").write_text(json.dumps(Alive(100, 60, 8, 1)))
    only.num_nodes_waiting()
    assert only.judge(failed(1)).state is WorkerState.HEALTHY


def test_ranks_that_have_saved_their_work_are_not_started_again_where_all_nodes_are_needed(
    made: list[Membership], store: dist.TCPStore, tmp_path: Path
) -> None:
    fixed = member(made, tmp_path, store.port, 2, 2, "saved")
    fixed.joined = True
    write(tmp_path, 0, "preempted")
    fixed.judge(failed(PREEMPTED))
    with pytest.raises(Preempted):
        fixed.next_rendezvous()


def test_a_launcher_that_is_told_to_end_tells_the_others(store: dist.TCPStore) -> None:
    terminated = threading.Event()
    ours, theirs = (Contact(store.clone(), event) for event in (terminated, threading.Event()))
    assert not theirs.wait_for_end()
    terminated.set()
    assert theirs.wait_for_end()
    assert theirs.silence() < 1
    for contact in (ours, theirs):
        contact.stop()


def test_a_launcher_that_has_left_a_round_is_no_end_of_the_next_one(
    made: list[Membership], store: dist.TCPStore, tmp_path: Path
) -> None:
    stays, told = member(made, tmp_path, store.port, 1, 2, "left"), threading.Event()
    leaves = Contact(store.clone(), told)
    stays.next_rendezvous()
    assert stays.contact
    leaves.round = stays.contact.round
    told.set()
    assert stays.contact.wait_for_end()
    waits = Contact(store.clone(), threading.Event())  # of a node that has joined no round yet
    assert waits.wait_for_end()
    write(tmp_path, 0, "preempted")
    assert stays.judge(failed(PREEMPTED)).state is WorkerState.HEALTHY
    stays.next_rendezvous()
    assert os.environ[REASON].endswith(f": saved after SIGTERM to {socket.gethostname()}")
    time.sleep(2 * INTERVAL_S)
    assert not stays.contact.ended_by
    for contact in (leaves, waits):
        contact.stop()


def test_a_clock_that_differs_from_the_first_launchers_is_warned_of(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Contact(store.clone(), threading.Event())
    time.sleep(INTERVAL_S)
    second = Contact(store.clone(), threading.Event())
    time.sleep(4 * INTERVAL_S)
    assert abs(second.ahead) < 2
    assert not warn_of_clock(second.ahead, 15, "hA:1")
    first.stop()
    store.set("taskfuse/clock", str(time.time() - 600))  # what a first launcher that has gone wrote last is no clock
    third = Contact(store.clone(), threading.Event())
    time.sleep(2 * INTERVAL_S)
    third.stop()
    assert third.ahead == 0
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 45)
    store.set("taskfuse/clock", str(now()))
    time.sleep(4 * INTERVAL_S)
    second.stop()
    assert -46 < second.ahead < -41  # it reads the clock up to INTERVAL_S after it was written
    assert warn_of_clock(second.ahead, 15, "hA:1")
    assert capsys.readouterr().err.startswith("warning: the clock here is 4")


class Cut:
    """A store whose host is cut off once `answers` is cleared."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.answers = store, threading.Event()
        self.answers.set()

    def __getattr__(self, name: str) -> Any:
        self.answers.wait()
        return getattr(self.store, name)


def test_a_launcher_hears_that_the_store_is_cut_off_also_after_another_has_received_sigterm(
    store: dist.TCPStore,
) -> None:
    told = threading.Event()
    told.set()
    cut = Cut(store.clone())
    ended, contact = Contact(store.clone(), told), Contact(cast("dist.Store", cut), threading.Event())
    assert contact.wait_for_end()
    cut.answers.clear()
    time.sleep(3)
    assert contact.silence() > 2
    cut.answers.set()
    contact.stop()
    ended.stop()


@pytest.mark.parametrize(
    ("states", "asked", "code"),
    [
        (("preempted", "holding"), False, PREEMPTED),
        ((), False, 1),
        ((), True, PREEMPTED),
        (("lost",), False, 1),
        (("lost", "preempted"), True, PREEMPTED),
        (("started",), True, 1),
        (("failed", "lost"), True, 1),
    ],
)
def test_a_launcher_without_contact_says_75_only_if_its_ranks_lose_nothing(
    states: tuple[str, ...], asked: bool, code: int, tmp_path: Path
) -> None:
    for rank, state in enumerate(states):
        write(tmp_path, rank, state)
    found = lost("hA:1, where the nodes meet", "Broken pipe", asked, tmp_path)
    assert found == code or (code == 1 and str(found).startswith("error: lost contact with hA:1, where"))


def test_ranks_that_do_not_come_are_named_with_their_hosts(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    store.set("node/3/1", "node-b")
    with pytest.raises(
        OtherRankError, match=r"waited 0 s for rank 1 \(node 0, .*\), rank 2 \(node 1, node-b\), rank 3"
    ):
        wait_for_ranks(store, 3, 0, 4, 0.3)


def test_ranks_of_an_attempt_that_others_have_left_do_not_wait_for_them(store: dist.TCPStore) -> None:
    store.set("attempt/4", "")
    with pytest.raises(OtherRankError, match=r"the other nodes have started again"):
        wait_for_ranks(store, 3, 0, 2, 60)


@pytest.mark.parametrize(
    "text",
    [
        "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 10000ms for recv operation to complete",
        "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1234",
        "[../gloo/transport/tcp/unbound_buffer.cc:134] Application timeout caused pair closure",
        "[../gloo/transport/tcp/pair.cc:525] Read error [10.0.0.2]:1234: Connection reset by peer",
        "[../gloo/transport/tcp/pair.cc:525] Read error [10.0.0.2]:1234: No route to host",
        "Gloo connectFullMesh failed with SO_ERROR: Connection refused",
    ],
)
def test_a_lost_rank_is_known_by_what_gloo_says(text: str) -> None:
    assert lost_contact(RuntimeError(text)) is not None
    assert lost_contact(RuntimeError("The size of tensor a (3) must match")) is None


def test_a_lost_store_is_a_lost_rank() -> None:
    assert lost_contact(dist.DistNetworkError("failed to recv, got 0 bytes. Exception raised from x")) is not None


NCCL_TEXTS = {  # as torch raises them, from reports of its users; what NCCL says of each, and of a lost peer that it is one
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, invalid usage (run with NCCL_DEBUG=WARN for "
    "details), NCCL version 2.27.5\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000": (
        "ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000. Each rank needs a GPU", False
    ),
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:317, unhandled system error (run with NCCL_DEBUG=INFO for "
    "details), NCCL version 2.21.5\nncclSystemError: System call (e.g. socket, malloc) or external library call failed or "
    "device error. It can be also caused by unexpected exit of a remote peer, you can check NCCL warnings for failure reason "
    "and see if there is connection closure by a peer.\nLast error:\n"
    "Error while creating shared memory segment /dev/shm/nccl-EoOvZr (size 7340384)\nException raised from create at ": (
        "ncclSystemError: Error while creating shared memory segment /dev/shm/nccl-EoOvZr (size 7340384). /dev/shm is", False
    ),
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for "
    "details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
    "Cuda failure 2 'out of memory'": ("ncclUnhandledCudaError: Cuda failure 2 'out of memory'. The GPU is full", False),
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, unhandled system error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclSystemError: System call (e.g. socket, malloc) or external library "
    "call failed or device error.\nLast error:\n\n": ("unhandled system error (run with NCCL_DEBUG=INFO for details)", False),
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited or there was a network error,"
    " NCCL version 2.21.5\nncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
    "prematurely.\nLast error:\nsocketProgressOpt: Call to recv from 10.0.0.7<33759> failed : Connection reset by peer": (
        "ncclRemoteError: socketProgressOpt: Call to recv from 10.0.0.7<33759> failed : Connection reset by peer", True
    ),
    "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1275, internal error, NCCL version 2.14.3\n"
    "ncclInternalError: Internal check failed.\nLast error:\nNet : Connection closed by remote peer node-2<50260>": (
        "ncclInternalError: Net : Connection closed by remote peer node-2<50260>", True
    ),
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, "
    "Timeout(ms)=600000) ran for 600066 milliseconds before timing out.": ("Watchdog caught collective", True),
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', but "
    "store->get('0') got error: wait timeout after 600000ms, keys: /default_pg/0//cuda//0": ("wait timeout after 600", True),
}  # fmt: skip


@pytest.mark.parametrize("text", NCCL_TEXTS)
def test_what_nccl_says_is_kept_and_is_a_lost_rank_only_where_a_peer_is_gone(text: str) -> None:
    says, lost_peer = NCCL_TEXTS[text]
    found = explained(dist.DistBackendError(text), "step 7: ", "Rerun.")
    assert isinstance(found, OtherRankError) is lost_peer
    begins = "step 7: lost contact with another rank (" if lost_peer else "step 7: NCCL: "
    assert str(found).startswith(begins)
    assert says in str(found)
    assert "\n" not in str(found)
    assert "raised from" not in str(found)


def test_an_error_that_is_of_no_collective_keeps_its_traceback() -> None:
    assert explained(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "", "") is None


def test_a_process_opens_as_many_files_as_the_system_allows_and_so_do_its_children() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        raise_file_limit()
        script = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
        child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert int(child.stdout) == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("limit", "capable", "nodes", "warned"),
    [(8 << 20, False, 2, True), (8 << 20, True, 2, False), (8 << 20, False, 1, False), (-1, False, 2, False)],
)
def test_memory_that_rdma_cannot_lock_is_said_at_the_start(
    limit: int,
    capable: bool,
    nodes: int,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 16, limit))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    monkeypatch.setattr(process_group, "has_capability", lambda _: capable)
    monkeypatch.setattr(process_group, "RDMA", tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(8 * nodes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    process_group.raise_lock_limit()
    assert raised == [(limit, limit)]
    assert ("ranks lock only 8.0 MiB of memory (ulimit -l)" in caplog.text) is warned


def test_a_capability_is_read_as_the_kernel_says_it() -> None:
    chown = os.geteuid() == 0  # capability 0, which a container's root has, too
    assert process_group.has_capability(0) is chown
    assert not process_group.has_capability(63)


def test_ranks_go_by_the_launchers_own_time_for_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def note(*_: object, **__: object) -> None:
        found.append(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
        raise UserError("")

    monkeypatch.setattr(rendezvous, "choose", lambda _: None)
    monkeypatch.setattr(launcher, "end_while_waiting", note)
    monkeypatch.setattr(launch, "escape_output", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for variable in ("TORCH_CPP_LOG_LEVEL", STATUS_FOLDER):
        monkeypatch.setenv(variable, "")
    for flags, before in (([], "45"), (["--shutdown-timeout=1800"], "45")):
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", before)
        monkeypatch.setattr(sys, "argv", ["launch", *flags, "-m", "jobs.train"])
        with pytest.raises(UserError):
            launch.main()
    assert found == ["45", "1800"]


def test_ranks_and_their_launcher_raise_the_limit_of_files_before_they_open_a_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """512 ranks have some 2,000 connections to the launcher that holds the store; the usual limit is 1,024."""
    before, found = resource.getrlimit(resource.RLIMIT_NOFILE), []

    def note(*_: object) -> None:
        found.append(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        raise UserError("")

    monkeypatch.setattr(rendezvous, "choose", note)
    monkeypatch.setattr(process_group, "listen_on_loopback", note)
    monkeypatch.setattr(launch, "escape_output", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["launch", "-m", "jobs.train"])
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        for begin, ends in ((launch.main, SystemExit), (process_group.start, UserError)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
            with pytest.raises(ends):
                begin()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found == [before[1]] * 2


def test_a_node_that_is_lost_while_ranks_connect_ends_the_others_in_time() -> None:
    """gloo itself waits five times as long as it is told on the side that listens."""
    script = """
import os, time
import torch.distributed as dist
from pipeline.training.parallel import process_group
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}
os.environ["MASTER_PORT"] = str(store.port)
process_group.ARRIVING_S = 0
dist.init_process_group = lambda *_, **__: time.sleep(60)
process_group.start(0.4)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error (rank 0): at the start: the ranks have not connected within 1 s")
    assert done.stderr.count("\n") == 1
