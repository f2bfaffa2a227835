"""The process group: joined as torchrun describes it, its timeouts, and the errors of a rank that is gone."""

import logging
import os
import re
import resource
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from features.errors import OtherRankError, UserError, one_line
from features.printable import printable
from pipeline.malloc import tune_malloc
from pipeline.torch_compat import set_timeout
from pipeline.training.faults.rank_status import ROUND, write_rank_status

logger = logging.getLogger(__name__)

RDMA = Path("/dev/infiniband")
IPC_LOCK = 14  # the number of this capability
ARRIVING_S = 60  # nodes start Python at different speeds
STARTING = timedelta(hours=2)  # from the first contact of all ranks until training begins: a rank may read a checkpoint


def start(limit: float = 600) -> torch.device:
    """Joins the process group that torchrun describes, or makes one of a single process; returns this rank's device.

    Args:
        limit: seconds to wait for ranks that have not come yet; ARRIVING_S if that is more.
    Raises:
        UserError: more ranks than GPUs on this machine. OtherRankError: ranks have not come, by name.
    """
    raise_file_limit()
    raise_lock_limit()
    quiet_libraries()
    listen_on_loopback()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cpu":
        tune_malloc()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        if int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs, fewer than ranks: lower --nproc-per-node"
            )
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=STARTING)
        return device
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=STARTING)
        return device
    limit = max(limit, ARRIVING_S)
    waiting = timedelta(seconds=limit)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = dist.TCPStore(host, port, ranks, is_master=False, timeout=waiting)
    attempt = int(os.environ.get(ROUND) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    wait_for_ranks(shared, attempt, rank, ranks, limit)
    # All attempts may share one store: without a prefix a restart meets the addresses of dead ranks.
    store = dist.PrefixStore(f"attempt_{attempt}", shared)
    with _ended_after(1.5 * limit, rank):  # gloo's side that listens waits five times its timeout
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=waiting)
    store.set_timeout(STARTING)
    set_timeout(dist.GroupMember.WORLD, STARTING)
    return device


@contextmanager
def _ended_after(seconds: float, rank: int) -> Iterator[None]:
    """Ends this process where the block takes longer."""

    def end() -> None:
        why = f"at the start: the ranks have not connected within {seconds:.0f} s: a node is gone, or the network between them"
        print(f"error (rank {rank}): {why}.", file=sys.stderr, flush=True)
        write_rank_status("lost", why)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_for_ranks(store: dist.Store, attempt: int, rank: int, ranks: int, limit: float) -> None:
    """Waits until all ranks of an attempt have come to the store.

    Args:
        attempt: the same number on all ranks that belong together. limit: seconds.
    Raises:
        OtherRankError: some have not come, or have gone on to the next attempt: torchrun counts them on each node by itself.
    """
    arrived, node = f"arrived/{attempt}", int(os.environ.get("GROUP_RANK", 0))
    store.set(f"attempt/{attempt}", "")
    store.set(f"{arrived}/{rank}", "")
    store.set(node_key(attempt, node), socket.gethostname())
    count, end = store.add(arrived, 1), time.monotonic() + limit
    while count < ranks:
        if store.check([f"attempt/{attempt + 1}"]):
            raise OtherRankError("at the start: the other nodes have started again meanwhile")
        if time.monotonic() > end:
            missing = [other for other in range(ranks) if not store.check([f"{arrived}/{other}"])]
            raise OtherRankError(
                f"at the start: waited {limit:.0f} s for {_names(missing, store, attempt)}. Look at the log of its node; "
                f"train.timeout is the limit, from {ARRIVING_S} s on. jobs.launch --max-restarts=N tries again."
            )
        time.sleep(min(0.1 * ranks, 1.0))
        count = store.add(arrived, 0)


def node_key(attempt: int, node: int) -> str:
    """The key of the store with the name of a node's host."""
    return f"node/{attempt}/{node}"


def _names(missing: list[int], store: dist.Store, attempt: int) -> str:
    """The first ranks that have not come, and their nodes, all of which have as many ranks as this one."""
    names = []
    for rank in missing[:5]:
        node = rank // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        host = store.get(node_key(attempt, node)).decode() if store.check([node_key(attempt, node)]) else ""
        names.append(f"rank {rank} (node {node}{host and ', ' + host})")
    return ", ".join(names) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")


def raise_lock_limit() -> None:
    """Lets this process lock as much memory as the system allows, and warns where that is too little for NCCL over RDMA."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    several = os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1")
    if several and RDMA.exists() and hard != resource.RLIM_INFINITY and not has_capability(IPC_LOCK):
        logger.warning(
            "ranks lock only %.1f MiB of memory (ulimit -l): NCCL cannot use RDMA, and may go on by TCP. "
            "k8s/PODS.md and pipeline/cluster/SLURM.md say where to raise it",
            hard / 2**20,
        )


def has_capability(bit: int) -> bool:
    """Whether this process has a Linux capability in effect."""
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return effective is not None and bool(int(effective[1], 16) >> bit & 1)


def raise_file_limit() -> None:
    """Lets this process open as many files as the system allows: ranks have a connection for each other rank and group."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def joined() -> Iterator[int]:
    """For a job that also runs as one process: the process group, where torchrun has started ranks, and this one's rank.

    Raises:
        UserError: as `start`; a fault that NCCL reports. OtherRankError: another rank is lost.
    """
    if "RANK" not in os.environ:
        tune_malloc()
        yield 0
        return
    start()
    try:
        yield dist.get_rank()
        dist.destroy_process_group()  # not after an error: others would see the connection break before it is printed
    except RuntimeError as error:
        if (said := explained(error, "", "Run the same command again.")) is None:
            raise
        raise said from None


def listen_on_loopback() -> None:
    """Where all ranks are on this machine, gloo and NCCL use its loopback interface, unless the environment names another.

    gloo would listen at the address of the host's name, NCCL at the first interface. Neither authenticates its peers.
    """
    if os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")  # "lo" would be all whose names begin so


def quiet_libraries() -> None:
    """Silences what torch, TorchRec and FBGEMM advise the authors of libraries, for this process."""
    for name in (
        "torchrec.distributed.utils",
        "torchrec.distributed.model_parallel",
        "torchrec.distributed.planner",
        "torchrec.distributed.comm",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*deprecating ShardedTensor")  # at its callers
    # The kernel of replicated tables on a CPU differentiates itself, and rightly so.
    warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function: an autograd kernel")


def limit_waiting(seconds: float) -> None:
    """Limits collectives of the default group from now on."""
    set_timeout(dist.GroupMember.WORLD, timedelta(seconds=seconds))


SIGNS = (
    "Connection reset by peer", "Connection closed by peer", "Broken pipe", "Timed out", "Connection refused",
    "Application timeout caused pair closure", "Connection timed out", "No route to host", "Network is unreachable",
    "Socket closed", "Wait timeout", "Operation timed out", "timed out connecting", "connectFullMesh failed",
    # NCCL's, and those of torch's watchdog over it
    "closed by remote peer", "ncclRemoteError", "remote process exited", "collective operation timeout",
    "communicator was aborted", "failed to recv",
)  # fmt: skip

NCCL_REMEDIES = {  # by what its error contains
    "duplicate gpu": "Each rank needs a GPU of its own: lower --nproc-per-node, or look at CUDA_VISIBLE_DEVICES.",
    "/dev/shm": "/dev/shm is too small: docker run --shm-size, on Kubernetes an emptyDir of medium Memory.",
    "out of memory": "The GPU is full: lower train.batch_size or what the plan may use, or end what else runs on it.",
    "": "NCCL_DEBUG=INFO prints more.",
}


def explained(error: RuntimeError, where: str, lost: str) -> UserError | None:
    """A collective's error in one line; None if it is no fault of a collective.

    Args:
        where: it happened, to begin the line with. lost: what to do where another rank is lost.
    Returns: OtherRankError if another rank is gone or does not answer; UserError with what NCCL says of any other fault.
    """
    if cause := lost_contact(error):
        return OtherRankError(
            f"{where}lost contact with another rank ({cause}); its own error, if it failed, says why. {lost}"
        )
    if (said := nccl_says(error)) is None:
        return None
    remedy = next(remedy for part, remedy in NCCL_REMEDIES.items() if part in said.lower())
    return UserError(f"{where}NCCL: {said}. {remedy}")


def lost_contact(error: RuntimeError) -> str | None:
    """The sign in a collective's error that another rank is gone or does not answer; None if it has another cause."""
    text = str(error).lower()
    sign = next((sign for sign in SIGNS if sign.lower() in text), None)
    if (said := nccl_says(error)) is not None:
        return sign and said  # it names the peer
    if sign is None and isinstance(error, dist.DistError):
        return one_line(error).split(". ")[0]
    return sign


def nccl_says(error: RuntimeError) -> str | None:
    """NCCL's own words in an error of torch, on one line; None if the error is not NCCL's.

    torch begins with a place in its own source and a class of errors. The cause is NCCL's last error, further down.
    """
    text = str(error).partition("Exception raised from")[0]  # what follows is a C++ stack
    if "nccl" not in text.lower():
        return None
    kind = re.search(r"\bnccl\w*(?:Error|Argument|Usage)\b", text)
    said = " ".join((text.partition("Last error:")[2].strip() or text).split())
    return printable(f"{kind[0]}: {said}" if kind and kind[0] not in said else said)[:300].rstrip(". ")
