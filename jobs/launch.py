"""jobs.launch: torchrun, with an exit code that tells preemption from failure.

torchrun exits with 1 whatever its ranks do once one receives SIGTERM. This one exits with 75 if all ranks of this machine
have saved their work in a checkpoint or had none yet, or wait for other nodes, also where another node received SIGTERM; with
0 if they were done nevertheless; arguments are torchrun's. Between SIGTERM and SIGKILL ranks have 600 s, or
TORCH_ELASTIC_SHUTDOWN_TIMEOUT. A rank that stops beating for train.timeout is killed, also where it is the only one.

--nnodes=2:8 trains on whatever nodes are there, 2 at least, 8 at most. A node that is lost costs the steps since the last
checkpoint and no restart of --max-restarts, which each node counts for its own ranks. A new node joins at the next checkpoint:
nothing is trained twice. All start the same command; where they meet, --rdzv-endpoint, is a host that stays to the end: the
others end with one line once it has not answered for 60 s (--rdzv-conf=read_timeout). A start waits 15 s for more nodes than
the least (last_call_timeout), a node 2 hours for a checkpoint (join_timeout); a silent one is gone after 15 s
(keep_alive_interval x keep_alive_max_attempt), as is one whose clock differs by that much.

Examples:
  python -m jobs.launch --nproc-per-node=2 -m jobs.train dataset=runs/demo/data model=ple run=runs/demo/ple
  python -m jobs.launch --nproc-per-node=8 --max-restarts=3 -m jobs.train dataset=D model=adatt run=R
  python -m jobs.launch --nnodes=8 --node-rank=N --master-addr=HOST0 --nproc-per-node=8 -m jobs.train dataset=D run=R
  python -m jobs.launch --nnodes=2:8 --rdzv-endpoint=HOST0:29400 --nproc-per-node=8 -m jobs.train dataset=D run=R

One node, also by --standalone, listens on 127.0.0.1 alone, at --master-port or a free port; its other flags of
the rendezvous have no effect. Several need a network that is trusted whole, or rules (on Kubernetes a NetworkPolicy) by which
only this job's nodes reach each other's ports: clients are not authenticated. Node 0 listens on the one address that
--master-addr is there, or prints that it listens on all (--master-addr=0.0.0.0 on node 0 is all). --rdzv-backend=c10d, which a
number of nodes that changes takes, unpickles what arrives at its port: anyone who can connect can execute code on every node.
"""

import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from features.errors import UserError
from pipeline.quick_imports import quick_imports
from pipeline.terminal import escape_output
from pipeline.training.faults.preemption import PREEMPTED
from pipeline.training.faults.rank_status import STATUS_FOLDER


def main() -> None:
    """Runs torchrun in this process, and reads its ranks' statuses where not all of them exited with 0."""
    escape_output()
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what torch logs of lost connections are C++ stacks
    if {"--help", "-h"} & set(sys.argv[1:2]):
        print(f"{__doc__.strip()}\n")
    # Until torchrun has ranks, which it may wait minutes for, and takes the signal itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))

    with quick_imports():
        from torch.distributed import run

        from pipeline.training.parallel import launcher, process_group, rendezvous

    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "ERROR"  # of the ranks
    process_group.raise_file_limit()
    options = run.get_args_parser().parse_args()
    try:
        store = rendezvous.choose(options)
    except UserError as error:
        sys.exit(f"error: {error}")
    if options.shutdown_timeout is not None:  # ranks go by it as well
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(options.shutdown_timeout)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    with tempfile.TemporaryDirectory() as name:
        os.environ[STATUS_FOLDER] = name
        options.log_dir = options.log_dir or f"{name}/torchrun.logs"  # it would leave a folder behind with each start
        terminated = launcher.end_while_waiting(Path(name), alone=options.nnodes in ("1", "1:1"))
        code = launcher.launch(options, Path(name), terminated)
    del store  # only now: torchrun's static rendezvous shares its server
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    # torchrun's thread that keeps a rendezvous alive may be in C++ just now: an orderly end would abort this process.
    os._exit(1 if isinstance(code, str) else code)


if __name__ == "__main__":
    main()
