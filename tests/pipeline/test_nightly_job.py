"""The command line of jobs.nightly: exit codes, the JSON line, the pager's message, the webhook."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from nightly_world import day, encode_day, no_beam, train_run, write_day

import jobs.nightly
from features.errors import Preempted
from pipeline.release import nightly as job
from pipeline.release import outcome, steps, webhook
from pipeline.release.config import NightlyConfig

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of days 0 to 1, their datasets, a run on day 0, and gates that pass, fail and stay undecided."""
    root = tmp_path_factory.mktemp("world")
    for number in range(2):
        write_day(root / "log", number, rows=400)
        encode_day(root / "log", root / "days", number)
    train_run(root / "days", root / "run", last=0, steps=10)
    some_rows = {"metric": "rows", "min": 1}
    for name, limit in (("pass", 9.0), ("fail", 0.01)):
        gate = {"metric": "ne", "max": limit, "allow_ne_above_one": True}
        (root / f"{name}.yaml").write_text(yaml.safe_dump({"default": [gate], "tasks": {"dwell": [some_rows]}}))
    gate = {"metric": "auc", "min": 0.0, "min_rows": 9999}
    of_task = {"gates": [gate], "default": False, "allow_ne_above_one": True}
    lax = {"metric": "ne", "max": 9.0, "allow_ne_above_one": True}
    tasks = {"click": of_task, "save": {"gates": [lax]}, "dwell": [some_rows]}
    (root / "undecided.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    return root


@pytest.fixture
def run_job(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the command line here; gives what it exits with, the lines of stdout, and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[Any, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["jobs.nightly", f"out={tmp_path / 'nights'}", f"date={day(1)}", *arguments])
        code: Any = 0
        with no_beam():
            try:
                jobs.nightly.main()
            except SystemExit as stopped:
                code = stopped.code
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err

    return call


def judged(world: Path, gates: str) -> list[str]:
    quick = ["by_time=[]", "cold_start=false", "buckets=5"]
    return [
        f"run={world / 'run'}",
        f"days={world / 'days'}",
        f"input={world / 'log'}",
        f"gates={world / gates}.yaml",
        *quick,
    ]


@pytest.mark.parametrize(("gates", "code"), [("pass", 0), ("fail", 2), ("undecided", 3)])
def test_the_exit_code_is_the_outcome_and_the_last_line_of_stdout_is_json(world, run_job, tmp_path, gates, code):
    found, lines, _ = run_job(*judged(world, gates), f"termination_message={tmp_path / 'message'}")
    message = json.loads(lines[-1])
    assert (found, message["outcome"], message["exit_code"]) == (code, gates, code)
    assert message["record"] == str(tmp_path / "nights" / day(1) / "night.json")
    assert any(line.split()[:2] == [day(1), gates] for line in lines)  # the trend
    assert (tmp_path / "message").read_text().startswith(f"night {day(1)}: {gates}: ")
    again, same, _ = run_job(*judged(world, gates))
    assert (again, same[-1]) == (found, lines[-1])


def test_an_error_is_one_line_on_stderr_and_json_on_stdout(world, run_job, tmp_path):
    arguments = [*judged(world, "pass"), "step=7", f"termination_message={tmp_path / 'message'}"]
    code, lines, _ = run_job(*arguments)
    assert code.startswith("error: ")
    assert "no checkpoint of step 7" in code
    message = json.loads(lines[-1])
    assert (len(lines), message["outcome"], message["exit_code"]) == (1, "error", 1)
    assert "no checkpoint of step 7" in (tmp_path / "message").read_text()


def test_a_webhook_that_is_not_set_reaches_the_pager(world, run_job, tmp_path, monkeypatch):
    monkeypatch.delenv(webhook.VARIABLE, raising=False)
    code, _, _ = run_job(*judged(world, "pass"), "webhook=true", f"termination_message={tmp_path / 'message'}")
    assert "TASKFUSE_WEBHOOK is not set" in code
    assert "TASKFUSE_WEBHOOK is not set" in (tmp_path / "message").read_text()


def test_a_preempted_training_is_no_outcome(world, run_job, tmp_path, monkeypatch):
    def preempted(*_: Any) -> None:
        raise Preempted("preempted")

    monkeypatch.setattr(steps, "evaluate", preempted)
    code, lines, _ = run_job(*judged(world, "pass"), f"termination_message={tmp_path / 'message'}")
    assert (code, lines) == (75, [])
    assert not (tmp_path / "message").exists()


def test_a_defect_is_announced_and_keeps_its_traceback(world, run_job, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "judge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_job(*judged(world, "pass"), f"termination_message={tmp_path / 'message'}")
    assert json.loads(capsys.readouterr().out)["why"] == "error: division by zero"
    assert "error: division by zero" in (tmp_path / "message").read_text()


def test_the_outcome_is_posted_and_a_failure_to_post_changes_nothing(world, run_job, monkeypatch):
    monkeypatch.setenv(webhook.VARIABLE, "https://example.com/s3cret")
    posted: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(outcome, "post", lambda *given: posted.append(given) or False)
    code, lines, err = run_job(*judged(world, "fail"), "webhook=true")
    assert code == 2
    assert posted == [("https://example.com/s3cret", json.loads(lines[-1]))]
    assert "s3cret" not in "".join(lines) + err
    assert "s3cret" not in (Path.cwd() / "nights" / day(1) / "night.json").read_text()


def test_back_needs_nothing_but_the_folder(world, run_job):
    code, lines, _ = run_job("bless=back")
    assert code.startswith("error: ")
    assert "nights is missing" in code
    assert json.loads(lines[-1])["record"].endswith("nights/serving.json")
    assert not (Path.cwd() / "nights").exists()
    (Path.cwd() / "nights").mkdir()
    assert "serving.json is missing" in run_job("bless=back")[0]
    run_job(*judged(world, "pass"), "step=5", "bless=pass")
    run_job(
        *judged(world, "pass"),
        f"date={day(1)}-b",
        "days=null",
        f"input={world / 'log'}",
        "data_gates.action=warn",
        "bless=pass",
    )
    for words in ("serves again, ", "is withdrawn already, "):
        code, lines, _ = run_job("bless=back", f"withdraw={day(1)}-b")
        assert code == 0
        said = json.loads(lines[-1])
        assert (said["outcome"], said["serving"]["step"], said["withdrawn"]["step"]) == ("back", 5, 10)
        assert words in said["why"]
        assert said["repeat"] == f"bless=back withdraw={day(1)}-b"


def test_the_examples_of_help_are_settings_of_the_job():
    examples = [line for line in (jobs.nightly.__doc__ or "").splitlines() if "-m jobs.nightly" in line]
    assert len(examples) == 4
    parser = OverridesParser.create()
    for line in examples:
        content: dict[str, Any] = {"date": day(1)}
        for override in parser.parse_overrides(shlex.split(line)[3:]):
            content[override.get_key_element()] = override.value()
        NightlyConfig.model_validate(content)


def test_settings_that_do_not_go_together_are_one_line(run_job):
    for arguments, words in (
        ([], "give run=RUN"),
        (["run=r"], "input is missing"),
        (["run=r", "input=i", "data_gates.psi=-1"], "data_gates.psi: Input should be greater than 0"),
        (["run=r", "input=i", "bless=always"], "bless: Input should be 'none', 'pass' or 'back'"),
        (["run=r", "input=i", "withdraw=2026-11-09"], "withdraw is of bless=back"),
        (["run=r", "input=i", "keep_served=1"], "keep_served: Input should be greater than or equal to 2"),
    ):
        code, lines, _ = run_job(*arguments)
        assert code.startswith("error: ")
        assert words in code
        assert "\n" not in code
        assert lines == []
