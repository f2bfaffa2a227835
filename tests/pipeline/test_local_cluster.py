"""The local backend: real processes under its supervisor, and what is known of them after any end."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_for

from features.errors import UserError
from pipeline.cluster import local
from pipeline.cluster.base import Workload
from pipeline.cluster.local import Local

pytestmark = pytest.mark.integration


def workload(**values: Any) -> Workload:
    """A workload of one process; its job does not matter where `script` stands in for it."""
    content = {"job": "preprocess", "words": [], "name": "job", "nodes": 1, "ranks_per_node": 1, "gpus_per_node": 0}
    limits = {"cpu": "1", "memory": "1Gi", "time_limit_s": 60, "grace_s": 5, "retries": 2}
    return Workload.model_validate({**content, **limits, **values})


@pytest.fixture
def cluster(tmp_path: Path) -> Local:
    return Local(folder=tmp_path / "jobs")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Runs a shell script instead of the job."""

    def instead(text: str) -> None:
        monkeypatch.setattr(local, "_command", lambda _: ["sh", "-c", text])

    return instead


def ended(cluster: Local, work: Workload, native: str) -> str:
    """State and detail once the job is over."""
    wait_for(lambda: cluster.status(work, native).state != "running", "its end")
    found = cluster.status(work, native)
    return f"{found.state}, {found.detail}, {found.restarts} restarts"


def lines(cluster: Local, work: Workload, native: str, rank: int | None = None, follow: bool = False) -> list[str]:
    return list(cluster.logs(work, native, rank, follow))


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("exit 0", "succeeded, exit code 0, 0 restarts"),
        ("exit 2", "failed, exit code 2, 0 restarts"),  # final for this job
        ("exit 9", "failed, exit code 9, 2 restarts"),
        ("kill -9 $$", "failed, exit code 137, 2 restarts"),
        ("test -e mark && exit 0; touch mark; exit 9", "succeeded, exit code 0, 1 restarts"),
        ("for n in 1 2 3 4; do test -e m$n || { touch m$n; exit 75; }; done", "succeeded, exit code 0, 4 restarts"),
    ],
)
def test_failures_are_tried_again_final_codes_are_not_and_preemption_does_not_count(
    text: str, outcome: str, cluster: Local, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script(text)
    work = workload()
    assert ended(cluster, work, cluster.submit(work)) == outcome


def test_a_stopped_job_gets_sigterm_and_is_not_started_again(cluster: Local, script: Any) -> None:
    script("trap 'echo saving; exit 75' TERM; echo ready; while :; do sleep 0.05; done")
    work = workload()
    native = cluster.submit(work)
    wait_for(lambda: lines(cluster, work, native) == ["ready"])
    assert cluster.status(work, native).state == "running"
    cluster.stop(work, native)
    assert ended(cluster, work, native) == "stopped, exit code 75, 0 restarts"
    assert lines(cluster, work, native) == ["ready", "saving"]
    with pytest.raises(UserError, match="has ended: there is nothing to stop"):
        cluster.stop(work, native)


def test_what_ignores_sigterm_is_killed_with_its_children_after_the_grace_time(cluster: Local, script: Any) -> None:
    script("trap '' TERM; sleep 300 & echo $!; wait; while :; do sleep 1; done")
    work = workload(grace_s=1)
    native = cluster.submit(work)
    wait_for(lambda: bool(lines(cluster, work, native)))
    cluster.stop(work, native)
    assert ended(cluster, work, native) == "stopped, exit code 137, 0 restarts"
    child = int(lines(cluster, work, native)[0])
    wait_for(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text())


def test_the_time_limit_ends_a_job_as_if_it_was_preempted(cluster: Local, script: Any) -> None:
    script("trap 'exit 75' TERM; while :; do sleep 0.05; done")
    work = workload(time_limit_s=1)
    native = cluster.submit(work)
    assert ended(cluster, work, native) == "stopped, exit code 75, since time_limit_s was over, 0 restarts"
    assert lines(cluster, work, native) == ["error: time_limit_s is over: ended by SIGTERM"]


def test_a_killed_supervisor_is_a_failure_of_its_job(cluster: Local, script: Any) -> None:
    script("echo ready; sleep 2")
    work = workload()
    native = cluster.submit(work)
    wait_for(lambda: lines(cluster, work, native) == ["ready"])
    os.kill(int(cluster.status(work, native).detail.removeprefix("pid ")), signal.SIGKILL)
    assert ended(cluster, work, native).startswith("failed, ended without an exit code")


def test_a_service_has_no_time_limit(cluster: Local, script: Any) -> None:
    script("sleep 2")
    work = workload(time_limit_s=1, service=True)
    assert ended(cluster, work, cluster.submit(work)) == "succeeded, exit code 0, 0 restarts"


def test_a_job_does_not_outlive_its_killed_supervisor(cluster: Local, script: Any, tmp_path: Path) -> None:
    script(f"trap 'touch {tmp_path}/saved; exit 75' TERM; echo ready; while :; do sleep 0.05; done")
    work = workload()
    native = cluster.submit(work)
    wait_for(lambda: lines(cluster, work, native) == ["ready"])
    os.kill(int(cluster.status(work, native).detail.removeprefix("pid ")), signal.SIGKILL)
    wait_for((tmp_path / "saved").exists)


@pytest.mark.parametrize("signals", ["", "trap '' TERM;"])
def test_what_a_killed_job_leaves_is_ended_with_it(signals: str, cluster: Local, script: Any, tmp_path: Path) -> None:
    rank = f"{signals} echo $$ > {tmp_path}/rank; while :; do sleep 0.05; done"
    script(
        f'setsid sh -c "{rank.replace("$", chr(92) + "$")}" & while ! test -s {tmp_path}/rank; do :; done; kill -9 $$'
    )
    work = workload(retries=0, grace_s=1)
    assert ended(cluster, work, cluster.submit(work)) == "failed, exit code 137, 0 restarts"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "rank").read_text()), 0)


def test_a_job_starts_in_the_folder_of_its_submission_wherever_it_is_submitted_again(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    first = Local(folder=Path("jobs"))
    kept = Local.model_validate(first.model_dump() | first.pinned())
    monkeypatch.chdir(tmp_path)
    script("pwd")
    native = kept.submit(workload())
    assert native == str(tmp_path / "there" / "jobs" / "job")
    assert ended(kept, workload(), native).startswith("succeeded")
    assert lines(kept, workload(), native) == [str(tmp_path / "there")]
    assert kept.of_job(Path("run")) == tmp_path / "there" / "run"


def test_logs_follow_to_the_end_and_can_be_those_of_one_rank(cluster: Local, script: Any) -> None:
    said = ["12:00:00  rank 0  step 1", "12:00:00  rank 1  step 1", "error (rank 1): lost", "12:00:01  rank 11  step 2"]
    script("sleep 0.5; " + "; ".join(f"echo '{line}'" for line in said) + "; printf 'last\\tline'")
    work = workload()
    native = cluster.submit(work)
    assert lines(cluster, work, native, follow=True) == [*said, "last line"]
    assert lines(cluster, work, native, rank=1) == [said[1], said[2]]


def test_control_characters_of_a_log_do_not_reach_the_terminal(cluster: Local, script: Any) -> None:
    script(r"printf 'a\033[31mb\n'")
    work = workload()
    native = cluster.submit(work)
    assert lines(cluster, work, native, follow=True) == ["a\\x1b[31mb"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"job": "train", "nodes": 2}, "nodes is 2, and this machine is one"),
        ({"after": ["1"]}, "after needs a scheduler"),
        ({"schedule": "0 3 * * *"}, "schedule needs a scheduler"),
        ({"suspend": True}, "suspend needs a scheduler"),
        ({"array": [["date=2026-11-01"]]}, "array needs a scheduler"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_and_leaves_nothing(
    values: dict[str, Any], said: str, cluster: Local
) -> None:
    with pytest.raises(UserError, match=said):
        cluster.submit(workload(**values))
    assert not (cluster.folder or Path()).exists()


def test_an_elastic_training_takes_the_one_node_that_there_is(cluster: Local) -> None:
    text = cluster.render(workload(job="train", words=["run=R"], nodes="1..4", ranks_per_node=2))
    launcher = ["-m", "jobs.launch", "--nnodes=1", "--nproc-per-node=2", "--max-restarts=2"]
    assert text.split()[1:] == [*launcher, "-m", "jobs.train", "run=R"]


def test_a_dry_run_is_what_a_shell_runs(cluster: Local) -> None:
    cluster = cluster.model_copy(update={"environment": {"NCCL_DEBUG": "IN FO"}})
    words = ["out=a b", "source='$(touch x)'"]
    echo = "import os, sys; print([os.environ['NCCL_DEBUG'], *sys.argv[1:]])"
    text = cluster.render(workload(words=words)).replace("-m jobs.preprocess", f'-c "{echo}"')
    done = subprocess.run(["sh", "-c", text], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(["IN FO", *words])


def test_a_real_job_that_refuses_its_settings_is_not_tried_again(cluster: Local) -> None:
    work = workload(words=["data=demo", "input=/nowhere", "out=/nowhere/out"])
    native = cluster.submit(work)
    assert ended(cluster, work, native) == "failed, exit code 1, 0 restarts"
    assert [line for line in lines(cluster, work, native) if line.startswith("error: ")]


def test_the_supervisor_runs_with_the_python_that_submits() -> None:
    assert Local().render(workload()).startswith(sys.executable)
