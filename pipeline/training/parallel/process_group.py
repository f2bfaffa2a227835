"""The process group: joined as torchrun describes it, its timeouts, and the errors of a rank that is gone."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from features.errors import OtherRankError, UserError
from pipeline.malloc import tune_malloc
from pipeline.torch_compat import default_store, set_timeout

STARTING = timedelta(hours=2)  # until training begins: another rank may plan, or read a checkpoint


def start() -> torch.device:
    """Joins the process group that torchrun describes, or makes one of a single process; returns this rank's device.

    Raises:
        UserError: more ranks than GPUs on this machine.
    """
    quiet_libraries()
    listen_on_loopback()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cpu":
        tune_malloc()
    backend, timeout = ("nccl" if device.type == "cuda" else "gloo"), STARTING
    if device.type == "cuda":
        if int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs, fewer than ranks: lower --nproc-per-node"
            )
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return device
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)
        return device
    # All attempts of torchrun share one store: without a prefix a restart meets the addresses of dead ranks.
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt_{attempt}", dist.TCPStore(host, port, ranks, is_master=False))
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    return device


@contextmanager
def joined() -> Iterator[int]:
    """For a job that also runs as one process: the process group, where torchrun has started ranks, and this one's rank.

    Raises:
        UserError: as `start`. OtherRankError: another rank is lost.
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
        if (cause := lost_contact(error)) is None:
            raise
        raise OtherRankError(
            f"lost contact with another rank ({cause}); its own error, if it failed, says why. Run the same command again."
        ) from None


def listen_on_loopback() -> None:
    """Where all ranks are on this machine, gloo and NCCL use its loopback interface, unless the environment names another.

    gloo would listen at the address of the host's name, NCCL at the first interface. Neither authenticates its peers.
    """
    if os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")  # "lo" would be all whose names begin so


def quiet_libraries() -> None:
    """Silences what torch, TorchRec and FBGEMM advise the authors of libraries, for this process."""
    for name in ("torchrec.distributed.utils", "torchrec.distributed.model_parallel", "torchrec.distributed.planner"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*deprecating ShardedTensor")  # at its callers
    # The kernel of replicated tables on a CPU differentiates itself, and rightly so.
    warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function: an autograd kernel")


def limit_waiting(seconds: float) -> None:
    """Limits collectives of the default group from now on."""
    set_timeout(dist.GroupMember.WORLD, timedelta(seconds=seconds))


def store() -> dist.Store:
    """A new connection to the key-value store that all ranks share."""
    return default_store()


def lost_contact(error: RuntimeError) -> str | None:
    """The sign in a collective's error that another rank is gone or does not answer; None if it has another cause."""
    words = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "Timed out", "Connection refused")
    return next((word for word in words if word in str(error)), "NCCL" if "NCCL" in str(error) else None)
