"""The process group: joined as torchrun describes it, its timeouts, and the errors of a rank that is gone."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from features.errors import UserError
from pipeline.malloc import tune_malloc

STARTING = timedelta(hours=2)  # a rank may wait that long for another that plans, or reads a checkpoint


def start() -> torch.device:
    """Joins the process group that torchrun describes, or makes one of a single process; returns this rank's device."""
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cpu":
        tune_malloc()
    backend, timeout = ("nccl" if device.type == "cuda" else "gloo"), STARTING
    if device.type == "cuda":
        if int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
            raise UserError(f"more ranks than this machine's {torch.cuda.device_count()} GPUs: lower --nproc-per-node")
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


def limit_waiting(seconds: float) -> None:
    """From now on a collective of all ranks may take that long."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.GroupMember.WORLD)


def store() -> dist.Store:
    """A connection of its own to what all ranks can write to and read from."""
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def lost_contact(error: RuntimeError) -> str | None:
    """What a collective met where another rank is gone or does not answer; None if the error is another one."""
    words = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "Timed out", "Connection refused")
    return next((word for word in words if word in str(error)), "NCCL" if "NCCL" in str(error) else None)
