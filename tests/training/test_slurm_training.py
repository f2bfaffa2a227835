"""Runs on a Slurm of two nodes: stopped, preempted, and left by a node. Nothing is lost."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmLab, require_slurm, slurm_lab
from tiny_training import PATHS, assert_close, assert_identical, last, make_dataset, torchrun
from waiting import wait_for

from pipeline.cluster.base import ENDED, Workload
from pipeline.cluster.slurm import Slurm
from pipeline.run import checkpoint

pytestmark = pytest.mark.system

STEPS = 300


@pytest.fixture(scope="module")
def lab() -> Iterator[SlurmLab]:
    require_slurm()
    with slurm_lab("RequeueExit=75") as lab, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(lab.conf))
        yield lab


@pytest.fixture(scope="module")
def slurm(lab: SlurmLab) -> Slurm:
    return Slurm(backend="slurm", folder=str(lab.folder), environment={"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def undisturbed(lab: SlurmLab) -> Path:
    """A run of two ranks on this machine, without Slurm."""
    make_dataset(lab.folder / "data")
    assert torchrun("-m", "jobs.train", *words(lab, "undisturbed")).returncode == 0
    return lab.folder / "undisturbed"


def words(lab: SlurmLab, run: str) -> list[str]:
    settings = {"batch_size": 32, "lanes": 4, "window": 24, "epochs": 100, "max_steps": STEPS, "checkpoint_every": 50}
    settings |= {"seed": 5, "log_every": 5, "threads": 1}
    train = [f"train.{name}={value}" for name, value in settings.items()]
    return [f"dataset={lab.folder}/data", "model=mmoe", f"run={lab.folder / run}", *train]


def workload(lab: SlurmLab, name: str, **changes: Any) -> Workload:
    given = {"nodes": 2, "cpu": "1", "memory": "1Gi", "time_limit_s": 600, "grace_s": 60, "retries": 3}
    fixed: dict[str, Any] = {"job": "train", "words": words(lab, name), "ranks_per_node": 1, "gpus_per_node": 0}
    return Workload(name=name, **fixed, **given | changes)


def logged_step(run: Path) -> int:
    """The newest step in the metrics of a run."""
    file = run / "metrics" / "train.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(run: Path, step: int) -> None:
    wait_for(lambda: logged_step(run) >= step, f"step {step}")


def end_of(slurm: Slurm, work: Workload, native: str) -> tuple[Any, ...]:
    wait_for(lambda: slurm.status(work, native).state in ENDED, f"end of {work.name}", 180)
    print(*slurm.logs(work, native, None, follow=False), sep="\n")
    return slurm.status(work, native)


def test_a_run_that_is_stopped_submitted_again_and_preempted_ends_as_if_nothing_had_happened(
    lab: SlurmLab, slurm: Slurm, undisturbed: Path
) -> None:
    run, work = lab.folder / "disturbed", workload(lab, "disturbed")
    first = slurm.submit(work)
    wait_for_step(run, 20)
    assert slurm.status(work, first) == ("running", "RUNNING on n[1-2]", 0)
    slurm.stop(work, first)
    assert slurm.status(work, first)[:2] == ("stopped", "exit code 143")
    saved = checkpoint.steps(run / "checkpoints")[-1]
    assert 20 <= saved < STEPS

    second = slurm.submit(work)
    after = Slurm(backend="slurm", folder=str(lab.folder), python="/bin/echo")
    evaluation = Workload.model_validate(
        dict(workload(lab, "after", nodes=1, after=[second])) | {"job": "evaluate", "words": ["run=evaluated"]}
    )
    waiting = after.submit(evaluation)
    wait_for_step(run, saved + 50)
    assert after.status(evaluation, waiting)[:2] == ("pending", "PENDING: Dependency")
    lab.ask("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    assert end_of(slurm, work, second) == ("succeeded", "exit code 0", 1)
    assert_identical(last(run), last(undisturbed))
    assert end_of(after, evaluation, waiting)[0] == "succeeded"
    lines = list(slurm.logs(work, second, 0, follow=False))
    assert [line for line in lines if f"step {STEPS}/{STEPS}" in line]
    assert {line.split(":")[0] for line in lines} == {"rank 0"}


def test_a_run_goes_on_with_the_nodes_that_are_left(lab: SlurmLab, slurm: Slurm, undisturbed: Path) -> None:
    run, work = lab.folder / "shrunken", workload(lab, "shrunken", nodes="1..2")
    native = slurm.submit(work)
    wait_for_step(run, 70)
    assert slurm.status(work, native) == ("running", "RUNNING on n[1-2]", 0)
    lab.kill_node("n2")
    assert end_of(slurm, work, native) == ("succeeded", "exit code 0", 0)
    assert_close(last(run), last(undisturbed), rtol=1e-3, atol=1e-4)
