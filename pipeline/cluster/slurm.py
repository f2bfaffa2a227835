"""Slurm: a batch script for sbatch, and what squeue and the script's own files say of it."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError, field_validator

from features.errors import UserError, fault_text
from features.printable import has_controls, printable
from pipeline.cluster.base import ENDED, Cluster, State, Status, UnansweredError, Workload, command
from pipeline.cluster.slurm_script import LAUNCHER, LOG_LINE, batch_script, node_command
from pipeline.cluster.values import (
    OneLine,
    SlurmFeatures,
    SlurmFolder,
    SlurmGpus,
    SlurmNames,
    mebibytes,
    whole_cpus,
)

TIMEOUT_S = 60  # of one command of Slurm
POLL_S = 1.0  # between two looks at a log, or at a job that is to end
SILENT = 60  # answers of squeue in a row that a log which is followed does without
AGAIN_S = (
    5.0  # between two SIGTERM to a job that is to end: its script passes the first one on, but may not be there yet
)
WARNING_S = 60  # by which Slurm's signal before the time limit may come early
NATIVE = r"[1-9][0-9]*"
# Slurm's states of a job to those of a submission; all others are failures.
STATES: dict[str, State] = {
    **dict.fromkeys(["PENDING", "REQUEUED", "REQUEUE_FED", "CONFIGURING", "RESV_DEL_HOLD"], "pending"),
    **dict.fromkeys(["RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT"], "running"),
    **dict.fromkeys(["SUSPENDED", "STOPPED", "REQUEUE_HOLD", "SPECIAL_EXIT"], "suspended"),
    **dict.fromkeys(["CANCELLED", "PREEMPTED", "REVOKED"], "stopped"),
    "COMPLETED": "succeeded",
}
SUSPENDED_REASONS = ("JobHeldUser", "JobHeldAdmin")
# Of several elements of an array, which one's state is that of the whole.
FIRST: tuple[State, ...] = ("running", "pending", "suspended", "failed", "stopped", "succeeded")


class _Record(NamedTuple):
    """What a script has written: its state, exit code (`-` while it runs), and how often it was requeued."""

    state: str
    code: str
    restarts: int


class _Queued(NamedTuple):
    """A job as squeue lists it."""

    state: str
    reason: str
    nodes: str


class Slurm(Cluster):
    """A Slurm cluster whose nodes share a file system with the machine that submits; sbatch, squeue and scancel run here.

    Attributes:
        partition, account, qos, constraint, reservation, exclusive: sbatch's options of these names.
        gres: how a GPU is asked for, as gpu:h100; None: by --gpus-per-node.
        before: lines of shell that the script runs first, such as `module load cuda`.
        python: the interpreter on the nodes; None: that of this process.
        container: words before it on each node, such as [apptainer, exec, --nv, IMAGE].
        folder: working directory of jobs there; None: that of the submission.
        log_folder: of logs and exit codes, which nodes write; relative to `folder`.
        ports: least and greatest port that several nodes meet at.
    """

    partition: SlurmNames | None = None
    account: SlurmNames | None = None
    qos: SlurmNames | None = None
    constraint: SlurmFeatures | None = None
    reservation: SlurmNames | None = None
    exclusive: bool = False
    gres: SlurmGpus | None = None
    before: tuple[OneLine, ...] = ()
    python: OneLine | None = None
    container: tuple[OneLine, ...] = ()
    folder: SlurmFolder | None = None
    log_folder: SlurmFolder = "runs/slurm"
    ports: tuple[int, int] = Field((20000, 29999))

    @field_validator("ports")
    @classmethod
    def _in_order(cls, ports: tuple[int, int]) -> tuple[int, int]:
        if not 1024 <= ports[0] <= ports[1] <= 65535:
            raise ValueError(f"{list(ports)} is not a least and a greatest port from 1024 to 65535")
        return ports

    @field_validator("environment")
    @classmethod
    def _of_one_line(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            if has_controls(value):
                raise ValueError(f"{name} has line breaks or other control characters, or is not UTF-8")
        return environment

    def pinned(self) -> dict[str, Any]:
        """The folder of this process, which a later one asks for the job's files."""
        return {"folder": str(self._folder())}

    def of_job(self, path: Path) -> Path:
        """A path on a job's command line, absolute."""
        return self._folder() / path

    def render(self, work: Workload) -> str:
        """The batch script. Raises UserError where Slurm has no such thing, or the time limit is too short."""
        if work.schedule:
            raise UserError(
                f"schedule={work.schedule}: cluster=slurm starts jobs once. Have cron, or scrontab, start this submission "
                "without schedule="
            )
        if work.time_limit_s <= work.grace_s + WARNING_S:
            raise UserError(
                f"time_limit_s={work.time_limit_s}: Slurm would end the job at once, since it has grace_s={work.grace_s} s, "
                f"and up to {WARNING_S} s more, to save. Raise time_limit_s above {work.grace_s + WARNING_S}"
            )
        for native in work.after:
            if not re.fullmatch(NATIVE, native):
                raise UserError(f"after: {native!r} is not the number of a job in Slurm")
        config_dir = str(work.config_dir.resolve()) if work.config_dir else None
        words = [*self.container, *command(work, self.python or sys.executable, config_dir=config_dir)]
        return batch_script(
            work,
            self._options(work),
            node_command(work, words),
            before=self.before,
            environment=self.environment,
            log=str(self._logs() / work.name),
            cpus=whole_cpus(work.cpu),
            ports=self.ports,
        )

    def submit(self, work: Workload) -> str:
        """Hands the script to sbatch. Returns the job's number, of all elements where it is an array."""
        script = self.render(work)
        logs = self.seen_here(self._logs())
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{logs}: {error.strerror}. Set cluster.log_folder to a folder that nodes can write"
            ) from None
        printed = _slurm("sbatch", "--parsable", text=script)
        # A site's wrapper may print more before it.
        if not (found := re.search(rf"^({NATIVE})(;\S*)?$", printed, re.MULTILINE)):
            raise UserError(
                f"sbatch printed no number of a job but {printable(printed[:300])!r}: squeue --me shows whether it is queued"
            )
        return found[1]

    def status(self, work: Workload, native: str) -> Status:
        """State from squeue; of a job that has left it, from what its script wrote, without need of an accounting database."""
        queue = _queue(native)
        found = [
            _element_status(queue.get(element), self._record(work, element)) for element in _elements(work, native)
        ]
        if len(found) == 1:
            return found[0]
        counts = Counter(status.state for status in found)
        state = next(name for name in FIRST if counts[name])
        detail = f"of {len(found)}: " + ", ".join(f"{counts[name]} {name}" for name in FIRST if counts[name])
        if bad := [f"{index}: {status.detail}" for index, status in enumerate(found) if status.state == "failed"]:
            detail += f"; {bad[0]}"
        return Status(state, detail, sum(status.restarts or 0 for status in found))

    def logs(self, work: Workload, native: str, rank: int | None, follow: bool) -> Iterator[str]:
        """Lines as `rank 3: …` of a rank, `node 0: …` of a launcher, `batch: …` of the script and Slurm.

        Those of an array begin with the element's number, as `2/rank 3: …`.

        Raises:
            UserError: there is no log yet, and `follow` does not wait for one.
        """
        logs = {
            self._file(work, element, "log"): f"{index}/" if work.array else ""
            for index, element in enumerate(_elements(work, native))
        }
        if not (follow or any(log.is_file() for log in logs)):
            status = self.status(work, native)
            raise UserError(f"{next(iter(logs))}: no log yet: the job is {status.state}, {status.detail}")
        launched = LAUNCHER in command(work, self.python or sys.executable)
        read = dict.fromkeys(logs, 0)
        ended, silent = False, 0
        while not ended:
            try:
                ended, silent = not follow or self.status(work, native).state in ENDED, 0
            except UserError:  # its log goes on meanwhile
                silent += 1
                if silent > SILENT:
                    raise
            for log, element in logs.items():
                lines, read[log] = _lines(log, read[log], whole=not ended)
                yield from filter(None, (_named(line, element, rank, launched) for line in lines))
            if not ended:
                time.sleep(POLL_S)

    def stop(self, work: Workload, native: str) -> None:
        """Keeps the job from being requeued, sends SIGTERM to its processes, and cancels it after `grace_s`.

        Raises:
            UserError: it has ended already.
        """
        status = self.status(work, native)
        if status.state in ENDED:
            raise UserError(f"{work.name} (Slurm job {native}) has ended: {status.state}, {status.detail}")
        _slurm("scontrol", "update", f"JobId={native}", "Requeue=0", check=not work.array)  # ended elements are refused
        deadline, again = time.monotonic() + work.grace_s, 0.0
        while self.status(work, native).state not in ENDED and time.monotonic() < deadline:
            if time.monotonic() >= again:
                again = time.monotonic() + AGAIN_S
                _slurm("scancel", "--quiet", "--state=PENDING", native, check=False)
                # Before its script listens, a signal would end it as if it had failed.
                if begun := [one for one in _elements(work, native) if self._is_begun(work, one)]:
                    _slurm("scancel", "--quiet", "--batch", "--state=RUNNING", "--signal=TERM", *begun, check=False)
            time.sleep(POLL_S)
        if self.status(work, native).state not in ENDED:
            _slurm("scancel", "--quiet", native)

    def _folder(self) -> Path:
        folder = str(Path(self.folder or ".").absolute())
        try:
            return Path(TypeAdapter(SlurmFolder).validate_python(folder))
        except ValidationError as error:
            raise UserError(f"the working directory {fault_text(error.errors()[0])}: set cluster.folder") from None

    def _logs(self) -> Path:
        """The log folder as nodes see it."""
        return self._folder() / self.log_folder

    def _file(self, work: Workload, element: str, kind: str) -> Path:
        return self.seen_here(self._logs()) / f"{work.name}-{element}.{kind}"

    def _record(self, work: Workload, element: str) -> _Record | None:
        """What the script of a job, or of an element of an array, has written last."""
        try:
            state, code, restarts = self._file(work, element, "state").read_text().split()
            return _Record(state, code, int(restarts))
        except (OSError, ValueError):
            return None

    def _is_begun(self, work: Workload, element: str) -> bool:
        record = self._record(work, element)
        return record is not None and record.state == "running"

    def _options(self, work: Workload) -> list[str]:
        """sbatch's. Their order is theirs in the script."""
        element = "%A_%a" if work.array else "%j"
        least, most = work.nodes
        gpus = f"gres={self.gres}:{{}}" if self.gres else "gpus-per-node={}"
        options = {
            "job-name": work.name,
            "chdir": self._folder(),
            "output": self._logs() / f"{work.name}-{element}.log",
            "open-mode": "append",
            "nodes": most if least == most else f"{least}-{most}",
            "cpus-per-task": whole_cpus(work.cpu),
            "mem": f"{mebibytes(work.memory)}M",
            "time": -(-work.time_limit_s // 60),
            "signal": f"B:TERM@{max(work.grace_s, 1)}",
            "export": "NIL",  # none of what the submitting shell has in its environment
            "propagate": "NONE",  # nor its limits: a login node's would keep NCCL from locking memory
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "reservation": self.reservation,
            "array": f"0-{len(work.array) - 1}" if work.array else None,
            "dependency": ":".join(["afterok", *work.after]) if work.after else None,
        }
        flags = {
            "requeue": True,
            gpus.format(work.gpus_per_node): work.gpus_per_node > 0,
            "exclusive": self.exclusive,
            "no-kill": least < most,
            "kill-on-invalid-dep=yes": bool(work.after),
            "hold": work.suspend,
        }
        return [f"--{name}={value}" for name, value in options.items() if value is not None] + [
            f"--{flag}" for flag, given in flags.items() if given
        ]


def _elements(work: Workload, native: str) -> list[str]:
    return [f"{native}_{index}" for index in range(len(work.array))] or [native]


def _element_status(queued: _Queued | None, record: _Record | None) -> Status:
    """Of a job, or of one element of an array.

    Args:
        queued: as squeue lists it; None: Slurm has forgotten it, or never had it. record: of its script; None: it never began.
    """
    restarts = record.restarts if record else 0
    code = f"exit code {record.code}" if record else ""
    if queued is None:
        if record is None:
            return Status("stopped", "left the queue before it began: cancelled, or a job that it waits for failed", 0)
        if record.state in ENDED:
            return Status(record.state, code, restarts)
        if record.state == "requeued":
            return Status("stopped", "left the queue while it waited to run again: cancelled", restarts)
        return Status("failed", "left the queue without an exit code: killed, or its node was lost", restarts)
    state = STATES.get(queued.state, "failed")
    if state == "pending":
        suspended = queued.reason in SUSPENDED_REASONS
        return Status("suspended" if suspended else state, f"{queued.state}: {queued.reason}", restarts)
    if state not in ENDED:
        return Status(state, f"{queued.state} on {queued.nodes}", restarts)
    if record and record.state in ENDED:  # Slurm knows no stopped job that saved its work
        return Status(record.state, code, restarts)
    return Status(state, f"{queued.state}: {queued.reason}", restarts)


def _queue(native: str) -> dict[str, _Queued]:
    """The elements of a job that Slurm still knows: some minutes beyond their end, as MinJobAge says."""
    words = ["--noheader", "--array", "--states=all", f"--jobs={native}", "--format=%i|%T|%r|%N"]
    try:
        listed = _slurm("squeue", *words)
    except UserError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    lines = [line.strip().split("|") for line in listed.splitlines()]
    found = {line[0]: _Queued(*line[1:]) for line in lines if len(line) == 4}
    if lines and not found:
        raise UserError(f"squeue: not what was asked for: {printable(listed[:300])!r}")
    return found


def _lines(log: Path, start: int, whole: bool) -> tuple[list[str], int]:
    """The lines of a log from a byte on, and where to read on. whole: leave an unfinished one for later."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return [], start
    if whole:
        content = content[: content.rfind(b"\n") + 1]
    lines = content.decode(errors="replace").split("\n")
    return lines[:-1] if lines[-1] == "" else lines, start + len(content)


def _named(line: str, element: str, rank: int | None, launched: bool) -> str | None:
    """A line of a log after the name of its process; None where it is not of `rank`."""
    found = LOG_LINE.fullmatch(line)
    name, text, of = "batch", line, None
    if found:
        of = int(found["rank"]) if found["rank"] else None if launched else 0
        name, text = f"node {found['node']}" if of is None else f"rank {of}", found["text"]
    if rank is not None and of != rank:
        return None
    return f"{element}{name}: {printable(text.replace(chr(9), ' '))}"


def _slurm(*words: str, text: str = "", check: bool = True) -> str:
    """What a command of Slurm prints.

    Args:
        text: its input. check: whether it must succeed.
    Raises:
        UserError: it is not installed here, or failed, with what it said.
    """
    # The submitter's SBATCH_EXPORT, SBATCH_PARTITION and their like would go before the options in the script.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SBATCH_")}
    try:
        done = subprocess.run(
            words,
            input=text,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not installed here: run this on a login node of the Slurm cluster") from None
    except subprocess.TimeoutExpired:
        silent = f"{words[0]}: no answer from Slurm within {TIMEOUT_S} s"
        if words[0] == "sbatch":
            raise UnansweredError(f"{silent}: squeue --me shows whether the job is queued all the same") from None
        raise UserError(silent) from None
    if check and done.returncode:
        said = " ".join(done.stderr.replace(f"{words[0]}: error: ", "").split())
        raise UserError(f"{words[0]}: {printable(said[:300]) or f'exit code {done.returncode}'}")
    return done.stdout
