"""A run that three ranks begin, two go on with and one ends, against one rank alone; and the order of rows by default."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from some_ranks import BY_RANK, ENDS, RUNS, main
from tiny_training import TRAIN_ROWS, assert_close, last, losses, torchrun
from two_ranks import train

from pipeline.run import checkpoint
from pipeline.training.config import Order, Settings

STEPS = max(ENDS.values())


def rows_by_step(folder: Path, name: str) -> dict[int, list[list[int]]]:
    """The rows of each step, by rank."""
    steps: dict[int, list[list[int]]] = {}
    for ranks in ENDS:
        for rank in range(ranks):
            for step, rows in json.loads((folder / f"{name}.{ranks}.{rank}.json").read_text()).items():
                steps.setdefault(int(step), []).append(rows)
    return steps


@pytest.fixture(scope="module")
def ranks(folder: Path, device: object) -> Path:
    """The runs of some_ranks.py, on three ranks, then two, then one."""
    for count in (3, 2):
        torchrun(str(Path(__file__).parent / "some_ranks.py"), str(folder), ranks=count).check_returncode()
    main(folder)
    return folder


def test_a_run_handed_on_from_three_ranks_to_two_to_one_is_that_of_one_rank(ranks: Path) -> None:
    alone = train(ranks, "alone", max_steps=STEPS)
    steps = rows_by_step(ranks, "handed-on")
    assert {step: sorted(row for rows in parts for row in rows) for step, parts in steps.items()} == {
        step: sorted(rows) for step, rows in alone.seen.items()
    }
    assert sorted(map(len, steps[1])) == [10, 11, 11]
    assert [len(steps[step]) for step in (16, 17, 23)] == [3, 2, 1]
    second_epoch = [row for step in range(14, 27) for rows in steps[step] for row in rows]
    assert len(second_epoch) == len(set(second_epoch)) == TRAIN_ROWS
    assert losses(ranks / "handed-on") == pytest.approx(losses(ranks / "alone"), rel=1e-3)
    assert_close(last(ranks / "handed-on"), last(ranks / "alone"), rtol=5e-3, atol=5e-4)
    runs = [checkpoint.read(checkpoint.folder(ranks / name / "checkpoints", STEPS)) for name in ("handed-on", "alone")]
    assert runs[0].rows == runs[1].rows == 2 * TRAIN_ROWS + 4 * 32  # padding is no row


def test_a_batch_by_rank_is_that_of_the_ranks_that_began(ranks: Path) -> None:
    written = yaml.safe_load((ranks / "by-rank" / "config.yaml").read_text())["train"]
    assert {name: written[name] for name in BY_RANK} == {
        "batch_size": 30, "rank_batch_size": None, "lanes": 6, "window": 21845,
    }  # fmt: skip
    train(ranks, "by-hand", max_steps=STEPS, batch_size=30, lanes=6, window=21845)
    assert_close(last(ranks / "by-rank"), last(ranks / "by-hand"), rtol=5e-3, atol=5e-4)
    steps = rows_by_step(ranks, "by-rank")
    assert [sorted(map(len, steps[step])) for step in (1, 17, 23)] == [[10, 10, 10], [15, 15], [30]]


def test_what_a_command_leaves_open_is_what_its_run_began_with(ranks: Path) -> None:
    seen = train(ranks, "handed-on", max_steps=STEPS + 1, batch_size=None, lanes=None, window=None).seen
    assert {step: len(rows) for step, rows in seen.items()} == {STEPS + 1: 32}
    written = yaml.safe_load((ranks / "handed-on" / "config.yaml").read_text())["train"]
    assert (written["batch_size"], written["lanes"], written["window"]) == (32, 4, 24)


def test_a_batch_by_rank_that_ranks_change_is_logged(ranks: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pipeline")
    train(ranks, "by-rank", max_steps=STEPS, **RUNS["by-rank"])
    [line] = [record.getMessage() for record in caplog.records if "rank_batch_size" in record.getMessage()]
    assert line == ("train.batch_size stays 30, as the run began; train.rank_batch_size=10 on 1 ranks would be 10")


# What the order follows from


@pytest.mark.parametrize(
    ("settings", "order"),
    [
        ({}, (2048, 8, 16384)),
        ({"batch_size": 1024}, (1024, 8, 16384)),
        ({"batch_size": 8192}, (8192, 32, 4096)),
        ({"batch_size": 1 << 21}, (1 << 21, 64, 2048)),
        ({"batch_size": 3000}, (3000, 8, 16384)),
        ({"batch_size": 999}, (999, 3, 43690)),
        ({"batch_size": 7}, (7, 7, 18724)),
        ({"rank_batch_size": 512}, (1536, 8, 16384)),
        ({"rank_batch_size": 512, "lanes": 3, "window": 5}, (1536, 3, 5)),
    ],
)
def test_an_order_that_is_left_open_follows_from_the_batch(settings: dict, order: tuple[int, int, int]) -> None:
    assert Settings(**settings).order(3) == order


@given(st.integers(1, 1 << 22))
def test_a_batch_of_any_size_has_lanes_that_divide_it(batch_size: int) -> None:
    found = Settings(batch_size=batch_size).order()
    assert batch_size % found.lanes == 0
    assert 1 <= found.lanes <= 64
    assert found.lanes * found.window <= 8 * 16384
    if batch_size % 8 == 0:
        assert found.lanes >= 8


def test_a_batch_by_rank_and_one_over_all_exclude_each_other() -> None:
    with pytest.raises(
        ValidationError, match="batch_size=64 and rank_batch_size=8 exclude each other: set one to null"
    ):
        Settings(batch_size=64, rank_batch_size=8)
    assert Settings(rank_batch_size=8).order(4) == Order(32, 8, 16384)
