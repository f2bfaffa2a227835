"""Nights that train their candidate: on which days, from which weights, and in a process that ends with the night."""

import datetime
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeoutError
from pathlib import Path

import pytest
import yaml
from nightly_world import day, encode_day, night, no_beam, record, train_run, write_day

from features.errors import Preempted, UserError
from pipeline.release import child
from pipeline.release import steps as release_steps
from pipeline.release.config import NightlyConfig
from pipeline.release.night import Night, Step
from pipeline.release.nightly import go_back, nightly
from pipeline.release.training_step import new_days, trained_on, wait_for_trainer, warm_start
from pipeline.run.run import Run
from pipeline.storage.files import make_folder, write_json
from pipeline.storage.store_path import files_below

SMALL = {
    "args": [
        "model=shared_bottom", "train.batch_size=64", "train.lanes=2", "train.max_steps=60", "train.epochs=20",
        "train.threads=1", "train.tables.lr=0.2", "train.dense.lr=0.01",
    ],
}  # fmt: skip
LAX = {"by_time": [], "cold_start": False, "buckets": 20}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of days 0 to 4, datasets of days 0 to 2, and a run on day 0."""
    root = tmp_path_factory.mktemp("world")
    for number in range(5):
        write_day(root / "log", number, rows=600)
    for number in range(3):
        encode_day(root / "log", root / "days", number)
    train_run(root / "days", root / "run", last=0, steps=10)
    lax = {"metric": "ne", "max": 5, "allow_ne_above_one": True}
    (root / "gates.yaml").write_text(yaml.safe_dump({"default": [lax, {"metric": "rows", "min": 1}]}))
    return root


def make_again(folder: Path, number: int) -> None:
    """Makes the dataset of a day again, of other rows."""
    write_day(folder / "other_log", number, rows=500)
    encode_day(folder / "other_log", folder / "days", number, overwrite=True)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line of a training runs here: a process of its own takes ten times as long to start."""

    def call(command: list[str], output: int) -> int:
        assert command[1:3] == ["-m", "jobs.train"]
        monkeypatch.setattr(sys, "argv", command[2:])
        importlib.import_module("jobs.train").main()
        return 0

    monkeypatch.setattr(child, "call", call)


@pytest.mark.integration
def test_a_night_trains_on_the_new_days_from_the_last_night_that_passed(world, tmp_path, in_this_process, monkeypatch):
    out, days, lax = tmp_path / "nights", world / "days", LAX | {"gates": world / "gates.yaml"}
    with no_beam():
        first = nightly(night(world / "log", out, 3, train=SMALL, days=days, bless="pass", **lax))
        assert first.night.outcome == "pass"
        # Day 2 has come late, after day 3 was judged.
        late = nightly(night(world / "log", out, 2, train=SMALL | {"init_from": world / "run"}, days=days, **lax))
        second = nightly(night(world / "log", out, 4, train=SMALL, days=days, bless="pass", **lax))
    of_first, of_late, of_second = (found.night.summary("train") for found in (first, late, second))
    assert (of_first["days"], of_first["start"]) == (f"{day(0)}..{day(2)}", None)
    assert (of_late["days"], of_late["start"]) == (day(1), str(world / "run"))
    assert (of_second["days"], of_second["start"]) == (day(3), of_first["run"])  # which the first night has encoded
    config = Run(Path(of_second["run"])).config()
    assert (config["days"], config["train"]["init_from"]) == (day(3), of_first["run"])
    assert second.message["serving"] == first.message["candidate"]
    assert second.message["candidate"]["run"] == of_second["run"]
    assert second.night.outcome == "pass"
    steps = [step["name"] for step in record(out, 4)["steps"]]
    assert steps[:4] == ["models", "preprocess", "check", "train"]

    def choose(*given):
        raise UserError(f"would start from one of {[night.date for night in given[-1]]}")

    monkeypatch.setattr(release_steps, "choose", choose)
    go_back(NightlyConfig(out=out, date=day(4), bless="back"))  # no weights of what was withdrawn
    with pytest.raises(UserError, match=re.escape(f"one of {[day(2), day(3)]}")):
        nightly(night(world / "log", out, 5, train=SMALL, days=days, **lax))


@pytest.mark.integration
def test_days_that_the_start_has_seen_are_not_trained_on_again(world, tmp_path):
    config = night(world / "log", tmp_path, 3, train=SMALL, days=world / "days")
    assert new_days(config, None, []) == f"{day(0)}..{day(2)}"
    assert new_days(config, world / "run", []) == f"{day(1)}..{day(2)}"
    assert warm_start(config, [], None) is None
    with pytest.raises(
        UserError, match=rf"no day after {day(0)}, the last one that .*run was trained on, and before {day(1)}"
    ):
        new_days(night(world / "log", tmp_path, 1, train=SMALL, days=world / "days"), world / "run", [])
    with pytest.raises(UserError, match="no day before 2026-11-01, whose encoders the day would have"):
        nightly(night(world / "log", tmp_path, 0, train=SMALL, days=world / "days"))


@pytest.mark.integration
def test_days_whose_data_was_refused_are_not_trained_on(world, tmp_path, monkeypatch, caplog):
    shutil.copytree(world / "days", tmp_path / "days", ignore=shutil.ignore_patterns(day(1), day(2)))
    shutil.copytree(world / "log", tmp_path / "log")
    write_day(tmp_path / "log", 1, rows=600, unseen=True)
    given = {"days": tmp_path / "days", **LAX}
    of_run = {**given, "run": world / "run", "gates": world / "gates.yaml"}

    def trained_days(number: int) -> str:
        commands: list[list[str]] = []
        monkeypatch.setattr(child, "call", lambda command, _: commands.append(command) or 1)
        with pytest.raises(UserError, match="exit code 1"):
            nightly(night(tmp_path / "log", tmp_path / "nights", number, train=SMALL, again=True, **given))
        return next(word for word in commands[0] if word.startswith("days="))

    with no_beam():
        assert nightly(night(tmp_path / "log", tmp_path / "nights", 1, **of_run)).night.outcome == "undecided"
        from_run = night(tmp_path / "log", tmp_path / "nights", 2, train=SMALL | {"init_from": world / "run"}, **given)
        with pytest.raises(
            UserError, match=f"no day after {day(0)}, .* before {day(2)} but {day(1)}, whose data was refused"
        ):
            nightly(from_run)
        assert nightly(night(tmp_path / "log", tmp_path / "nights", 2, **of_run)).night.outcome == "pass"
        assert trained_days(3) == f"days=[{day(0)},{day(2)}]"
        assert f"train: without {day(1)}, whose data was refused" in caplog.text
        nightly(night(tmp_path / "log", tmp_path / "nights", 1, data_gates={"action": "warn"}, again=True, **of_run))
        assert trained_days(3) == f"days=[{day(0)}..{day(2)}]"


@pytest.mark.integration
def test_a_training_with_other_settings_does_not_go_on_with_the_run_of_the_one_before(world, tmp_path, monkeypatch):
    trained: list[tuple[str, ...]] = []
    monkeypatch.setattr(child, "call", lambda command, _: trained.append(tuple(command)) or 1)
    longer = SMALL | {"args": [*SMALL["args"], "train.seed=2"]}
    for train, again in ((SMALL, False), (SMALL | {"ranks": 2}, False), (longer, False), (longer, True), (SMALL, True)):
        config = night(world / "log", tmp_path / "nights", 2, train=train, days=world / "days", again=again, **LAX)
        with pytest.raises(UserError, match="exit code 1"):
            nightly(config)
    folders = [next(word for word in command if word.startswith("run=")) for command in trained]
    assert [folder == folders[0] for folder in folders] == [True, True, False, False, True]
    assert folders[2] == folders[3]


@pytest.mark.integration
def test_a_training_day_that_was_made_again_is_trained_on_in_another_folder(world, tmp_path, monkeypatch):
    shutil.copytree(world / "days", tmp_path / "days")
    trained: list[str] = []
    monkeypatch.setattr(child, "call", lambda command, _: trained.append(command[5]) or 1)

    def attempt(again: bool = False) -> None:
        with pytest.raises(UserError, match="exit code 1"):
            nightly(night(world / "log", tmp_path, 2, train=SMALL, days=tmp_path / "days", again=again, **LAX))

    attempt()
    attempt()
    make_again(tmp_path, 1)
    for again in (False, True):
        attempt(again)
    assert [run.startswith("run=") for run in trained] == [True] * 4
    assert trained[0] == trained[1] != trained[2] == trained[3]


@pytest.mark.integration
def test_a_training_is_done_again_only_where_its_run_was_lost_or_its_data_changed(world, tmp_path, in_this_process):
    shutil.copytree(world / "days", tmp_path / "days")
    given = {"days": tmp_path / "days", **LAX, "gates": world / "gates.yaml"}
    config = night(world / "log", tmp_path / "nights", 2, train=SMALL, **given)

    def trained() -> Run:
        broken = pytest.MonkeyPatch()
        broken.setattr(release_steps, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            nightly(config)
        broken.undo()
        return Run(Path(next(s for s in record(config.out, 2)["steps"] if s["name"] == "train")["summary"]["run"]))

    first = trained()
    made = (first.path / "config.yaml").stat().st_mtime_ns
    assert trained().path == first.path
    assert (first.path / "config.yaml").stat().st_mtime_ns == made
    make_again(tmp_path, 1)
    second = trained()
    assert second.path != first.path
    shutil.rmtree(second.path)
    found = nightly(config)
    assert (found.night.outcome, found.message["candidate"]["run"]) == ("pass", str(second.path))


@pytest.mark.integration
def test_the_start_of_a_training_is_chosen_again_after_an_earlier_night_or_day_has_come(world, tmp_path, monkeypatch):
    trained: list[list[str]] = []
    monkeypatch.setattr(child, "call", lambda command, _: trained.append(command) or 1)
    shutil.copytree(world / "days", tmp_path / "days", ignore=shutil.ignore_patterns(day(2)))
    config = night(world / "log", tmp_path / "nights", 3, train=SMALL, days=tmp_path / "days", **LAX)

    def attempt() -> set[str]:
        with pytest.raises(UserError, match="exit code 1"):
            nightly(config)
        return {word for word in trained[-1] if word.startswith(("days=", "train.init_from="))}

    assert attempt() == {f"days=[{day(0)}..{day(1)}]"}
    encode_day(world / "log", tmp_path / "days", 2)
    assert attempt() == {f"days=[{day(0)}..{day(2)}]"}
    step = Step(name="train", state="done", started=0.0, inputs="", summary={"run": str(world / "run")})
    passed = Night(date=day(1), settings={}, steps=[step], outcome="pass")
    write_json(make_folder(config.out / day(1)) / "night.json", passed.model_dump())
    assert attempt() == {f"days=[{day(1)}..{day(2)}]", f"train.init_from={world / 'run'}"}


@pytest.mark.integration
def test_a_candidate_that_was_trained_on_the_judged_day_is_refused(world, tmp_path, caplog):
    later = train_run(world / "days", tmp_path / "later", last=1, steps=10)
    given = {"days": world / "days", **LAX, "gates": world / "gates.yaml"}
    with pytest.raises(UserError, match=rf"later was trained on {day(1)}"), no_beam():
        nightly(night(world / "log", tmp_path / "nights", 1, run=later.path, **given))
    assert not [*(tmp_path / "nights").glob("*/*.parquet")]
    with no_beam():
        nightly(night(world / "log", tmp_path / "nights", 1, run=world / "run", serving=later.path, **given))
    assert f"later was trained on {day(1)}: its figures of that day are too good" in caplog.text
    config = yaml.safe_load((world / "run" / "config.yaml").read_text())
    (tmp_path / "warm").mkdir()
    of_warm = config | {"days": day(2), "train": config["train"] | {"init_from": str(later.path)}}
    (tmp_path / "warm" / "config.yaml").write_text(yaml.safe_dump(of_warm))
    seen = [datetime.date.fromisoformat(day(number)) for number in range(3)]
    assert trained_on(Run(tmp_path / "warm")) == {*seen}
    assert trained_on(Run(world / "run")) == {seen[0]}


@pytest.mark.integration
def test_a_run_that_left_missing_days_out_was_trained_on_those_that_are_there(world, tmp_path):
    run = shutil.copytree(world / "run", tmp_path / "run")
    shutil.copytree(world / "days", tmp_path / "days", ignore=shutil.ignore_patterns(*(day(n) for n in range(2, 9))))
    config = yaml.safe_load((run / "config.yaml").read_text())
    skipping = {"dataset": str(tmp_path / "days"), "days": f"{day(0)}..{day(8)}", "missing_days": "skip"}
    (run / "config.yaml").write_text(yaml.safe_dump(config | skipping))
    assert {found.isoformat() for found in trained_on(Run(run))} == {day(0), day(1)}
    with pytest.raises(UserError, match=rf"run was trained on {day(1)}"):
        nightly(night(world / "log", tmp_path / "nights", 1, run=run, **LAX))
    with no_beam():
        given = {"gates": world / "gates.yaml", "data_gates": {"action": "warn"}, **LAX}
        assert nightly(night(world / "log", tmp_path / "nights", 2, run=run, **given)).night.outcome == "pass"
    shutil.rmtree(tmp_path / "days")
    assert {found.isoformat() for found in trained_on(Run(run))} == {day(number) for number in range(9)}


@pytest.mark.integration
@pytest.mark.parametrize(("code", "error"), [(75, Preempted), (1, UserError)])
def test_a_training_that_fails_or_is_preempted_ends_the_night_so(world, tmp_path, monkeypatch, code, error):
    monkeypatch.setattr(child, "call", lambda *_: code)
    config = night(world / "log", tmp_path / "nights", 2, train=SMALL, days=world / "days", **LAX)
    with pytest.raises(error, match=r"train\.log|preempted"):
        nightly(config)
    assert [s["state"] for s in record(config.out, 2)["steps"] if s["name"] == "train"] == ["failed"]


@pytest.mark.system
def test_the_process_of_a_training_writes_to_its_log_and_its_error_ends_the_night(world, tmp_path):
    settings = {"train": SMALL | {"args": ["train.max_steps=-1"]}, "days": world / "days", **LAX}
    with pytest.raises(UserError, match=r"ended with exit code 1: see .*train\.log"):
        nightly(night(world / "log", tmp_path, 2, **settings))
    assert "error: configuration: train.max_steps" in (tmp_path / day(2) / "train.log").read_text()


def test_a_training_process_ends_with_the_night_that_is_killed(tmp_path):
    code = (
        "import os, sys; from pipeline.release.child import call; "
        "call([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'], 1)"
    )
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root}
    )
    assert parent.stdout
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("trained", [75, 0])
def test_sigterm_while_a_process_works_is_passed_on_and_waited_for(tmp_path, trained):
    trainer = (
        "import pathlib, signal, sys, time\n"
        f"def save(*_): time.sleep(0.5); pathlib.Path('saved').touch(); sys.exit({trained})\n"
        "signal.signal(signal.SIGTERM, save); print('trains', flush=True); time.sleep(60)"
    )
    code = (
        "import signal, sys, time; from jobs.entry import sigterm_handler; from pipeline.release.child import call\n"
        "signal.signal(signal.SIGTERM, sigterm_handler('nightly'))\n"
        f"print(call([sys.executable, '-c', {trainer!r}], 1), flush=True); time.sleep(60)"
    )
    root = str(Path(__file__).parents[2])
    job = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    assert job.stdout
    assert job.stdout.readline() == "trains\n"
    job.terminate()
    assert job.stdout.readline() == "75\n"
    assert (tmp_path / "saved").exists()
    job.terminate()
    assert job.wait(10) == 128 + signal.SIGTERM  # as ever where it does not wait for one


def test_a_night_waits_for_the_trainer_of_a_killed_one(tmp_path):
    run = Run(tmp_path)
    wait_for_trainer(run)  # there is none
    code = (
        "import sys, time; from pathlib import Path; from pipeline.run.run import Run; "
        "lock = Run(Path(sys.argv[1])).lock('train', 'x'); print('held', flush=True); time.sleep(0.5)"
    )
    root = str(Path(__file__).parents[2])
    trainer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    assert trainer.stdout
    assert trainer.stdout.readline() == "held\n"
    begin = time.monotonic()
    wait_for_trainer(run)
    assert time.monotonic() - begin > 0.2
    assert trainer.wait() == 0


def test_a_night_on_a_store_waits_for_the_trainer_of_a_killed_one(memory):
    run = Run(memory / "run")
    wait_for_trainer(run)  # there is none
    assert files_below(memory) == []
    lock = run.lock("train", "x")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for_trainer, run)
        try:
            with pytest.raises(FuturesTimeoutError):
                waiting.result(0.2)
        finally:
            lock.release()
        waiting.result(60)
