"""night.json: steps that are done once, with the same inputs, and files that are damaged or not ours."""

import json
from pathlib import Path
from typing import Any

import pytest

from features.errors import UserError
from pipeline.release.night import Night, Recorder, nights, open_night, read_night

SETTINGS = {"run": "r"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "2026-11-09"


def opened(folder: Path, again: bool = False, **settings: Any) -> Recorder:
    return open_night(folder, "2026-11-09", SETTINGS | settings, again)


def test_a_step_is_done_once_and_again_where_its_inputs_have_changed(folder):
    calls: list[int] = []

    def work() -> dict[str, Any]:
        calls.append(1)
        return {"number": len(calls)}

    for inputs, wanted in (({"a": 1}, 1), ({"a": 1}, 1), ({"a": 2}, 2), ({"a": 1}, 3)):
        assert opened(folder).step("one", inputs, work) == {"number": wanted}
    assert opened(folder).step("two", {"a": 1}, work) == {"number": 4}
    assert [(step.name, step.state) for step in read_night(folder).steps] == [("one", "done"), ("two", "done")]


def test_a_step_is_on_disk_as_running_while_it_works_and_as_failed_with_its_error(folder):
    def work() -> dict[str, Any]:
        assert read_night(folder).find("one").state == "running"
        raise UserError("no disk\nat all")

    with pytest.raises(UserError):
        opened(folder).step("one", {}, work)
    step = read_night(folder).find("one")
    assert (step.state, step.error, read_night(folder).summary("one")) == ("failed", "no disk at all", None)
    assert opened(folder).step("one", {}, lambda: {"now": True}) == {"now": True}


def test_what_ends_the_process_leaves_the_step_running(folder):
    def work() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(folder).step("one", {}, work)
    assert read_night(folder).find("one").state == "running"


def test_steps_that_only_an_abandoned_attempt_took_are_dropped_when_the_night_is_judged(folder):
    recorder = opened(folder)
    for name in ("models", "train", "evaluate serving"):
        recorder.step(name, {}, dict)
    recorder = opened(folder, run="other")
    recorder.step("models", {}, dict)  # done before, and asked for again
    assert [step.name for step in recorder.current().steps] == ["models"]
    recorder.judged("pass", "why")
    recorder = opened(folder, run="other")
    recorder.step("bless", {}, dict)
    assert [step.name for step in read_night(folder).steps] == ["models", "bless"]


def test_a_judged_night_keeps_its_settings_and_one_that_is_not_takes_new_ones(folder):
    opened(folder).step("one", {}, dict)
    recorder = opened(folder, run="other")
    assert recorder.night.settings == {"run": "other"}
    recorder.judged("pass", "why" * 9999)
    assert len(read_night(folder).why) == 2000
    with pytest.raises(UserError, match=r"was judged with other settings \(new, run\)\. Set again=true"):
        opened(folder, new=1)
    assert opened(folder, run="other").night.outcome == "pass"
    anew = opened(folder, again=True, new=1)
    assert (anew.night.outcome, anew.night.steps) == (None, [])


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", "null", "[" * 5000, '{"version": 2}', '{"version": 1, "date": 5, "settings": {}}',
        '{"date": "d", "settings": {}, "steps": [{"name": "x"}]}', '{"date": "d", "settings": {}, "outcome": "maybe"}',
        '{"date": "d", "settings": {}, "judged": NaN}', '{"date": "d", "settings": {}, "judged": 1e999}',
        '{"date": "d", "settings": {}, "other": 1}', "\udcff",
    ],
)  # fmt: skip
def test_a_damaged_record_is_one_line_and_again_replaces_it(folder, content, caplog):
    folder.mkdir()
    (folder / "night.json").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=r"night\.json.*restore it, or set again=true") as caught:
        opened(folder)
    assert "\n" not in str(caught.value)
    assert list(nights(folder.parent)) == []
    assert "left out: " in caplog.text
    opened(folder, again=True).step("one", {}, dict)
    assert [night.date for night in nights(folder.parent)] == ["2026-11-09"]


def test_a_record_is_plain_json(folder):
    opened(folder).step("one", {"a": 1}, lambda: {"x": 0.5})
    found = json.loads((folder / "night.json").read_text())
    assert Night.model_validate(found, strict=True) == read_night(folder)
    assert found["steps"][0]["summary"] == {"x": 0.5}
