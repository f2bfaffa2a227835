"""jobs.launch around two small jobs: who is told to end when, and what it exits with."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from pipeline.training.faults.preemption import PREEMPTED
from pipeline.training.faults.rank_status import STATUS_FOLDER, RankStatus, read_rank_statuses
from pipeline.training.parallel.exit_codes import after_failure, after_signal

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
START = """
import os, signal, sys, time
from pathlib import Path

HERE = Path(__file__).parent
RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def say(word):
    (HERE / f"{word}-{ATTEMPT}-{RANK}").write_text(str(os.getpid()))


def wait_for(condition):
    while not condition():
        time.sleep(0.02)

"""
JOB = """
from features.errors import Preempted, UserError
from jobs.entry import job

told = []


def listen():
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))


@job("train")
def main(config):
"""


def start(folder: Path, body: str, *flags: str, before: str = "") -> subprocess.Popen[str]:
    """A job with this body on two ranks under jobs.launch. before: what its script does before it imports the job."""
    script = folder / "script.py"
    script.write_text(
        START + textwrap.dedent(before) + JOB + textwrap.indent(textwrap.dedent(body), "    ") + "\nmain()\n"
    )
    command = [sys.executable, "-m", "jobs.launch", "--nproc-per-node=2", *flags, str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", None)
    return subprocess.Popen(
        [*command, "dataset=D", "run=R", "hydra.run.dir=."],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(launcher: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def end_of(launcher: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit code and the lines on stderr that are not of torchrun's log."""
    _, said = launcher.communicate(timeout=60)
    print(said)
    return launcher.returncode, [
        line for line in said.splitlines() if " torch/" not in line and "torch/distributed" not in line
    ]


def test_a_launcher_leaves_nothing_in_the_temporary_folder(tmp_path: Path) -> None:
    for code in (0, 3):
        script = tmp_path / "job.py"
        script.write_text(f"raise SystemExit({code})")
        (tmp_path / "tmp").mkdir(exist_ok=True)
        command = [sys.executable, "-m", "jobs.launch", "--nproc-per-node=1", str(script)]
        environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
        subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, timeout=60)
        left = [
            path.name for path in (tmp_path / "tmp").iterdir() if not path.name.startswith("torchinductor")
        ]  # a cache
        assert left == []


def test_where_one_rank_alone_is_told_to_end_the_launcher_says_75_and_no_more(tmp_path: Path) -> None:
    body = """
        listen()
        if RANK == 0:
            (HERE / "limit").write_text(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
        say("training")
        wait_for(lambda: told or (HERE / "saved").exists())
        (HERE / "saved").touch()
        raise Preempted("step-9 is written")
    """
    launcher = start(tmp_path, body, "--max-restarts=1")  # which it has no use for
    wait_for(launcher, lambda: len(list(tmp_path.glob("training-0-*"))) == 2)
    wait_for(launcher, lambda: bool((tmp_path / "training-0-1").read_text()))
    os.kill(int((tmp_path / "training-0-1").read_text()), signal.SIGTERM)
    assert end_of(launcher) == (PREEMPTED, ["step-9 is written"])
    assert int((tmp_path / "limit").read_text()) == 600


def test_what_ranks_noted_before_a_restart_does_not_excuse_a_failure_after_it(tmp_path: Path) -> None:
    body = """
        if ATTEMPT == 0:
            say("training")
            wait_for(lambda: len(list(HERE.glob("training-0-*"))) == 2)
            if RANK == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # ended by the launcher, it is preempted
        listen()
        say("training")
        wait_for(lambda: told)
        raise UserError("no room: make some") if RANK == 0 else Preempted("step-9 is written")
    """
    launcher = start(tmp_path, body, "--max-restarts=1")
    wait_for(launcher, lambda: len(list(tmp_path.glob("training-1-*"))) == 2)
    launcher.terminate()
    code, said = end_of(launcher)
    assert code == 1
    assert "error: no room: make some" in said
    assert said[-1].startswith("error: ended by SIGTERM before all ranks had written a checkpoint")


def test_a_job_that_is_told_to_end_while_one_rank_starts_and_one_still_imports_has_lost_nothing(tmp_path: Path) -> None:
    before = """
        if RANK == 1:
            say("importing")
            time.sleep(60)
    """
    launcher = start(tmp_path, 'say("starting")\ntime.sleep(60)', before=before)
    wait_for(launcher, lambda: (tmp_path / "importing-0-1").exists() and (tmp_path / "starting-0-0").exists())
    launcher.terminate()
    code, said = end_of(launcher)
    assert code == PREEMPTED
    assert said == ["SIGTERM outside of training: nothing is lost. Rerun the same command to start or resume."]


def test_a_job_that_is_told_to_end_in_its_last_step_is_done(tmp_path: Path) -> None:
    launcher = start(tmp_path, 'listen()\nsay("training")\nwait_for(lambda: told)\ntime.sleep(0.2 * RANK)')
    wait_for(launcher, lambda: len(list(tmp_path.glob("training-0-*"))) == 2)
    launcher.terminate()
    assert end_of(launcher) == (0, [])


@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_a_launcher_that_waits_for_another_machine_and_is_told_to_end_has_lost_nothing(
    backend: str, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = start(tmp_path, "pass", "--nnodes=2", f"--rdzv-backend={backend}", f"--rdzv-endpoint=localhost:{port}")

    def listens() -> bool:
        with socket.socket() as other:
            return other.connect_ex(("localhost", port)) == 0

    wait_for(launcher, listens)
    time.sleep(0.5)  # after this the static one waits in C
    launcher.terminate()
    code, said = end_of(launcher)
    assert (code, len(said)) == (PREEMPTED, 1 if backend == "c10d" else 0)  # a warning


def test_a_node_that_waits_to_join_as_the_run_ends_has_nothing_to_do(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ("--nnodes=1:2", f"--rdzv-endpoint=localhost:{port}", "--rdzv-conf=last_call_timeout=1")
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    body = "from pipeline.training.faults.rank_status import nodes_wait\nsay('runs')\nwait_for(nodes_wait)"
    first = start(folders[0], body, *words)
    wait_for(first, (folders[0] / "runs-0-0").exists)
    second = start(folders[1], body, *words)
    assert end_of(first)[0] == 0
    code, said = end_of(second)
    assert (code, said[1:]) == (0, ["note: the job has ended on the other nodes: nothing is left to do here"])


def test_an_error_of_one_line_stays_one_line(tmp_path: Path) -> None:
    launcher = start(tmp_path, 'raise UserError("no such dataset: say another")')
    assert end_of(launcher) == (1, ["error: no such dataset: say another"])


def failure(rank: int, code: int) -> ProcessFailure:
    return ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=code, error_file="none")


def test_ranks_that_were_killed_are_named_in_one_line() -> None:
    statuses = [RankStatus("started", 0, 100, 2), RankStatus("preempted", 0, 101, 2)]
    said = after_failure({8: failure(0, -signal.SIGKILL), 9: failure(1, PREEMPTED)}, statuses)
    assert str(said).startswith("error: killed: rank 8 by SIGKILL. ")
    assert after_failure({8: failure(0, 1), 9: failure(1, -signal.SIGTERM)}, []) == 1
    assert after_failure({8: failure(0, -signal.SIGTERM), 9: failure(1, -signal.SIGTERM)}, []) == PREEMPTED
    # A rank that crashes once its checkpoint is written has kept its work.
    assert after_failure({9: failure(1, -signal.SIGSEGV)}, statuses) == PREEMPTED


@pytest.mark.parametrize(
    ("states", "code"),
    [
        ((), PREEMPTED),
        (("preempted", "preempted"), PREEMPTED),
        (("finished", "preempted"), PREEMPTED),
        (("finished",), PREEMPTED),
        (("finished", "finished"), 0),
    ],
)
def test_a_launcher_that_was_told_to_end_says_0_only_if_all_its_ranks_are_done(states: tuple, code: int) -> None:
    statuses = [RankStatus(state, 3, 100 + rank, 2) for rank, state in enumerate(states)]
    assert after_signal("SIGTERM", statuses) == code


def test_a_single_rank_that_is_stopped_is_killed_by_its_launcher_and_started_again(tmp_path: Path) -> None:
    body = """
        from pipeline.training.faults.hang_watch import HangWatch

        watch = HangWatch(None, 0, 1, 2.0)
        watch.enter(7, "step")
        time.sleep(1)  # a heartbeat of step 7
        say("training")
        if ATTEMPT == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        watch.stop()
    """
    launcher = start(tmp_path, body, "--nproc-per-node=1", "--max-restarts=1")
    code, said = end_of(launcher)
    assert code == 0
    [line] = [line for line in said if "no heartbeat" in line]
    assert line.startswith(f"error: pid {(tmp_path / 'training-0-0').read_text()}, at step 7: no heartbeat for ")
    assert (tmp_path / "training-1-0").exists()


def test_a_rank_that_is_preempted_while_the_other_waits_in_start_up_does_not_leave_it_to_sigkill(
    tmp_path: Path,
) -> None:
    body = """
        import torch.distributed as dist
        from pipeline.training.faults.preemption import exiting_at_start

        with exiting_at_start(RANK == 0):
            say("starting")
            if RANK == 1:
                time.sleep(60)
            store = dist.TCPStore("localhost", 0, is_master=True)
            store.get("nobody-sets-this")  # waits in C for 300 s
    """
    launcher = start(tmp_path, body)
    wait_for(launcher, lambda: len(list(tmp_path.glob("starting-0-*"))) == 2)
    wait_for(launcher, lambda: bool((tmp_path / "starting-0-1").read_text()))
    begin = time.monotonic()
    os.kill(int((tmp_path / "starting-0-1").read_text()), signal.SIGTERM)
    code, _ = end_of(launcher)
    assert code == PREEMPTED
    assert time.monotonic() - begin < 25  # torchrun would wait 30 s before it kills


def test_a_rank_that_has_failed_is_ended_by_its_launcher_without_becoming_a_preempted_one(tmp_path: Path) -> None:
    """It waits for rank 0 to print its error; a handler's exit would run while Python ends, with a traceback or an abort."""
    script = "import signal; from features.errors import UserError; from jobs import entry\n"
    script += "signal.signal(signal.SIGTERM, entry.sigterm_handler('train'))\n"
    script += "with entry.user_errors(): raise UserError('no room')\n"
    rank = {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0"}
    environment = os.environ | rank | {STATUS_FOLDER: str(tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "1").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    _, printed = process.communicate(timeout=60)
    assert (process.returncode, printed) == (-signal.SIGTERM, "")
    [status] = read_rank_statuses(tmp_path)
    assert (status.state, status.reason) == ("failed", "no room")


def test_a_rank_that_lost_another_ends_in_one_line_while_a_thread_waits_for_that_one_in_cpp() -> None:
    """As a checkpoint's may: a thread that comes back from C++ while Python ends would abort the process."""
    script = """
import threading, time
from contextlib import suppress
from datetime import timedelta
import torch.distributed as dist
from features.errors import OtherRankError
from jobs.entry import user_errors

class EndsSlowly:
    def __del__(self, sleep=time.sleep):
        sleep(1)

def wait():
    with suppress(dist.DistStoreError):
        store.wait(["never"], timedelta(seconds=0.5))

kept = EndsSlowly()
store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
threading.Thread(target=wait, daemon=True).start()
with user_errors():
    raise OtherRankError("step 9: lost contact")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "error: step 9: lost contact\n")


def test_sigterm_within_a_destructor_after_training_is_75_without_a_traceback() -> None:
    """An exception would be lost there, and printed: the process would go on."""
    script = """
import os, signal, time
from jobs.entry import sigterm_handler
signal.signal(signal.SIGTERM, sigterm_handler("train"))
class Shard:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
shard = Shard()
del shard
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    said = "SIGTERM outside of training: nothing is lost. Rerun the same command to start or resume.\n"
    assert (done.returncode, done.stderr) == (PREEMPTED, said)
