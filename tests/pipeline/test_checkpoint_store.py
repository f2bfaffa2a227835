"""Checkpoints on an S3 server: the numbers of one on disk, in bounded memory, and whole or not there whatever happens."""

import tracemalloc
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_checkpoint import MANIFEST, saved, state
from store_fixtures import FaultProxy

from features.errors import UserError
from pipeline.run import checkpoint
from pipeline.run.checkpoint import lock, manifest, rows, writer
from pipeline.run.run import LostRunError, Run
from pipeline.storage import object_files
from pipeline.storage.store_path import StorePath, files_below

pytestmark = [pytest.mark.usefixtures("group"), pytest.mark.integration]

SMALL = {"model": {"a.weight": torch.arange(35.0).reshape(7, 5), "ids": torch.arange(40)}, "step": torch.tensor(3.0)}


def names(folder: StorePath) -> list[str]:
    return [str(path).removeprefix(f"{folder}/") for path in files_below(folder)]


def unfinished(folder: StorePath) -> list[str]:
    found = folder.system.call_s3("list_multipart_uploads", Bucket="bucket").get("Uploads", [])
    return [upload["Key"] for upload in found if folder.key.partition("/")[2] in upload["Key"]]


def test_a_checkpoint_of_many_parts_has_the_bytes_of_one_on_disk_and_no_second_copy_in_memory(
    s3: StorePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "CHECKED_BYTES", 12 << 20)
    monkeypatch.setattr(object_files, "PART_BYTES", 5 << 20)  # the least that S3 takes
    monkeypatch.setattr(object_files, "PARTS_AT_ONCE", 2)
    large = {"table": torch.arange(1 << 23, dtype=torch.int64).reshape(-1, 8), "small": torch.ones(3)}  # 64 MB
    on_disk = checkpoint.save(tmp_path, large, MANIFEST)
    tracemalloc.start()  # of what Python takes; tensors are not among it
    path = checkpoint.save(s3, large, MANIFEST)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 48 << 20  # two parts, the next one, and what the client copies of each

    here, there = checkpoint.check(on_disk), checkpoint.check(path)
    assert sorted(here.files.values())[-1] == sorted(there.files.values())[-1]  # bytes and checksum
    assert {*names(path)} == {*there.files, "manifest.json"}
    loaded: dict[str, Any] = {"table": torch.zeros(1 << 20, 8, dtype=torch.int64), "small": torch.zeros(3)}
    checkpoint.load(path, loaded)
    assert torch.equal(loaded["table"], large["table"])
    assert torch.equal(loaded["small"], large["small"])
    row_N = np.unique(np.concatenate([np.arange(100, 200), np.random.default_rng(0).integers(0, 1 << 20, 30)]))
    found_ND = torch.zeros(len(row_N), 8, dtype=torch.int64)
    checkpoint.load_rows(path, {"table": (row_N, found_ND)})
    assert torch.equal(found_ND, large["table"][row_N])
    monkeypatch.setattr(rows, "GATHER_BYTES", 3200)
    found_ND.zero_()
    checkpoint.load_rows(path, {"table": (row_N, found_ND)})
    assert torch.equal(found_ND, large["table"][row_N])


def test_what_a_killed_writer_has_left_is_no_checkpoint_and_is_removed(s3: StorePath) -> None:
    kept = checkpoint.save(s3, SMALL, MANIFEST)
    left = checkpoint.folder(s3, 4)
    (left / "rank-00000-0.bin").write_bytes(b"half")
    (left / "tensors.json").write_bytes(b"{}")
    key = str(left / "rank-00001-0.bin").removeprefix("s3://bucket/")
    s3.system.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    other = str(s3).removeprefix("s3://bucket/") + "-beside/file"
    s3.system.call_s3("create_multipart_upload", Bucket="bucket", Key=other)
    assert checkpoint.steps(s3) == [3]
    checkpoint.tidy(s3)
    assert unfinished(s3) == [other]
    assert {name.partition("/")[0] for name in names(s3)} == {kept.name}
    checkpoint.check(kept)
    # Without `tidy`, as after a rollback: the next one of this step takes the place.
    (left / "rank-00009-0.bin").write_bytes(b"half")
    checkpoint.check(checkpoint.save(s3, SMALL, MANIFEST.model_copy(update={"step": 4})))


def test_what_a_killed_deleter_has_left_is_no_checkpoint_and_is_removed(
    memory: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path) -> None:
        raise SystemExit

    path = saved(memory)
    with monkeypatch.context() as patched:
        patched.setattr(lock, "discard", killed)
        with pytest.raises(SystemExit):
            checkpoint.remove(path)
    assert checkpoint.steps(memory) == []
    checkpoint.tidy(memory)
    assert names(memory) == []


def test_a_damaged_checkpoint_is_replaced_once_nobody_reads_it(s3: StorePath) -> None:
    path = saved(s3)
    with checkpoint.reading(path):
        assert not checkpoint.remove(path)
        [data] = [path / name for name in checkpoint.check(path).files if name.endswith(".bin")]
    data.write_bytes(b"\1" + data.read_bytes()[1:])
    with pytest.raises(UserError, match=r"\.bin: its checksum is not the manifest's"):
        checkpoint.check(path)
    assert checkpoint.save(s3, SMALL, MANIFEST) == path
    loaded = state()
    checkpoint.check(path)
    checkpoint.load(path, loaded)
    assert torch.equal(loaded["model"]["ids"], torch.arange(40))
    assert checkpoint.remove(path)
    assert names(s3) == []
    with pytest.raises(UserError, match="not a checkpoint"), checkpoint.reading(path):
        pass


def test_of_two_writers_of_one_step_the_first_commits_and_the_other_changes_nothing_of_it(s3: StorePath) -> None:
    calls = 0

    def another_commits_meanwhile() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # all files are sent, the manifest comes next
            checkpoint.save(s3, SMALL, MANIFEST)

    theirs = {**SMALL, "step": torch.tensor(9.0)}
    with pytest.raises(UserError, match=r"step-00000003: cannot be written: .*exists"):
        checkpoint.save(s3, theirs, MANIFEST, before=another_commits_meanwhile)
    path = checkpoint.folder(s3, 3)
    files = checkpoint.check(path).files
    assert {*names(path)} == {*files, "manifest.json"}
    loaded = state()
    checkpoint.load(path, loaded)
    assert loaded["step"] == 3


@pytest.mark.parametrize("call", [1, 2], ids=["before it begins", "before it commits"])
def test_a_writer_whose_run_is_lost_commits_nothing_and_removes_nothing(s3: StorePath, call: int) -> None:
    checkpoint.save(s3, SMALL, MANIFEST)
    before, calls = names(s3), 0

    def lost() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise LostRunError("another has it")

    step = 3 if call == 1 else 4
    with pytest.raises(LostRunError, match="another has it"):
        checkpoint.save(s3, SMALL, MANIFEST.model_copy(update={"step": step}), before=lost)
    assert checkpoint.steps(s3) == [3]
    assert {*before} <= {*names(s3)}
    checkpoint.check(checkpoint.folder(s3, 3))


def test_answers_that_fail_cost_a_checkpoint_nothing(
    through_proxy: StorePath, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_files, "PART_BYTES", 5 << 20)  # the least that S3 takes
    turn = iter(range(1000))
    faults = {5: 503, 9: "lost", 13: "reset", 17: "lost", 23: "cut"}
    proxy.fault = lambda method, path: faults.get(next(turn) % 29)
    content = {"table": torch.arange(3 << 19, dtype=torch.int64)}
    path = checkpoint.save(through_proxy, content, MANIFEST)
    proxy.fault = lambda method, path: None
    assert {method for method, _ in proxy.requests} >= {"PUT", "POST", "GET", "HEAD"}
    checkpoint.check(path)
    loaded = {"table": torch.zeros(3 << 19, dtype=torch.int64)}
    checkpoint.load(path, loaded)
    assert torch.equal(loaded["table"], content["table"])
    assert unfinished(through_proxy) == []


def test_a_store_that_stays_away_is_one_line_and_leaves_no_checkpoint(
    through_proxy: StorePath, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKFUSE_STORE_TIMEOUT", "1.5")
    saved(through_proxy)
    calls = 0

    def away() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            proxy.stop()

    with pytest.raises(UserError, match=r"step-00000004: cannot be written: .*has not answered for 1.5 s"):
        checkpoint.save(through_proxy, SMALL, MANIFEST.model_copy(update={"step": 4}), before=away)
    proxy.start()
    assert checkpoint.steps(through_proxy) == [3]


def test_a_manifest_whose_answer_is_lost_for_good_leaves_a_whole_checkpoint(
    memory: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKFUSE_STORE_TIMEOUT", "0.1")
    system = type(memory.system)
    pipe_file = system.pipe_file

    def unanswered(self: Any, path: str, content: bytes, **named: Any) -> Any:
        if not path.endswith("manifest.json"):
            return pipe_file(self, path, content, **named)
        pipe_file(self, path, content)
        raise TimeoutError("away")

    with monkeypatch.context() as patched:
        patched.setattr(system, "pipe_file", unanswered)
        with pytest.raises(UserError, match=r"cannot be written: .*has not answered"):
            checkpoint.save(memory, SMALL, MANIFEST)
    assert checkpoint.steps(memory) == [3]
    checkpoint.check(checkpoint.folder(memory, 3))


def test_pruning_keeps_the_best_the_pinned_and_the_newest_and_leaves_no_file_of_the_others(memory: StorePath) -> None:
    from pipeline.run import records, retention

    run, metrics = Run(memory / "run"), {"ne": 1.0, "rows": 10}
    for step in range(1, 7):
        path = checkpoint.save(run.checkpoints, SMALL, MANIFEST.model_copy(update={"step": step}))
        record = {
            "step": step, "checkpoint": checkpoint.read(path).checksum, "split": "valid", "dataset": "/data", "share": 1.0,
            "metrics": {"click": {**metrics, "ne": 0.5 if step == 2 else 0.9}},
        }  # fmt: skip
        records.put(run, record)
    retention.pin(run, 4, memory / "serving")
    with checkpoint.reading(checkpoint.folder(run.checkpoints, 3)):
        retention.prune(run, retention.Keep(last=1, best="valid"), "/data", 6)
    assert checkpoint.steps(run.checkpoints) == [2, 3, 4, 6]
    retention.unpin(run, 4, memory / "serving")
    retention.prune(run, retention.Keep(last=1, best="valid"), "/data", 6)
    assert checkpoint.steps(run.checkpoints) == [2, 6]
    assert {name.partition("/")[0] for name in names(run.checkpoints)} == {"step-00000002", "step-00000006"}


def test_no_whole_checkpoint_is_passed_over_where_a_store_does_not_answer_or_refuses(
    memory: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.run import records
    from pipeline.training.restore import resume

    monkeypatch.setenv("TASKFUSE_STORE_TIMEOUT", "0.1")
    run, system = Run(memory / "run"), type(memory.system)
    for step in (3, 4, 5):
        checkpoint.save(run.checkpoints, SMALL, MANIFEST.model_copy(update={"step": step}))
    data = next(file for file in files_below(checkpoint.folder(run.checkpoints, 5)) if file.suffix == ".bin")
    data.write_bytes(b"\1" + data.read_bytes()[1:])
    assert resume.newest(run) == checkpoint.folder(run.checkpoints, 4)  # a damaged one is passed over
    cat_file = system.cat_file
    for error, name in product((TimeoutError("away"), PermissionError("expired")), ("manifest.json", ".bin")):

        def failing(self: Any, path: str, *rest: Any, error: Any = error, name: str = name, **named: Any) -> bytes:
            if "step-00000004" in path and path.endswith(name):
                raise error
            return cat_file(self, path, *rest, **named)

        with monkeypatch.context() as patched:
            patched.setattr(system, "cat_file", failing)
            with pytest.raises(UserError, match=r"step-00000004: cannot be read now: .*(answered|refuses)"):
                resume.newest(run)
            if name == "manifest.json":
                for call in (lambda: resume._order(run), lambda: records.checksum(run, 4)):
                    data.parent.joinpath("manifest.json").write_bytes(b"{")
                    with pytest.raises(UserError, match="cannot be read now"):
                        call()


def test_files_of_a_writer_that_was_taken_for_dead_come_late_and_change_nothing(
    memory: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = writer._write

    def among_others(folder: StorePath, *arguments: Any) -> Any:
        for name in ("rank-00000-aaaaaaaaaaaa.bin", "tensors.json", "tensors-aaaaaaaaaaaa.json"):
            (folder / name).write_bytes(b"late")
        return write(folder, *arguments)

    monkeypatch.setattr(writer, "_write", among_others)
    path = checkpoint.save(memory, SMALL, MANIFEST)
    files = checkpoint.check(path).files
    assert {*names(path)} == {*files, "manifest.json"}
    (path / "tensors.json").write_bytes(b"later still")
    loaded = state()
    checkpoint.load(path, loaded)
    assert torch.equal(loaded["model"]["ids"], torch.arange(40))


def test_a_bucket_that_does_not_exist_is_named(s3: StorePath) -> None:
    run = Run(StorePath("s3://no-such-bucket/run"))
    for call in (lambda: run.lock("train", "another trainer writes to it"), lambda: run.wait_for_lock("eval")):
        with pytest.raises(UserError, match=r"s3://no-such-bucket does not exist"):
            call()


def test_uploads_that_were_left_are_dropped_page_by_page_whatever_the_connection_does(
    s3: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ConnectionClosedError

    call, left, failures = s3.system.call_s3, [f"u{number}" for number in range(5)], [1, 1, 1]

    def paged(self: Any, name: str, **named: Any) -> Any:
        if name == "abort_multipart_upload":
            if failures:
                failures.pop()
                raise ConnectionClosedError(endpoint_url="http://here")
            return left.remove(named["UploadId"])
        if name != "list_multipart_uploads":
            return call(name, **named)
        found = [upload for upload in left if upload > named.get("UploadIdMarker", "")]
        page = [{"Key": "k", "UploadId": upload} for upload in found[:2]]
        last = page[-1]["UploadId"] if page else ""
        return {"Uploads": page, "IsTruncated": len(found) > 2, "NextKeyMarker": "k", "NextUploadIdMarker": last}

    monkeypatch.setattr(type(s3.system), "call_s3", paged)
    checkpoint.tidy(s3)
    assert left == []


def test_checkpoints_are_listed_in_one_question_however_many_there_are(
    memory: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 9):
        (checkpoint.folder(memory, step) / "manifest.json").write_bytes(b"{}")
    for beside in ("step-00000009/rank.bin", "other/manifest.json", "step-00000010/deep/manifest.json"):
        (memory / beside).write_bytes(b"{}")
    asked: list[str] = []
    for name in ("find", "ls", "info", "exists"):
        call = getattr(type(memory.system), name)
        monkeypatch.setattr(
            type(memory.system), name, lambda *a, call=call, name=name, **k: (asked.append(name), call(*a, **k))[1]
        )
    assert checkpoint.steps(memory) == list(range(1, 9))
    assert asked.count("info") + asked.count("exists") < 8
    assert asked.count("find") == 1


def test_a_line_on_a_store_can_be_read_after_a_flush(memory: StorePath) -> None:
    from pipeline.run.outbox import Outbox

    run = Run(memory / "run")
    run.outbox = Outbox()
    run.append(run.search_metrics, {"step": 1})
    run.flush()
    assert run.search_metrics.read_bytes() == b'{"step": 1}\n'
    run.outbox.close()
