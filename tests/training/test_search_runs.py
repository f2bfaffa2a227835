"""Searches on several ranks against one alone, and one that is killed and told to end."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_search import SETTINGS
from ranks_search import ON_THREE, VARIANTS, hand_on
from tiny_search import run_search
from tiny_training import PATHS, assert_close, assert_identical, last, torchrun

from pipeline.run import checkpoint
from pipeline.storage.files import read_lines

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(folder: Path, device: object) -> Path:
    """The searches of ranks_search.py on three ranks, then two, then one."""
    for count in (3, 2):
        torchrun(str(HERE / "ranks_search.py"), str(folder), ranks=count).check_returncode()
    for name, settings in VARIANTS.items():
        run_search(folder, f"{name}-1", **settings)
    hand_on(folder)
    return folder


def found(run: Path) -> list[Any]:
    """Of each line the network that would be derived, without strengths."""
    return [line["architecture"] | {"strengths": None} for line in read_lines(run / "metrics" / "search.jsonl")]


def valid_losses(run: Path) -> list[float]:
    return [line["valid_loss"] for line in read_lines(run / "metrics" / "search.jsonl")]


@pytest.mark.parametrize(("name", "count"), [*((n, 2) for n in VARIANTS), *((n, 3) for n in ON_THREE)])
def test_alpha_and_beta_are_the_same_on_every_rank_to_the_last_bit(ranks: Path, name: str, count: int) -> None:
    first, *others = (torch.load(ranks / f"{name}-{count}.{rank}.pt", weights_only=True) for rank in range(count))
    for other in others:
        assert_identical(other, first)


@pytest.mark.parametrize(("name", "count"), [*((n, 2) for n in VARIANTS), *((n, 3) for n in ON_THREE)])
def test_several_ranks_search_as_one_does(ranks: Path, name: str, count: int) -> None:
    several, alone = ranks / f"{name}-{count}", ranks / f"{name}-1"
    assert_close(last(several), last(alone), rtol=5e-3, atol=5e-4)
    assert valid_losses(several) == pytest.approx(valid_losses(alone), rel=1e-3)
    assert found(several) == found(alone)
    assert (several / "architecture.yaml").read_text().partition("width:")[2]


def test_a_search_handed_on_from_three_ranks_to_two_to_one_is_that_of_one_rank(ranks: Path) -> None:
    steps = {line["step"]: line["ranks"] for line in read_lines(ranks / "handed-on" / "restarts.jsonl")}
    assert list(steps.values()) == [3, 2, 1]
    assert 0 < sorted(steps)[1] < sorted(steps)[2] < 12
    assert_close(last(ranks / "handed-on"), last(ranks / "first-1"), rtol=5e-3, atol=5e-4)
    assert valid_losses(ranks / "handed-on") == pytest.approx(valid_losses(ranks / "first-1"), rel=1e-3)
    assert found(ranks / "handed-on") == found(ranks / "first-1")


@pytest.mark.system
def test_a_search_that_is_killed_and_then_told_to_end_is_that_which_was_left_alone(
    folder: Path, device: object
) -> None:
    def run(step: int, name: str) -> int:
        command = [sys.executable, str(HERE / "faulty_search.py"), str(folder), str(step), name]
        environment = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        print(done.stdout, done.stderr)
        return done.returncode

    assert run(8, "SIGKILL") == -9
    assert run(12, "SIGTERM") == os.EX_TEMPFAIL
    assert checkpoint.steps(folder / "faulty" / "checkpoints") == [5, 10, 12]
    assert not (folder / "faulty" / "architecture.yaml").exists()
    for name in ("faulty", "left-alone"):
        run_search(folder, name, **SETTINGS)
    assert_identical(last(folder / "faulty"), last(folder / "left-alone"))
    lines = [read_lines(folder / name / "metrics" / "search.jsonl") for name in ("faulty", "left-alone")]
    assert list(lines[0]) == list(lines[1])
    texts = [(folder / name / "architecture.yaml").read_text() for name in ("faulty", "left-alone")]
    assert texts[0].partition("width:")[2] == texts[1].partition("width:")[2] != ""
