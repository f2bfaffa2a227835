"""Submissions: records that survive a cut, derived resources against sums by hand, progress of a run written by hand."""

import errno
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluations_by_hand import commit, record, set_commit_time
from fsspec.implementations.memory import MemoryFileSystem

from features.errors import UserError
from pipeline.cluster.base import Cluster, Resources, Status, UnansweredError, Workload
from pipeline.cluster.kubernetes.settings import KubernetesSettings
from pipeline.cluster.values import NodeRange, amount
from pipeline.run.run import Run
from pipeline.storage.store_path import place
from pipeline.submission import manager, progress, reach, resources
from pipeline.submission.records import Record, Records, revision

GIB = 1 << 30
WORK: dict[str, Any] = {
    "job": "preprocess", "words": ["out=/x"], "name": "prep", "nodes": 1, "ranks_per_node": 1, "gpus_per_node": 0,
    "cpu": "1", "memory": "1Gi", "time_limit_s": 60, "grace_s": 5, "retries": 0,
}  # fmt: skip


def submission(name: str = "prep", **values: Any) -> Record:
    content = {
        "name": name, "job": "preprocess", "cluster": "local", "settings": {"backend": "local"},
        "work": Workload.model_validate(WORK | {"name": name}), "command": ["jobs.submit"], "revision": "r", "config": "c",
        "time": 1.0, "user": "u",
    }  # fmt: skip
    return Record.model_validate(content | values)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "submissions")


@pytest.mark.parametrize("run", [Path("/runs/r"), place("s3://bucket/runs/r")])
def test_a_record_is_read_as_it_was_written(run: Path, records: Records) -> None:
    found = submission(native="/x/prep", run=run)
    records.reserve(found)
    assert records.read("prep") == found


def test_a_name_is_taken_by_the_first_of_two(records: Records) -> None:
    records.reserve(submission())
    with pytest.raises(
        UserError, match=r"a submission prep exists: choose another name=, or jobs.submit resubmit prep"
    ):
        records.reserve(submission(user="another"))
    assert records.read("prep").user == "u"
    assert records.next_name("prep") == "prep-2"


@pytest.mark.parametrize("name", ["none", "../prep", "PREP", "", "a/b", "x" * 300])
def test_a_name_without_a_record_is_one_line(name: str, records: Records) -> None:
    records.reserve(submission())
    with pytest.raises(UserError, match=r"no submission .*: jobs.submit list shows them"):
        records.read(name)


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "prep"}'])
def test_a_damaged_record_is_one_line_that_names_the_file(content: str, records: Records) -> None:
    records.reserve(submission())
    records.file("prep").write_text(content)
    with pytest.raises(UserError, match=r"prep\.json") as said:
        records.read("prep")
    assert "\n" not in str(said.value)


def test_a_refused_submission_leaves_no_record_and_one_that_was_cut_off_is_said_to_be(records: Records) -> None:
    with pytest.raises(UserError, match="after needs a scheduler"):
        manager.submit(records, submission(work=Workload.model_validate(WORK | {"after": ["1"]})))
    assert records.names() == []
    records.reserve(submission())
    assert manager.current(records.read("prep")).detail.startswith(
        "prep: jobs.submit was cut off while it was submitted"
    )


@pytest.mark.parametrize("state", ["suspended", "pending", "running"])
def test_a_run_that_another_submission_trains_is_refused(
    state: str, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_run = {"job": "train", "run": Path("/runs/r"), "native": "x"}
    records.reserve(submission("first", **of_run))
    monkeypatch.setattr("pipeline.cluster.local.Local.submit", lambda *_: "/x/second")
    states = {"first": state}
    monkeypatch.setattr(manager, "current", lambda record: Status(states[record.name], ""))
    with pytest.raises(UserError, match=rf"first is {state} and trains /runs/r, too: stop it first"):
        manager.submit(records, submission("second", **of_run))
    assert records.names() == ["first"]
    manager.submit(records, submission("other", **of_run | {"run": Path("/runs/s")}))
    states |= {"first": "stopped", "other": "running"}
    manager.submit(records, submission("second", **of_run))


def test_a_submission_does_not_wait_for_one_that_failed(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Status("unknown", "")
    monkeypatch.setattr(manager, "current", lambda _: found)
    first = submission("first", native="7")
    for state in ("running", "succeeded", "unknown"):
        found = Status(state, "exit code 3")
        assert manager.must_succeed(first, "local") == "7"
    with pytest.raises(UserError, match="after: first was submitted to cluster=local, which"):
        manager.must_succeed(first, "slurm")
    for state, said in (("failed", "has failed"), ("stopped", "has been stopped")):
        found = Status(state, "exit code 3")
        with pytest.raises(UserError, match=rf"after: first {said}: exit code 3\. Submit it again"):
            manager.must_succeed(first, "local")


def test_what_waited_for_one_that_failed_is_not_submitted_again(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "current", lambda _: Status("failed", "exit code 3"))
    records.reserve(submission("first", native="7"))
    second = submission("second", native="8", work=Workload.model_validate(WORK | {"name": "second", "after": ["7"]}))
    with pytest.raises(UserError, match="after: first has failed"):
        manager.resubmit(records, second)


def test_a_full_disk_leaves_no_record_of_what_was_not_submitted(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.submission.records.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        records.reserve(submission())
    assert records.names() == []


def test_an_interruption_of_a_submission_leaves_its_record(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.cluster.local.Local.submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        manager.submit(records, submission())
    assert "cut off" in manager.current(records.read("prep")).detail


@pytest.mark.parametrize("native", [None, "ml/prep"])
def test_a_submission_whose_answer_was_lost_keeps_its_record(
    native: str | None, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unanswered(*_: object) -> str:
        raise UnansweredError("no answer", native)

    monkeypatch.setattr("pipeline.cluster.local.Local.submit", unanswered)
    with pytest.raises(UserError, match="no answer"):
        manager.submit(records, submission())
    assert records.read("prep").native == native


def test_a_folder_that_cannot_be_made_is_one_line() -> None:
    with pytest.raises(UserError, match=r"/proc/x: cannot be made .*: set submissions="):
        Records(Path("/proc/x")).reserve(submission())


def test_a_damaged_record_does_not_hide_the_others(records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("good", "bad"):
        records.reserve(submission(name))
    records.file("bad").write_text(records.file("good").read_text())
    assert [line.split()[0] for line in manager.listed(records).splitlines()] == ["id", "good"]
    assert capsys.readouterr().err.count("bad.json") == 1


@pytest.mark.parametrize("content", ["", '{"state": "trai', "[]"])
def test_a_damaged_status_of_a_run_does_not_hide_the_state_of_its_job(content: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("")
    (run.path / "status.json").write_text(content)
    said = manager.status(submission(job="train", run=run.path, native=str(tmp_path)))
    assert "state  failed: ended without an exit code" in said
    assert f"run    {run.path / 'status.json'}" in said


def test_a_file_whose_name_is_no_id_is_not_a_record(records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    records.reserve(submission())
    (records.folder / "My Notes.json").write_text("{}")
    assert len(manager.listed(records).splitlines()) == 2
    assert capsys.readouterr().err == ""


def test_rank_0_of_one_process_is_all_of_its_log_and_other_ranks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("12:00:00  step 1\n")
    found = submission(native=str(tmp_path))
    assert [*manager.logs(found, 0, follow=False)] == ["12:00:00  step 1"]
    for rank in (-1, 1):
        with pytest.raises(UserError, match=f"rank={rank}: prep has rank 0 alone"):
            [*manager.logs(found, rank, follow=False)]


def test_what_to_type_next_finds_the_records_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.cluster.local.Local.submit", lambda *_: "/x/prep")
    for folder, option in ((tmp_path / "ours", f" submissions={tmp_path}/ours"), (None, "")):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        manager.submit(Records(folder), submission())
        assert capsys.readouterr().err.endswith(f"python -m jobs.submit logs prep follow=true{option}\n")
    assert Records(Path("a b")).option == """ 'submissions='"'"'a b'"'"''"""


def test_the_newest_submission_is_listed_first(records: Records) -> None:
    for name, when in (("old", 10.0), ("new", 30.0), ("mid", 20.0)):
        records.reserve(submission(name, time=when))
    assert [line.split()[0] for line in manager.listed(records).splitlines()] == ["id", "new", "mid", "old"]


def test_a_cluster_that_does_not_answer_is_asked_once(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, clock = [], iter(range(0, 1000, 60))

    def current(record: Record) -> Status:
        asked.append(record.name)
        return Status("unknown", "no answer")

    for name, when in (("old", 10.0), ("new", 30.0), ("mid", 20.0)):
        records.reserve(submission(name, time=when))
    monkeypatch.setattr(manager, "current", current)
    monkeypatch.setattr(manager, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: next(clock)}))
    assert [line.split()[3] for line in manager.listed(records).splitlines()[1:]] == ["unknown"] * 3
    assert asked == ["new"]


def test_the_revision_is_that_of_the_code_not_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = revision()
    monkeypatch.chdir(tmp_path)
    assert revision() == here


@pytest.mark.parametrize(
    ("quantity", "number"),
    [
        ("500m", 0.5),
        ("4", 4),
        ("1.5", 1.5),
        ("16Gi", 16 << 30),
        ("1k", 1000),
        ("2M", 2 * 10**6),
        ("3Ki", 3072),
        ("1Ti", 1 << 40),
    ],
)
def test_quantities_are_numbers(quantity: str, number: float) -> None:
    assert amount(quantity) == number


class Scoring(SimpleNamespace):
    """Settings of a job without a run here: only what resources are derived from."""


def resolved(cluster: Cluster | None = None, settings: Any = None, **given: Any) -> resources.Request:
    cluster = cluster or Cluster(backend="none")
    return resources.resolve("evaluate", settings or Scoring(), None, Resources.model_validate(given), cluster)


def test_what_is_given_comes_before_the_jobs_defaults_before_the_clusters_before_what_is_derived() -> None:
    cluster = Cluster(
        backend="none",
        resources=Resources.model_validate({"cpu": 3, "memory": "30Gi", "retries": 7}),
        jobs={"evaluate": Resources.model_validate({"memory": "40Gi", "grace_s": 9})},
    )
    found = resolved(cluster, memory="50Gi").resources
    assert (found.memory, found.cpu, found.grace_s, found.retries) == ("50Gi", "3", 9, 7)
    assert resolved(cluster).resources.memory == "40Gi"
    assert (found.nodes, found.ranks_per_node, found.time_limit_s) == (NodeRange(1, 1), 1, 86400)


def test_memory_of_ranks_is_their_processes_their_model_and_kept_rows() -> None:
    found = resolved(settings=Scoring(memory=8.0), ranks_per_node=2).resources
    assert found.memory == "27Gi", "1.5 GiB of a process, 4 of a model that is not known here, 8 of rows"
    assert found.cpu == "4"
    assert resolved(settings=Scoring(memory=8.0), gpus_per_node=4).resources.memory == "144Gi", "4 + 24 + 8"


def test_shared_memory_of_a_pod_is_part_of_the_memory_that_is_derived() -> None:
    pods, settings = KubernetesSettings(), Scoring(memory=8.0)
    assert resolved(pods, settings, ranks_per_node=2).resources.memory == "29Gi", "27, 1 of the pod, 2 * 0.5"
    assert resolved(pods, settings, gpus_per_node=4).resources.memory == "153Gi", "144, 1 of the pod, 4 * 2"
    assert resolved(pods, settings, memory="40Gi").resources.memory == "40Gi"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"gpus_per_node": 8, "cpu": 2, "memory": "100Gi"},
            "cpu=2 is too little: 8 processes on a node need 16 at least, 64",
        ),
        (
            {"gpus_per_node": 8, "cpu": 64, "memory": "8Gi"},
            "memory=8Gi is too little: 8 processes on a node take 4 GiB each",
        ),
        ({"ranks_per_node": 4, "cpu": 1}, "cpu=1 is too little: 4 processes on a node need 2 at least, 8 are right"),
    ],
)
def test_resources_that_cannot_be_right_are_refused_before_anything_is_queued(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolved(**given)


def test_a_job_without_a_run_is_not_said_to_lack_its_model() -> None:
    assert resolved(settings=Scoring(run=Path("/runs/none"))).notes[0].endswith("/runs/none is not on this machine")
    assert resolved().notes == ["not checked: memory, since evaluate names no run whose model it holds"]


def test_a_store_that_this_machine_does_not_reach_is_waited_for_once_and_shortly(tmp_path, monkeypatch) -> None:
    asked = []

    def refused(*_: object, **__: object) -> None:
        asked.append(time.monotonic())
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    for method in ("info", "find", "ls", "cat_file", "_open"):
        monkeypatch.setattr(MemoryFileSystem, method, refused)
    monkeypatch.setattr(reach, "ANSWER_S", 0.3)
    monkeypatch.setenv("TASKFUSE_STORE_TIMEOUT", "3")
    run = place("memory://unreachable/run")
    started = time.monotonic()
    assert resolved(settings=Scoring(run=run)).notes[0].endswith("memory://unreachable/run is not on this machine")
    assert asked
    asked.clear()
    said = manager.status(submission(job="train", run=run, native=str(tmp_path)))
    assert "memory://unreachable/run: nothing written yet, or not seen from this machine" in said
    assert asked == []
    assert time.monotonic() - started < 3


def test_a_path_of_a_job_is_found_where_this_machine_sees_it() -> None:
    cluster = Cluster(backend="none", paths={Path("/runs"): Path("/mnt/shared/runs")})
    assert cluster.seen_here(Path("/runs/a/b")) == Path("/mnt/shared/runs/a/b")
    assert cluster.seen_here(Path("/running/a")) == Path("/running/a")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    found = Run(tmp_path / "run")
    (found.path / "metrics").mkdir(parents=True)
    return found


def lines_of(run: Run) -> dict[str, str]:
    found = progress.read(run.path)
    assert found is not None
    return dict(progress.lines(found))


def test_progress_is_what_the_run_wrote_last(run: Run) -> None:
    assert progress.read(run.path) is None
    run.write_status("training", 1500, 6000)
    trained = {"step": 1500, "rows_per_s": 61_400.0, "seconds_left": 3700.0, "ne": {"click": 0.8123, "buy": None}}
    run.train_metrics.write_text("".join(json.dumps(line) + "\n" for line in [{"step": 1}, trained]))
    said = lines_of(run)
    assert said["step"] == "1,500 of 6,000 (25%)"
    assert (said["rows/s"], said["time left"]) == ("61,400", "1h 01m")
    assert said["metrics"] == "NE click .8123 (train, step 1,500)"
    assert "checkpoint" not in said


def test_the_newest_evaluation_and_checkpoint_are_shown_with_their_steps(run: Run) -> None:
    run.write_status("finished", 20, 20)
    for step in (10, 20):
        checksum = commit(run, step)
        set_commit_time(run, step, time.time() - 90)
        with run.eval_metrics.open("a") as file:
            file.write(json.dumps(record(step, checksum, metrics={"click": {"ne": 0.9 - step / 1000}})) + "\n")
    said = lines_of(run)
    assert said["checkpoint"] == "step 20, 1m 30s ago"
    assert said["metrics"] == "NE click .8800 (test, step 20)"
    assert "rows/s" not in said, "the run has ended"


def test_restarts_are_shown_with_their_reasons_the_last_three(run: Run) -> None:
    run.write_status("training", 40, 100)
    for step, reason in [
        (0, "start"),
        (10, "resume"),
        (20, "a\x1b[31m"),
        (30, "lost contact with rank 3"),
        (35, "resume"),
    ]:
        run.add_start(step, ranks=4, nodes=2, reason=reason)
    found = progress.read(run.path)
    assert found is not None
    said = [value for what, value in progress.lines(found) if what in ("restarts", "")]
    assert said[0] == "4, the last ones:"
    assert [line.partition(" ago ")[2] for line in said[1:]] == [
        "from step 20 on 4 ranks of 2 nodes: a\\x1b[31m",
        "from step 30 on 4 ranks of 2 nodes: lost contact with rank 3",
        "from step 35 on 4 ranks of 2 nodes: resume",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.6, "1m 00s"), (200, "3m 20s"), (7500, "2h 05m"), (273600, "3d 4h")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_records_stay_those_of_the_folder_they_are_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert Records(None).folder == tmp_path / "taskfuse" / "submissions"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    assert Records(None).folder == tmp_path / ".local" / "state" / "taskfuse" / "submissions"


def test_what_a_store_is_read_ahead_into_is_part_of_the_memory_that_is_derived() -> None:
    for workers, processes in [(0, 1), (3, 3)]:
        train = SimpleNamespace(decode_workers=workers, read_ahead_bytes=7)
        local, stored = (
            resources.decoding_bytes(SimpleNamespace(dataset=place(text), train=train), "cpu", 8)
            for text in ("data", "s3://bucket/data")
        )
        assert (local, stored - local) == (workers << 29, 7 * processes)
