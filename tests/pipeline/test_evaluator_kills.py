"""Evaluators that are really killed, and a trainer that goes on meanwhile."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from models.ranker import ModelConfig
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

pytestmark = pytest.mark.system

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), str(HERE)])}
KILLS = 26


@pytest.fixture(scope="module")
def trained(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    settings = Settings(batch_size=64, lanes=2, epochs=2, max_steps=4, checkpoint_every=2, threads=1)
    model = ModelConfig(fusion={"name": "mmoe", "num_experts": 2, "levels": [[4]]}, tower=[4])
    train(TrainConfig(dataset=small_dataset, run=run, model=model, train=settings))
    return run


def results(script: str, *arguments: object) -> list[Any]:
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kills: list[Any], whole: dict[str, Any]) -> None:
    for event, code, _, again, after in kills:
        assert code == -signal.SIGKILL, event
        assert again == 0, event
        assert sorted(after["lines"]) == sorted(whole["lines"]), event
        assert after["whole"] == whole["whole"], event
        # The next change of eval.jsonl removes what is left of it.
        assert [name for name in after["left"] if not name.startswith(".eval.jsonl.")] == [], event


def test_an_evaluator_that_is_killed_at_any_moment_and_started_again_leaves_one_record_a_checkpoint(trained, tmp_path):
    whole, *kills = results("kill_evaluators.py", shutil.copytree(trained, tmp_path / "run"), KILLS)
    assert [step for step, *_ in whole["lines"]] == [step for step, *_ in whole["whole"]] == [2, 4]
    check(kills, whole)
    assert len(kills) > KILLS - 4
    for event, _, between, *_ in kills:  # a line has its files
        assert {step for step, *_ in between["lines"]} <= {step for step, *_ in between["whole"]}, event
    assert {len(between["lines"]) for _, _, between, *_ in kills} == {0, 1, 2}
    assert any(between["left"] for _, _, between, *_ in kills)  # half-written files, which are gone in the end


def test_an_evaluation_that_is_made_again_has_its_one_record_all_the_time(trained, tmp_path):
    whole, *kills = results("kill_evaluators.py", shutil.copytree(trained, tmp_path / "run"), 8, "again")
    assert [step for step, *_ in whole["lines"]] == [4, 2]
    check(kills, whole)
    orders = [[step for step, *_ in between["lines"]] for _, _, between, *_ in kills]
    assert {tuple(order) for order in orders} == {(2, 4), (4, 2)}


def test_a_trainer_and_two_evaluators_that_are_killed_leave_one_record_for_each_checkpoint(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    [found] = results("race_evaluators.py", run, 1)
    assert found["codes"] == [0, 0], (run / "log.txt").read_text()
    assert found["kills"] > 5
    assert max(Counter(map(tuple, found["lines"])).values()) == 1
    assert found["unknown"] == []
    assert found["whole"]
    assert found["current"] == found["whole"]
    assert len(found["lines"]) > 10
    assert "Traceback" not in (run / "log.txt").read_text()
