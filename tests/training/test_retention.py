"""Which checkpoints are kept, against the rule written as a loop; none is deleted while it is read."""

import json
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from features.errors import UserError
from pipeline.run import checkpoint, records
from pipeline.run.checkpoint import CheckpointManifest
from pipeline.run.checkpoint.writer import CheckpointWriter
from pipeline.run.retention import Keep, prune
from pipeline.run.run import Run

ABOUT = {"epoch": 0, "cursors": [1], "seed": 0, "window": 1, "batch_size": 1, "data": "d"}
ABOUT |= {"fingerprint": "f", "encoders": "e", "config": "c"}
OURS, THEIRS = "/data/ours", "/data/theirs"
FIGURES = st.none() | st.sampled_from([0.5, 0.6, 0.7])
RECORDS = st.tuples(
    st.integers(1, 12),
    st.sampled_from(["valid", "valid", "test"]),
    st.sampled_from([OURS, OURS, THEIRS]),
    st.sampled_from(["now", "now", "before", None]),  # which weights of the step were evaluated
    FIGURES,
    FIGURES,
)


def read(step: int, figure: float, dataset: str = OURS, made: str = "now") -> tuple:
    """One of RECORDS."""
    return step, "valid", dataset, made, figure, figure


def listed(run: Run, step: int) -> str:
    """A checkpoint without tensors; returns its checksum."""
    path = checkpoint.folder(run.checkpoints, step)
    path.mkdir(parents=True)
    manifest = CheckpointManifest(step=step, rows=step, **ABOUT).sealed({})
    (path / "manifest.json").write_text(manifest.model_dump_json())
    return manifest.checksum


def record(step: int, split: str, dataset: str, made: str | None, ne: float | None, nrmse: float | None) -> dict:
    metrics = {"click": {"ne": ne, "auc": 0.1}, "dwell": {"nrmse": nrmse}}
    named = {} if made is None else {"checkpoint": made}
    return {"step": step, "split": split, "dataset": dataset, "metrics": metrics} | named


def write_records(run: Run, lines: list[dict]) -> None:
    run.eval_metrics.parent.mkdir(parents=True)
    run.eval_metrics.write_text("".join(json.dumps(r) + "\n" for r in lines))


@settings(max_examples=examples(150), deadline=None)
@given(
    st.sets(st.integers(1, 12), min_size=1),
    st.integers(0, 11),
    st.none() | st.integers(1, 4),
    st.none() | st.integers(2, 7),
    st.none() | st.sampled_from(["valid", "test"]),
    st.lists(RECORDS, max_size=40),
)
@example({1, 2, 3}, 2, None, None, "valid", [read(1, 0.6), read(2, 0.5), read(1, 0.4, dataset=THEIRS)])
@example({1, 2, 3}, 2, None, None, "valid", [read(1, 0.6), read(2, 0.5, made="before")])
@example({1, 2, 3}, 2, None, None, "valid", [read(1, 0.5), read(2, 0.6), read(1, 0.7)])
@example({1, 2, 3}, 1, 1, None, None, [])
def test_what_goes_is_what_no_rule_asks_for(steps, place, last, every, best, drawn) -> None:
    ordered = sorted(steps)
    written = ordered[place % len(ordered)]
    with TemporaryDirectory() as folder:
        run = Run(Path(folder))
        checksums = {step: listed(run, step) for step in ordered}
        made = [checksums.get(step, "gone") if made == "now" else made for step, _, _, made, _, _ in drawn]
        lines = [record(*r[:3], checksum, *r[4:]) for r, checksum in zip(drawn, made, strict=True)]
        write_records(run, lines)
        prune(run, Keep(last=last, every=every, best=best), OURS, written)
        left = checkpoint.steps(run.checkpoints)
    if last is every is best is None:
        assert left == ordered
        return
    ordered = [step for step in ordered if step <= written]  # those above are trained anew
    stay = []
    for place, step in enumerate(ordered):
        among_last = last is not None and len(ordered) - place <= last
        multiple = every is not None and step % every == 0
        chosen = False
        if best is not None:
            mine = {}
            for r in lines:
                if r["split"] == best and r["dataset"] == OURS:
                    mine[r["step"]] = r
            mine = [r for s, r in mine.items() if s in ordered and r.get("checkpoint") == checksums[s]]
            chosen = step not in [r["step"] for r in mine]  # not evaluated yet
            for task, figure in (("click", "ne"), ("dwell", "nrmse")):
                known = [r for r in mine if r["metrics"][task][figure] is not None]
                if known:
                    lowest = min(r["metrics"][task][figure] for r in known)
                    first = min(r["step"] for r in known if r["metrics"][task][figure] == lowest)
                    chosen = chosen or step == first
        if step == written or among_last or multiple or chosen:
            stay.append(step)
    assert left == stay


HEAD = {"step": 2, "split": "valid", "dataset": OURS}
DAMAGED = ['{"step": 2, "spl', "7", "{}", "\xff"]
DAMAGED += [json.dumps(HEAD | more) for more in ({}, {"metrics": None}, {"metrics": {"click": {"ne": "0.5"}}})]
DAMAGED += [json.dumps(HEAD | {"step": "2", "metrics": {}})]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_of_an_evaluation_deletes_nothing_and_is_logged(tmp_path: Path, caplog, line: str) -> None:
    run = Run(tmp_path)
    made = {step: listed(run, step) for step in (2, 4, 6)}
    write_records(run, [record(step, "valid", OURS, made[step], step / 10, None) for step in made])
    with run.eval_metrics.open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"eval\.jsonl, line 4: no"):
        records.current(run, "valid", OURS)
    prune(run, Keep(best="valid"), OURS, 6)
    assert checkpoint.steps(run.checkpoints) == [2, 4, 6]
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "old checkpoints are not deleted" in caplog.text
    assert "eval.jsonl" in caplog.text
    prune(run, Keep(last=1), OURS, 6)  # needs no evaluation
    assert checkpoint.steps(run.checkpoints) == [6]


def test_a_record_without_the_headline_metric_of_a_task_deletes_nothing_and_is_logged(tmp_path: Path, caplog) -> None:
    run = Run(tmp_path)
    made = {step: listed(run, step) for step in (2, 4)}
    write_records(run, [HEAD | {"checkpoint": made[2], "metrics": {"dwell": {"mse": 0.5}}}])
    prune(run, Keep(best="valid"), OURS, 4)
    assert checkpoint.steps(run.checkpoints) == [2, 4]
    assert "none of the metrics ne, nrmse" in caplog.text


def test_a_defect_in_pruning_is_not_hidden(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "steps", lambda _: None)
    with pytest.raises(TypeError):
        prune(Run(tmp_path), Keep(last=1), OURS, 6)


@pytest.fixture
def saved(tmp_path: Path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    folder = Run(tmp_path).checkpoints
    folder.mkdir()
    yield lambda fill, step=4: checkpoint.save(
        folder, {"w": torch.full((50,), fill)}, CheckpointManifest(step=step, rows=1, **ABOUT)
    )
    dist.destroy_process_group()


def test_what_was_written_after_a_fall_back_stays_and_the_damaged_newer_one_goes(saved, tmp_path: Path) -> None:
    for step in (4, 8, 12):
        damaged = saved(1.0, step)
    (damaged / "tensors.json").unlink()
    run = Run(tmp_path)
    saver = CheckpointWriter(run.checkpoints, None, False, lambda step, _: prune(run, Keep(last=1), OURS, step))
    saver.save({"w": torch.ones(50)}, CheckpointManifest(step=8, rows=1, **ABOUT))
    assert saver.wait() is None
    assert checkpoint.steps(run.checkpoints) == [8]


def test_shapes_that_cannot_be_read_are_said_in_a_line(saved) -> None:
    path = saved(1.0)
    (path / "tensors.json").unlink()
    with pytest.raises(UserError, match=r"step-00000004/tensors\.json is missing"):
        checkpoint.shapes(path)


def test_a_checkpoint_that_is_read_is_not_deleted_until_it_has_been(saved) -> None:
    path = saved(1.0)
    with checkpoint.reading(path), checkpoint.reading(path):
        assert not checkpoint.remove(path)
        checkpoint.check(path)
    assert checkpoint.remove(path)
    assert list(path.parent.iterdir()) == []
    with pytest.raises(UserError, match=r"manifest\.json is missing"), checkpoint.reading(path):
        pass


def test_a_checkpoint_is_replaced_only_once_its_readers_are_done(saved) -> None:
    path = saved(1.0)
    with checkpoint.reading(path):
        writer = threading.Thread(target=saved, args=(2.0,))
        writer.start()
        writer.join(0.5)
        assert writer.is_alive()
        state = {"w": torch.zeros(50)}
        checkpoint.load(path, state, alone=True)
        assert state["w"].unique().tolist() == [1.0]
    writer.join()
    checkpoint.load(path, state, alone=True)
    assert state["w"].unique().tolist() == [2.0]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
