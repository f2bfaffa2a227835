"""jobs.evaluate compare=[RUN,RUN@STEP] on the command line."""

import re
from pathlib import Path

import pytest
from job_calls import assert_one_line

from models.ranker import ModelConfig
from pipeline.evaluation.follow import EvaluateConfig, evaluate
from pipeline.evaluation.metrics import evaluated as files
from pipeline.evaluation.metrics.evaluated import Evaluated
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compare=[a,b]", "run=c"], "compare names both of its runs: leave run out"),
        (["compare=[a]"], "compare: List should have at least 2 items"),
        (["compare=a"], "compare: Input should be a valid list"),
        (["compare=[a,b@3]", "compare_slices=-1"], "compare_slices"),
        (["compare=[a,b@3]", "step=3"], "compare evaluates nothing: leave step"),
        (["compare=[a,b@3]", "follow=true"], "compare evaluates nothing: leave step"),
        (["compare=[a,b@3]"], "a: no run (config.yaml is missing)"),
    ],
)
def test_a_comparison_that_cannot_be_is_one_line(words: list[str], says: str, call, tmp_path: Path) -> None:
    assert_one_line(call("evaluate", *words), says)


@pytest.mark.integration
def test_two_evaluated_checkpoints_are_compared_and_what_is_missing_is_named(
    small_dataset: Path, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    settings = Settings(batch_size=32, lanes=4, epochs=1, max_steps=6, checkpoint_every=3, threads=1)
    model = ModelConfig(fusion={"name": "shared_bottom", "widths": [8]}, tower=[4])
    train(TrainConfig(dataset=small_dataset, run=run, model=model, train=settings))
    measured = {"threads": 1, "buckets": 10, "by_time": []}
    (last,) = evaluate(EvaluateConfig(run=run, step="newest", **measured))
    words = ["evaluate", f"compare=[{run},{run}@3]"]
    assert_one_line(call(*words), "step 3 has not been evaluated", f"jobs.evaluate run={run} split=test step=3.")
    (first,) = evaluate(EvaluateConfig(run=run, step=3, **measured))
    card = small_dataset.with_name(f"{small_dataset.name}.card.html")
    card.write_text("card")
    shown = call(*words)
    card.unlink()
    for task, metric in (("click", "ne"), ("click", "auc")):
        values = [f"{record['metrics'][task][metric]:.4f}" for record in (last, first)]
        assert re.search(rf"{task} +{metric.upper()} +all +\S+ +{values[0]} +{values[1]} ", shown)
    [page] = (run / "comparisons").iterdir()
    assert page.name == "test-00000006-run-00000003.html"
    assert shown.rstrip().endswith(str(page))
    text = page.read_text()
    [link] = set(re.findall(r'href="(\./[^"]*)"', text))
    assert (page.parent / link).resolve() == card.resolve()
    assert re.search("run@6 against run@3: [0-9] better", text)
    assert "<h1>run@6, run@3</h1>" in text
    page.unlink()
    monkeypatch.setenv("RANK", "1")  # of ranks the first alone
    assert (call(*words), page.exists()) == ("", False)
    monkeypatch.delenv("RANK")
    assert_one_line(call(*words, "compare_slices=[city]"), "compare_slices: the two have no slice city in common")
    assert_one_line(call(*words, "share=0.5", "share_by=row"), "split=test step=6 share=0.5 share_by=row.")
    file = run / "evaluations" / "test-00000003.parquet"
    found = files.read(file)
    files.write(Evaluated(found.figures, found.provenance.model_copy(update={"checkpoint": "other"})), file)
    assert_one_line(call(*words), "of a checkpoint that was since replaced", "step=3.")
    file.write_bytes(b"PAR1")
    assert_one_line(call(*words), "cannot be read")
