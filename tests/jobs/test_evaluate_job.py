"""jobs.evaluate on the command line: the report of an evaluator that ends with an error."""

from pathlib import Path

import pytest
from job_calls import assert_one_line

from models.ranker import ModelConfig
from pipeline.evaluation import priority
from pipeline.run.run import Run
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train


@pytest.mark.integration
def test_a_follower_whose_trainer_is_gone_leaves_a_report_of_what_it_has_evaluated(
    small_dataset: Path, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(priority, "lower", lambda _: None)
    run = Run(tmp_path / "run")
    settings = Settings(batch_size=32, lanes=4, epochs=1, max_steps=2, threads=1)
    model = ModelConfig(fusion={"name": "shared_bottom", "widths": [8]}, tower=[4])
    train(TrainConfig(dataset=small_dataset, run=run.path, model=model, train=settings))
    run.write_status("training", 2, 8)
    words = ["evaluate", f"run={run.path}", "follow=true", "give_up_after=0.01", "by_time=[]"]
    assert_one_line(call(*words), "no trainer heartbeat")
    assert "step 2, after" in run.report.read_text()
