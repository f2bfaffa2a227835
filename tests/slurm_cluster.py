"""A Slurm of two nodes with one CPU each on this machine: a controller, two daemons, and munge, in a folder of their own."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from waiting import wait_for

PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol"]
NODES = ["n1", "n2"]
START_S = 30
# No accounting, no cgroups, no RequeueExit: the least that a site has. KillWait is the time to save of a plain scancel;
# credentials that expire soon let requeued jobs begin soon. Jobs of `high` preempt those of `low`.
CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
SlurmctldTimeout=30
SlurmdTimeout=5
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 MaxTime=INFINITE State=UP
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


class SlurmLab:
    """A Slurm that runs. Its commands find it by the variable SLURM_CONF.

    Attributes:
        conf: its slurm.conf. daemons: by node. controller: slurmctld.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.controller: subprocess.Popen[bytes] | None = None

    def start(self, *words: str) -> "subprocess.Popen[bytes]":
        """Starts one of its programs, which stays in the foreground, in a session of its own."""
        with (self.folder / "output.log").open("ab") as log:
            return subprocess.Popen(
                words, env={**os.environ, "SLURM_CONF": str(self.conf)}, cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def start_controller(self) -> None:
        """Starts slurmctld without any memory of jobs, as a site's has none of those that ended MinJobAge ago."""
        if self.controller:
            self.controller.kill()
            self.controller.wait()
        self.controller = self.start("slurmctld", "-D", "-c", "-f", str(self.conf))

    def start_node(self, node: str) -> None:
        """Starts a node's daemon."""
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self.daemons[node] = self.start("slurmd", "-D", "-f", str(self.conf), "-N", node)

    def kill_node(self, node: str) -> None:
        """Kills the daemon of a node and every process of a job there, as a power cut does."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        tasks = self._processes(f"SLURMD_NODENAME={node}")
        for pid in [*{parent for task in tasks if (parent := _step_daemon(task))}, *tasks]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def ask(self, *words: str) -> str:
        """What a command of Slurm prints."""
        environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        return subprocess.run(words, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout

    def is_idle(self) -> bool:
        """Whether all nodes are up and none runs a job."""
        with suppress(subprocess.CalledProcessError):
            return self.ask("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T").split() == ["idle"] * 2
        return False

    def end(self) -> None:
        """Kills all processes of jobs that are left."""
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _processes(self, *variables: str) -> list[int]:
        """Those of this Slurm's jobs that have these variables; the daemons have none of a node's."""
        wanted = {f"SLURM_CONF={self.conf}".encode(), *(variable.encode() for variable in variables)}
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if wanted <= set((process / "environ").read_bytes().split(b"\0")):
                    found.append(int(process.name))
        return [pid for pid in found if pid != os.getpid()]


@contextmanager
def slurm_lab(*lines: str) -> Iterator[SlurmLab]:
    """A Slurm that is up, in a folder whose path has no white space; everything of it is killed at the end.

    Args:
        lines: of slurm.conf, beyond those that every site has.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-lab-"))
    lab = SlurmLab(folder)
    lab.conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, ports=_free_ports(3)) + "\n".join(lines))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (folder / "state").mkdir()
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        files = {
            "key-file": key,
            "socket": "munge.socket",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "seed",
        }
        daemons += [
            lab.start("munged", "--foreground", "--force", *(f"--{n}={folder / str(f)}" for n, f in files.items()))
        ]
        wait_for(lambda: (folder / "munge.socket").exists(), "munged")
        lab.start_controller()
        for node in NODES:
            lab.start_node(node)
        wait_for(lab.is_idle, "two idle nodes", START_S)
        yield lab
    finally:
        for daemon in filter(None, [*daemons, lab.controller, *lab.daemons.values()]):
            daemon.kill()
            daemon.wait()
        lab.end()
        shutil.rmtree(folder, ignore_errors=True)


def require_slurm() -> None:
    """Skips the test where this machine has no Slurm to start; in CI that is a failure."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    reason = (
        f"Slurm: {', '.join(missing)} not installed" if missing else "Slurm needs root here" if os.geteuid() else ""
    )
    if reason and "CI" in os.environ:
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def _step_daemon(task: int) -> int | None:
    """The daemon that started a process of a job, and would report its end."""
    with suppress(OSError):
        parent = int(Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()[1])
        if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"slurmstepd"):
            return parent
    return None


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [found.getsockname()[1] for found in sockets]
