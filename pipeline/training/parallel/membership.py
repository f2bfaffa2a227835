"""Which nodes train together: torchrun's rendezvous with a store for each round, and new nodes at checkpoints alone.

torchrun counts restarts on each node by itself, and keeps the first store that a node has met: after a change of nodes the
ranks would look for each other in different places. Here the launcher whose node comes first opens a store for the round.
"""

import json
import os
import socket
import sys
import threading
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from features.errors import Preempted
from pipeline.torch_compat import clone_of
from pipeline.training.faults.preemption import PREEMPTED
from pipeline.training.faults.rank_status import (
    NODES_WAITING,
    REASON,
    ROUND,
    RankStatus,
    forget_rank_statuses,
    read_rank_statuses,
    steps_taken,
)
from pipeline.training.parallel import rendezvous
from pipeline.training.parallel.contact import ROUNDS, Contact
from pipeline.training.parallel.process_group import node_key

STARTS_IN_VAIN = 5  # in a row: nodes may die while others start, or never reach each other
# Kinds of a reason, the one that explains most first; _LOST: a rank has lost contact with another.
_CAUSE, _LOST, _NONE = range(3)


class Membership(RendezvousHandler):
    """torchrun's rendezvous of one node.

    Args:
        parameters: torchrun's. folder: of the statuses of this node's ranks.
        terminated: set once this launcher has received SIGTERM.
    Attributes:
        elastic: whether the number of nodes may change. contact: with the other launchers; None for a single node.
        joined: whether this node has ever had ranks. patience: seconds after which c10d takes a silent node for lost.
    """

    def __init__(self, parameters: RendezvousParameters, folder: Path, terminated: threading.Event) -> None:
        self.folder, self.terminated = folder, terminated
        self.elastic, self.single = parameters.min_nodes < parameters.max_nodes, parameters.max_nodes == 1
        self.patience = float(parameters.get("keep_alive_interval", 5)) * float(
            parameters.get("keep_alive_max_attempt", 3)
        )
        self.address = parameters.local_addr or socket.getfqdn()
        self.contact: Contact | None = None
        self.joined, self._rejoins, self._reason = False, False, (_NONE, "")
        self._rounds, self._starts_in_vain = -1, 0
        self._failed: dict[int, RankStatus | None] = {}
        self._shared: dist.Store | None = None
        self._server: dist.TCPStore | None = None
        if parameters.backend == "c10d":
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
            backend, self._shared = create_backend(parameters)
            self.contact = Contact(clone_of(self._shared), terminated)
            self._torchs: RendezvousHandler = create_handler(self._shared, backend, parameters)
        else:
            self._torchs = get_rendezvous_handler(parameters)

    def next_rendezvous(self) -> RendezvousInfo:
        """Joins the next round.

        Raises:
            Preempted: the job got SIGTERM, and its ranks have nothing to lose.
        """
        if self.joined and not self.elastic and self.preempted():
            raise Preempted("")
        forget_rank_statuses(self.folder)
        self._rejoins, self._failed = False, {}
        info = self._torchs.next_rendezvous()
        self._rounds += 1
        reason = self._reason[1]
        if self._shared is not None:
            info, self._rounds, reason = self._with_store(info, self._shared)
            if self.contact:
                self.contact.round = self._rounds
        elif self.contact is None and not self.single:
            self.contact = Contact(clone_of(info.store), self.terminated)
        os.environ[ROUND], os.environ[REASON] = str(self._rounds), reason
        self.joined, self._reason = True, (_NONE, "")
        return info

    def _with_store(self, info: RendezvousInfo, shared: dist.Store) -> tuple[RendezvousInfo, int, str]:
        """The same round with a store of its own, its number, and why the one before it has ended."""
        info.store.set(f"taskfuse/node/{info.rank}", json.dumps([*self._reason, socket.gethostname()]))
        self._server = None
        if info.rank == 0:
            nodes = [json.loads(info.store.get(f"taskfuse/node/{node}")) for node in range(info.world_size)]
            self._server = rendezvous.open_store(self.address)
            number = shared.add(ROUNDS, 1) - 1
            for node, (_, _, host) in enumerate(nodes):
                self._server.set(node_key(number, node), host)
            opened = [self.address, self._server.port, number, min(nodes)[1]]
            info.store.set("taskfuse/store", json.dumps(opened))
        host, port, number, reason = json.loads(info.store.get("taskfuse/store"))
        return RendezvousInfo(info.store, info.rank, info.world_size, RendezvousStoreInfo(host, port)), number, reason

    def judge(self, result: RunResult) -> RunResult:
        """What becomes of failed ranks: where nodes come and go, a lost one is no failure of the others, nor a restart.

        Unless STARTS_IN_VAIN in a row have ended so before a step: nodes that do not reach each other would start for ever.
        """
        if result.state not in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            return result
        statuses = {status.pid: status for status in read_rank_statuses(self.folder)}
        self._failed, reasons = {}, []
        for rank, failure in sorted(result.failures.items()):
            status = statuses.get(failure.pid)
            gone = failure.exitcode == PREEMPTED or (status is not None and status.state in ("lost", "preempted"))
            how = f"killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            if status is not None and status.state == "preempted":
                how = f"saved after SIGTERM to {self.contact.ended_by if self.contact and self.contact.ended_by else 'a rank'}"
            text = status.reason if status is not None and status.reason else how
            reasons.append((_LOST if gone else _CAUSE, f"rank {rank} on {socket.gethostname()}: {text}"))
            self._failed[failure.pid] = status
        self._reason = min(reasons, default=(_NONE, ""))
        if not (self.elastic and self._reason[0] == _LOST):
            return result
        self._starts_in_vain += 1
        if self._starts_in_vain < STARTS_IN_VAIN or any(
            status and status.state == "preempted" for status in self._failed.values()
        ):
            self._rejoins = True
            return RunResult(WorkerState.HEALTHY)
        print(
            f"error: {self._starts_in_vain} starts in a row without a step, since ranks lost contact: more count as restarts. "
            "Look whether the nodes reach each other at all ports, and at GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return result

    def preempted(self) -> bool:
        """Whether the ranks that failed last have saved their work, or lost it to another node that got SIGTERM."""
        if not self._failed or self._reason[0] != _LOST:
            return False
        if all(status is None or status.state == "preempted" for status in self._failed.values()):
            return True
        return self.contact is not None and self.contact.wait_for_end()

    def num_nodes_waiting(self) -> int:
        """Nodes that join now: 0 until this node's ranks hold at a checkpoint that all of them have committed.

        torchrun ends its ranks and joins the next round where it is not 0, which it does not count as a restart.
        """
        waiting = self._torchs.num_nodes_waiting()
        flag = self.folder / NODES_WAITING
        if self._starts_in_vain and steps_taken(self.folder):
            self._starts_in_vain = 0
        if self._rejoins:
            return max(waiting, 1)
        if waiting:
            flag.touch()
        else:
            flag.unlink(missing_ok=True)
        # Ranks may hold for a node that has gone since they saw the flag.
        statuses = read_rank_statuses(self.folder)
        if not statuses or [status.state for status in statuses] != ["holding"] * statuses[0].ranks:
            return 0
        self._reason = (
            _CAUSE,
            f"{waiting} more node{'s' if waiting > 1 else ''}" if waiting else "a node came and went",
        )
        return max(waiting, 1)

    @property
    def use_agent_store(self) -> bool:
        """Whether ranks find each other in the launcher's store."""
        return self._shared is not None or self._torchs.use_agent_store

    def get_backend(self) -> str:
        """torchrun's name of it."""
        return self._torchs.get_backend()

    def is_closed(self) -> bool:
        """Whether no more nodes join."""
        return self._torchs.is_closed()

    def set_closed(self) -> None:
        """Lets no more nodes join."""
        self._torchs.set_closed()

    def get_run_id(self) -> str:
        """torchrun's --rdzv-id."""
        return self._torchs.get_run_id()

    def shutdown(self) -> bool:
        """Lets no more nodes join, and leaves."""
        return self._torchs.shutdown()
