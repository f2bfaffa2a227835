"""The pointer to what serves: moved, kept, taken back; its checkpoints outlive every rule of retention."""

import json
from pathlib import Path

import pytest
from small_checkpoint import MANIFEST

from features.errors import UserError
from pipeline.release import serving
from pipeline.release.night import ModelReference
from pipeline.release.serving import back, bless, check_there, read_serving
from pipeline.run import checkpoint
from pipeline.run.retention import Keep, pin, pinned_steps, prune, unpin
from pipeline.run.run import Run
from pipeline.storage.files import remove_tree


@pytest.fixture(params=["disk", "store"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path if request.param == "disk" else request.getfixturevalue("memory")


@pytest.fixture
def run(root: Path) -> Run:
    """A run with checkpoints of steps 1 to 9, all but empty."""
    return small_run(root)


def small_run(root: Path) -> Run:
    run = Run(root / "run")
    for step in range(1, 10):
        path = checkpoint.folder(run.checkpoints, step)
        path.mkdir(parents=True)
        (path / "manifest.json").write_text(MANIFEST.model_copy(update={"step": step}).sealed({}).model_dump_json())
    return run


@pytest.fixture
def out(root: Path) -> Path:
    (root / "nights").mkdir()
    return root / "nights"


def model(run: Run, step: int) -> ModelReference:
    checksum = checkpoint.read(checkpoint.folder(run.checkpoints, step)).checksum
    return ModelReference(run=str(run.path), step=step, checkpoint=checksum)


def blessed(run: Run, out: Path, step: int, night: str = "", keep: int = 3) -> str:
    return bless(out, model(run, step), night or f"2026-11-0{step}", "pass", keep)


def served(out: Path) -> list[int]:
    pointer = read_serving(out)
    return [entry.step for entry in pointer.entries] if pointer else []


def test_the_pointer_moves_and_the_last_ones_are_kept_and_pinned(run, out):
    for step in range(1, 6):
        assert blessed(run, out, step).startswith("serves from now on")
        assert served(out) == list(range(step, max(step - 3, 0), -1))
        assert pinned_steps(run) == {*served(out)}
    content = json.loads((out / "serving.json").read_text())
    assert (
        content | model(run, 5).model_dump(exclude={"checkpoint"}) | {"night": "2026-11-05", "verdict": "pass"}
        == content
    )
    assert content["checksum"] == model(run, 5).checkpoint
    assert blessed(run, out, 5) == "serves already"
    assert served(out) == [5, 4, 3]


def test_retention_keeps_what_is_pinned_by_anyone(run, out, tmp_path):
    blessed(run, out, 2)
    pin(run, 2, tmp_path / "another")
    pin(run, 4, tmp_path / "another")
    prune(run, Keep(last=1), "data", newest=9)
    assert checkpoint.steps(run.checkpoints) == [2, 4, 9]
    unpin(run, 2, out)
    unpin(run, 4, tmp_path / "another")
    unpin(run, 7, out)  # no error: it has no pin
    prune(run, Keep(last=1), "data", newest=9)
    assert checkpoint.steps(run.checkpoints) == [2, 9]


def test_going_back_withdraws_what_served(run, out):
    for step in (1, 2, 3):
        blessed(run, out, step)
    assert [entry.step for entry in back(out)[:2]] == [3, 2]
    assert (served(out), pinned_steps(run)) == ([2, 1], {1, 2})
    assert blessed(run, out, 3, "2026-11-08") == "not moved: bless=back has withdrawn this checkpoint"
    assert blessed(run, out, 4).startswith("serves from now on; before it ")
    assert [entry.step for entry in back(out)[:2]] == [4, 2]
    back(out)
    assert served(out) == [1]
    with pytest.raises(UserError, match=r"serving\.json names no earlier checkpoint: there is nothing to go back to"):
        back(out)


def test_a_night_that_is_named_is_withdrawn_once(run, out):
    for step in (1, 2, 3):
        blessed(run, out, step)
    with pytest.raises(UserError, match="withdraw=2026-11-02, but what serves was blessed by night 2026-11-03"):
        back(out, "2026-11-02")
    for moved in (True, False, False):
        pin(run, 3, out)  # as if the first one had been killed before it took this away
        last, now, has_moved = back(out, "2026-11-03")
        assert (last.step, now.step, has_moved) == (3, 2, moved)
        assert (served(out), pinned_steps(run)) == ([2, 1], {1, 2})
    back(out, "2026-11-02")
    assert not back(out, "2026-11-02")[2]  # nothing is left before it
    blessed(run, out, 4, "2026-11-03")  # the same night, judged anew: what it has blessed last is meant
    blessed(run, out, 5, "2026-11-03")
    assert [back(out, "2026-11-03")[2] for _ in range(2)] == [True, False]
    assert served(out) == [4, 1]


def test_there_is_nothing_to_go_back_to_before_the_first_blessing(out):
    with pytest.raises(UserError, match=r"serving\.json is missing"):
        back(out)


def test_an_earlier_day_does_not_move_the_pointer(run, out):
    blessed(run, out, 5)
    assert blessed(run, out, 4) == "not moved: the checkpoint that serves has passed on the later day 2026-11-05"
    assert blessed(run, out, 3, night="2026-11-05").startswith("serves from now on")  # the same day, judged anew
    assert blessed(run, out, 6, night="canary").startswith("serves from now on")  # no day: neither late nor early


@pytest.mark.parametrize("change", ["gone", "another"])
def test_a_checkpoint_that_is_not_the_blessed_one_is_not_gone_back_to(run, out, change):
    blessed(run, out, 1)
    blessed(run, out, 2)
    path = checkpoint.folder(run.checkpoints, 1)
    remove_tree(path)
    if change == "another":
        path.mkdir()
        (path / "manifest.json").write_text(
            MANIFEST.model_copy(update={"step": 1, "rows": 7}).sealed({}).model_dump_json()
        )
    words = (
        "not a checkpoint, manifest.json is missing" if change == "gone" else "is not the checkpoint that was judged"
    )
    with pytest.raises(UserError, match=words):
        back(out)
    assert served(out) == [2, 1]
    with pytest.raises(UserError, match=words):
        check_there(read_serving(out).entries[1], out)


@pytest.mark.parametrize("serves", [False, True])
def test_the_pointer_does_not_move_to_a_checkpoint_that_was_pruned_after_its_verdict(run, out, serves):
    blessed(run, out, 1)
    if serves:
        blessed(run, out, 2)
    judged, content = model(run, 2), (out / "serving.json").read_text()
    remove_tree(checkpoint.folder(run.checkpoints, 2))
    with pytest.raises(UserError, match=r"manifest\.json is missing.* The pointer is not moved\."):
        bless(out, judged, "2026-11-03", "pass", keep=3)
    assert (out / "serving.json").read_text() == content
    assert pinned_steps(run) == {*served(out)}


def test_a_night_is_compared_with_what_served_before_it(run, out):
    assert serving.before(read_serving(out), "2026-11-01") is None
    for step in (1, 2):
        blessed(run, out, step)
    pointer = read_serving(out)
    assert serving.before(pointer, "2026-11-03").step == 2
    assert serving.before(pointer, "2026-11-02").step == 1
    assert serving.before(pointer, "2026-11-01").step == 2


def test_what_a_killed_back_left_pinned_is_released_by_the_next_blessing(run, out):
    for step in (1, 2):
        blessed(run, out, step)
    back(out)
    pin(run, 2, out)  # as if it had been killed before this pin was taken away
    blessed(run, out, 3)
    assert pinned_steps(run) == {1, 3}


def test_the_last_ones_that_were_withdrawn_are_kept(run, out, monkeypatch):
    monkeypatch.setattr(serving, "MOST_WITHDRAWN", 2)
    blessed(run, out, 1)
    for step in (2, 3, 4):
        blessed(run, out, step)
        back(out)
    assert [entry.step for entry in read_serving(out).withdrawn] == [3, 4]


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"run": "r"}', '{"run": "r", "step": -1}', '{"run": "r", "step": "1"}', "[" * 9999, '{"run": 1e999}'],
)
def test_a_damaged_pointer_is_one_line(out, content):
    (out / "serving.json").write_text(content)
    with pytest.raises(UserError, match=r"serving\.json: ") as caught:
        read_serving(out)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("move", ["bless", "back"])
def test_a_pointer_that_is_moved_after_it_was_read_stays_there_with_its_pins(run, out, monkeypatch, move):
    for step in (1, 2):
        blessed(run, out, step)

    def overtaken(folder: Path) -> serving.Serving | None:
        monkeypatch.setattr(serving, "read_serving", read_serving)
        found = read_serving(folder)
        blessed(run, folder, 3)
        return found

    monkeypatch.setattr(serving, "read_serving", overtaken)
    with pytest.raises(UserError, match="another job has moved the pointer meanwhile"):
        blessed(run, out, 4, keep=1) if move == "bless" else back(out)
    assert served(out) == [3, 2, 1]
    assert pinned_steps(run) == {1, 2, 3}


@pytest.mark.integration
def test_of_two_movers_of_a_pointer_on_s3_one_wins_and_the_other_is_refused(s3, monkeypatch):
    """The second one reads the pointer before the first one moves it, as where its lease was lost meanwhile."""
    run, out = small_run(s3), s3 / "nights"
    for step in (1, 3):  # a first pointer, and one over another
        write = serving._write

        def overtaken(*arguments, step=step, write=write):
            monkeypatch.setattr(serving, "_write", write)
            blessed(run, out, step + 1)
            write(*arguments)

        monkeypatch.setattr(serving, "_write", overtaken)
        with pytest.raises(UserError, match="another job has moved the pointer meanwhile"):
            blessed(run, out, step, keep=2)
        assert served(out)[0] == step + 1
        assert pinned_steps(run) == {*served(out)}
    blessed(run, out, 5)
    assert served(out) == [5, 4, 2]
