"""Which checkpoints await evaluation, and how several evaluators share them: locks and files are real, there is no model."""

import errno
import os
import random
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from evaluations_by_hand import DATASET, MEASURE, commit, record, set_commit_time, write_figures
from small_checkpoint import MANIFEST

from features.errors import UserError
from pipeline.evaluation import pending as pending_module
from pipeline.evaluation import predictions
from pipeline.evaluation.follow import EvaluateConfig
from pipeline.evaluation.lag import commit_time, lag
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.pending import Claim, Pending
from pipeline.run import checkpoint, records
from pipeline.run.retention import Keep, prune
from pipeline.run.run import Run, config_hash
from pipeline.storage.files import append_line, read_lines


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "run" / "metrics").mkdir(parents=True)
    return Run(tmp_path / "run")


def pending(run: Run, measure: MeasureConfig = MEASURE, **settings: object) -> Pending:
    return Pending(run, "test", DATASET, measure.share, measure.hash, **settings)


def finish(them: Pending, claim: Claim, **more: object) -> None:
    """Writes what an evaluation of a claimed checkpoint leaves."""
    about = {"split": them.split, "dataset": them.dataset, "share": them.share, "measure": them.measure, **more}
    write_figures(them.run, line := record(claim.step, records.checksum(them.run, claim.step), **about))
    them.record(claim, line)


def taken(them: Pending, final: int | None = None) -> list[int]:
    """Steps in the order in which they are taken, each recorded before the next."""
    steps = []
    while claim := them.take(checkpoint.steps(them.run.checkpoints), final):
        with claim:
            finish(them, claim)
        steps.append(claim.step)
    return steps


def settings_file(run: Run, train: str) -> None:
    (run.path / "config.yaml").write_text(f"dataset: /data\nmodel: {{}}\ntrain: {train}\n")


def test_the_oldest_or_the_newest_checkpoint_comes_first_and_a_newer_one_before_those_that_wait(run: Run):
    for step in (2, 4, 6):
        commit(run, step)
    them = pending(run, order="newest")
    claim = them.take([2, 4, 6])
    with claim:
        finish(them, claim)
    commit(run, 8)
    assert (claim.step, taken(them)) == (6, [8, 4, 2])
    run.eval_metrics.unlink()
    assert taken(pending(run)) == [2, 4, 6, 8]


def test_a_checkpoint_whose_store_fails_while_it_is_claimed_is_left_to_other_evaluators(memory, monkeypatch):
    run = Run(memory / "run")
    manifest = MANIFEST.model_copy(update={"step": 2}).sealed({})
    (checkpoint.folder(run.checkpoints, 2) / "manifest.json").write_text(manifest.model_dump_json())

    def silent(*_: object) -> None:
        raise TimeoutError(errno.ETIMEDOUT, "the store has not answered", str(run.path))

    with monkeypatch.context() as patched:
        patched.setattr(pending_module, "commit_time", silent)
        with pytest.raises(TimeoutError) as kept:  # with all that the claim refers to
            pending(run).take([2])
    with pending(run).take([2]) as claim:
        assert (claim.step, kept.type) == (2, TimeoutError)


@pytest.mark.parametrize("order", ["oldest", "newest"])
def test_every_is_a_choice_by_step_that_no_deletion_restart_or_second_evaluator_changes(run: Run, order: str):
    settings_file(run, "{checkpoint_every: 5}")
    kept = [step for step in range(5, 101, 5) if step not in (20, 35, 40, 55)] + [97]  # 97: of a preemption
    for step in kept:
        commit(run, step)
    found = []
    for _ in range(len(kept)):  # a new evaluator each time
        claim = pending(run, every=4, order=order).take(checkpoint.steps(run.checkpoints))
        if claim is None:
            break
        with claim:
            found.append(claim.step)
            finish(pending(run), claim)
        checkpoint.remove(checkpoint.folder(run.checkpoints, 5 + 10 * len(found)))
    assert found == sorted((60, 80, 100), reverse=order == "newest")
    commit(run, 103)
    assert taken(pending(run, every=4), final=103) == [103]


def test_every_counts_epochs_where_a_checkpoint_is_written_an_epoch(run: Run):
    settings_file(run, "{checkpoint_every: null}")
    for epoch in range(6):
        commit(run, 7 * (epoch + 1), epoch=epoch)
    assert taken(pending(run, every=2)) == [14, 28, 42]
    settings_file(run, "{checkpoint_every: many}")
    with pytest.raises(UserError, match=r"config\.yaml: train\.checkpoint_every"):
        pending(run, every=2)


def test_each_checkpoint_gets_one_record_whatever_evaluators_and_the_trainer_do_at_the_same_time(run: Run):
    """Random interleavings of three evaluators that may die, and a trainer that commits, rolls back, deletes and damages."""
    for seed in range(15):
        rng = random.Random(seed)
        place = Run(run.path / str(seed))
        place.eval_metrics.parent.mkdir(parents=True)
        working: dict[int, tuple[Pending, Claim, str]] = {}
        them = {name: pending(place) for name in range(3)}
        committed: set[tuple[int, str]] = set()
        for event in range(60):
            act, steps = (
                rng.choice(["committed", "rollback", "delete", "take", "take", "take", "done", "done", "die"]),
                [],
            )
            steps = checkpoint.steps(place.checkpoints)
            if act == "committed" or not steps:
                step = max(steps, default=0) + 1
                committed.add((step, commit(place, step, weights=event)))
            elif act == "rollback":
                step = rng.choice(steps)
                committed.add((step, commit(place, step, weights=event)))
            elif act == "delete":
                checkpoint.remove(checkpoint.folder(place.checkpoints, rng.choice(steps)))
            elif act == "take" and (name := rng.randrange(3)) not in working:
                if claim := them[name].take(steps):
                    assert claim.step not in [other.step for _, other, _ in working.values()]
                    working[name] = them[name], claim, records.checksum(place, claim.step)
            elif working:
                name = rng.choice(sorted(working))
                evaluator, claim, checksum = working.pop(name)
                if act == "done" and checksum:
                    with claim:
                        finish(evaluator, claim, checkpoint=checksum)
                else:
                    claim.lock.release()  # as the end of a process does: the file stays
                    them[name] = pending(place)
        for evaluator, claim, checksum in working.values():
            with claim:
                finish(evaluator, claim, checkpoint=checksum)
        taken(pending(place))
        lines = [(line["step"], line["checkpoint"]) for line in read_lines(place.eval_metrics)]
        assert max(Counter(lines).values()) == 1
        assert set(lines) <= committed
        now = {step: records.checksum(place, step) for step in checkpoint.steps(place.checkpoints)}
        assert records.current(place, "test", DATASET).keys() == now.keys()
        assert all(rng.choice([pending(place)]).take([step]) is None for step in now)


def test_a_checkpoint_that_another_evaluator_has_is_passed_over_and_taken_once_that_one_is_dead(run: Run):
    commit(run, 1)
    commit(run, 2)
    one, two = pending(run), pending(run)
    held = one.take([1, 2])
    assert (held.step, taken(two)) == (1, [2])
    assert two.take([1, 2]) is None
    held.lock.release()  # killed: without a record, and its lock file stays
    assert taken(two) == [1]
    assert [path.name for path in run.eval_metrics.parent.glob(".test-*")] == []


def test_a_claim_ends_with_its_record_so_that_a_waiting_evaluator_finds_nothing_to_do(run: Run):
    commit(run, 1)
    one, two = pending(run), pending(run)
    two.known()
    with one.take([1]) as claim:
        finish(one, claim)
    assert two.take([1]) is None


def test_a_checkpoint_that_was_recorded_just_before_its_lock_was_free_is_not_taken(run: Run, monkeypatch):
    commit(run, 1)
    one, two, lock = pending(run), pending(run), run.try_lock
    claim = one.take([1])

    def once_it_is_free(name: str) -> object:
        with claim:
            finish(one, claim)
        return lock(name)

    monkeypatch.setattr(two.run, "try_lock", once_it_is_free)
    assert two.take([1]) is None
    assert [path.name for path in run.eval_metrics.parent.glob(".test-*")] == []


def test_splits_datasets_and_shares_have_records_of_their_own(run: Run):
    commit(run, 3)
    others = [
        Pending(run, "valid", DATASET, 1.0, MEASURE.hash),
        Pending(run, "test", "/other", 1.0, MEASURE.hash, own_dataset=False),
        pending(run, MeasureConfig(share=0.1)),
    ]
    assert [taken(each) for each in (pending(run), *others)] == [[3]] * 4
    assert len(list(read_lines(run.eval_metrics))) == 4
    part = records.latest(run, "test", DATASET, share=0.1)[3]
    assert part["share"] == 0.1
    assert records.latest(run, "test", DATASET)[3]["share"] == 1.0
    files = {write_figures(run, record(3, "a", **other)) for other in ({}, {"dataset": "/other"}, {"share": 0.1})}
    assert len(files) == 3


def test_deletion_of_checkpoints_counts_evaluations_of_the_whole_split_only(run: Run):
    for step in (1, 2, 3):
        checksum = commit(run, step)
        append_line(run.eval_metrics, record(step, checksum, metrics={"click": {"ne": step / 10}}))
        append_line(run.eval_metrics, record(step, checksum, share=0.5, metrics={"click": {"ne": 0.9 - step / 10}}))
    prune(run, Keep(best="test"), DATASET, newest=3)
    assert checkpoint.steps(run.checkpoints) == [1, 3]


def test_a_record_is_put_in_place_of_the_one_of_the_same_evaluation_and_becomes_the_last(run: Run):
    lines = [record(4, "a"), record(4, "b"), record(4, "a", share=0.5), record(6, "a")]
    for line in lines:
        records.put(run, line)
    assert list(read_lines(run.eval_metrics)) == lines
    records.put(run, again := record(4, "a", seconds=2))
    assert list(read_lines(run.eval_metrics)) == [*lines[1:], again]
    assert records.latest(run, "test", DATASET)[4] == again  # the run is back at the first weights
    early = {key: value for key, value in record(8, "a").items() if key != "share"}
    append_line(run.eval_metrics, early)  # of an early version: of all rows
    records.put(run, record(8, "a"))
    assert [line["step"] for line in read_lines(run.eval_metrics)] == [4, 4, 6, 4, 8]


@pytest.mark.parametrize(
    "fault", ["missing", "cut", "empty", "other weights", "other rows", "other buckets", "other settings", "link"]
)
def test_a_record_without_its_file_of_figures_is_made_again_once_without_a_second_line(run: Run, tmp_path: Path, fault):
    checksum = commit(run, 2)
    about = record(2, checksum)
    file = write_figures(run, about)
    records.put(run, about)
    assert pending(run).take([2]) is None  # the good twin
    if fault in ("missing", "link"):
        file.unlink()
    if fault == "link":
        file.symlink_to(write_figures(Run(tmp_path / "elsewhere"), about))
    if fault in ("cut", "empty"):
        file.write_bytes(file.read_bytes()[:-9] if fault == "cut" else b"")
    if fault.startswith("other"):
        changed = {"weights": {"checkpoint": "b"}, "rows": {"dataset": "/b"}, "buckets": {"buckets": 3}}
        changed["settings"] = {"measure": MeasureConfig(top=3).hash}
        write_figures(run, about | changed[fault.removeprefix("other ")]).replace(file)
    them = pending(run)
    with them.take([2]) as claim:
        if fault != "missing":  # then it stays missing, and the next evaluator tries again, but not this one
            write_figures(run, about)
        them.record(claim, about | {"seconds": 2})
    assert them.take([2]) is None
    [line] = read_lines(run.eval_metrics)
    assert line["seconds"] == 2
    assert (pending(run).take([2]) is None) == (fault != "missing")


def test_records_of_other_settings_are_made_again_by_each_evaluator_once_and_one_line_is_logged(run: Run, caplog):
    caplog.set_level("INFO")
    for step in (1, 2):
        commit(run, step)
    other = MeasureConfig(slices=["device"])
    one, two = pending(run), pending(run, other)
    assert (taken(one), taken(two), taken(one), taken(two)) == ([1, 2], [1, 2], [], [])
    assert [line["measure"] for line in read_lines(run.eval_metrics)] == [other.hash] * 2
    [told] = [r.getMessage() for r in caplog.records if "other settings" in r.getMessage()]
    assert (
        "split test has records that were measured with other settings (slices, buckets, table_precision, ...), 2:"
        in told
    )
    assert taken(pending(run, other)) == []
    commit(run, 3)
    assert taken(pending(run)) == [1, 2, 3]  # a restart with the settings of before
    write_figures(run, record(3, records.checksum(run, 3), measure=other.hash))  # killed before the line
    assert taken(pending(run)) == [3]


def test_a_record_of_an_early_version_without_settings_is_made_again(run: Run):
    about = record(2, commit(run, 2))
    write_figures(run, about)
    append_line(run.eval_metrics, {key: value for key, value in about.items() if key != "measure"})
    assert taken(pending(run)) == [2]
    assert len(list(read_lines(run.eval_metrics))) == 1


@pytest.mark.parametrize(
    "changed",
    [{"slices": ["device"]}, {"slices": [{"column": "age", "edges": [1, 2]}]}, {"top": 3}, {"min_rows": 5}, {"rare": 3},
     {"cold_start": False}, {"by_time": ["day"]}, {"buckets": 20}, {"cluster_by": "row"}, {"group": "row"}, {"ndcg": 5}],
)  # fmt: skip
def test_the_hash_of_what_is_measured_changes_with_every_setting_of_the_figures(changed: dict):
    base = {"slices": ["user"]}
    assert MeasureConfig(**base | changed).hash != MeasureConfig(**base).hash


def test_the_hash_of_what_is_measured_is_not_of_the_memory_nor_of_a_share_that_has_its_own_field():
    assert MeasureConfig(memory=2.0, share_by="user").hash == MeasureConfig().hash
    assert MeasureConfig(share=0.5).hash == MeasureConfig(share=0.1).hash
    assert MeasureConfig(share=0.5).hash != MeasureConfig(share=0.5, share_by="user").hash
    assert EvaluateConfig(run=Path("run"), split="valid", batch_size=5).hash == MeasureConfig().hash


def test_what_a_killed_evaluator_left_half_written_is_removed_by_the_next_one(run: Run):
    about = record(2, commit(run, 2))
    file = write_figures(run, about)
    left = [path.with_name(f".{path.name}.{'0a' * 16}") for path in (file, run.eval_metrics)]
    others = [file.with_name(f".test-00000004.parquet.{'0a' * 16}"), file.with_name(".test-00000002.parquet.notes")]
    for path in (*left, *others):
        path.write_text("")
    assert taken(pending(run)) == [2]
    assert [path.exists() for path in (*left, *others)] == [False, False, True, True]


def test_half_written_predictions_which_may_be_of_another_dataset_are_removed_once_they_are_old(run: Run):
    file = predictions.path(run, "test", 2)
    file.parent.mkdir()
    new, old = (file.with_name(f".{file.name}.{digits * 16}") for digits in ("0a", "0b"))
    for path in (new, old):
        path.write_text("")
    os.utime(old, (1.0, 1.0))
    commit(run, 2)
    assert taken(pending(run)) == [2]
    assert (new.exists(), old.exists()) == (True, False)


def test_a_checkpoint_that_failed_is_tried_again_when_it_is_written_anew_or_a_minute_later(
    run: Run, monkeypatch, caplog
):
    commit(run, 2)
    them, clock = pending(run), [100.0]
    monkeypatch.setattr(pending_module, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: clock[0]}))

    def fails() -> bool:
        claim = them.take([2])
        if claim is None:
            return False
        with claim:
            them.fail(claim, UserError("it is damaged"))
        return True

    assert [fails(), fails()] == [True, False]
    clock[0] += 61
    assert [fails(), fails()] == [True, False]
    commit(run, 2, weights=1)
    assert [fails(), fails()] == [True, False]
    assert [r.getMessage() for r in caplog.records].count(
        "step 2: left out, its checkpoint was deleted or damaged (it is damaged)"
    ) == 1


def test_lag_is_to_the_heartbeat_and_after_training_to_the_newest_checkpoint(run: Run, monkeypatch):
    for step in (10, 40):
        commit(run, step)
        set_commit_time(run, step, 1000.0 + step)
    assert (commit_time(run, 10), commit_time(run, 11)) == (1010.0, None)
    assert lag(run, 10, 1010.0) == {"steps": 30}  # no trainer: the newest checkpoint
    monkeypatch.setattr("time.time", lambda: 1060.5)
    run.write_status("training", 55, 100)
    monkeypatch.setattr("time.time", lambda: 2000.0)
    assert lag(run, 10, 1010.0) == {"steps": 45, "seconds": 50.5}
    assert lag(run, 60, 1070.0) == {"steps": 0, "seconds": 0.0}  # it was rolled back
    for state in ("finished", "failed", "preempted"):
        run.write_status(state, 55, 55)
        assert lag(run, 10, 1010.0) == {"steps": 30}
    assert lag(run, 10, None) is None
    (run.path / "status.json").write_text("{")
    assert lag(run, 10, 1010.0) is None


@pytest.mark.parametrize(
    "more",
    [{"lag": {"steps": -1, "seconds": 0.0}}, {"lag": {"seconds": 1.0}}, {"share": 0.0}, {"share": 1.5}, {"buckets": 0},
     {"intervals": {"click": {"ne": "0.1"}}}, {"reliability": {"click": [[0.1, 0.2, 0.3]]}}, {"ranks": 0},
     {"buckets_used": {"click": {"ne": -1}}},
     {"ranking": "close"}, {"ranking": {"other": 0.1}},
     {"evaluation": "../../secret-00000001.parquet"}, {"evaluation": "test-00000001.parquet\n"}],
)  # fmt: skip
def test_a_record_with_fields_that_no_evaluator_writes_is_one_line_of_error(run: Run, more):
    good = {"lag": {"steps": 0, "seconds": 1.5}, "share": 0.5, "buckets": 100, "cluster": "user", "ranks": 2}
    good |= {"intervals": {"click": {"ne": 0.1, "auc": None}}, "reliability": {"click": [[0.1, 0.2, None, 5.0, 3]]}}
    good |= {"buckets_used": {"click": {"ne": 3, "auc": 0}}}
    good |= {"evaluation": "test-00000001-0a1b2c3d.parquet"}
    good |= {"ranking": {"sketch": 1e-6, "share": 0.5}, "rows_evaluated": 5, "rows_per_s": 3.5}
    append_line(run.eval_metrics, record(1, "a", **good))
    assert list(records.latest(run, "test", DATASET, share=0.5)) == [1]
    append_line(run.eval_metrics, record(1, "a", **good | more))
    with pytest.raises(UserError, match=r"eval\.jsonl, line 2: not a record of an evaluation") as caught:
        records.latest(run, "test", DATASET)
    assert "\n" not in str(caught.value)


def test_a_hash_of_settings_does_not_depend_on_the_order_of_keys():
    assert config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == config_hash({"b": {"d": 3, "c": 2}, "a": 1})
