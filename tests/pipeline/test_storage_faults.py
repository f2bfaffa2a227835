"""Stores that fail: errors, answers that are late, cut or lost, a server that is killed; and no secret in what is logged."""

import errno
import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import SECRET, S3Server
from store_fixtures import FaultProxy, use_store

from features.errors import UserError
from pipeline.storage import files as storage_files
from pipeline.storage import object_files, patience, store_path
from pipeline.storage.conditional import Changed, read_version, write_new, write_over
from pipeline.storage.files import append_line, copy_file, read_lines, remove_tree, sha256
from pipeline.storage.patience import may_pass, patiently, without_secrets
from pipeline.storage.store_path import StorePath
from pipeline.storage.uploading import uploading

pytestmark = pytest.mark.system
BIG = bytes(range(256)) * 50_000  # 12.8 MB


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.TIMEOUT, "8")


def uploads(root: StorePath) -> list[Any]:
    bucket, _, key = root.key.partition("/")
    found = root.system.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])
    return [each for each in found if each["Key"].startswith(key)]


def test_each_call_is_repeated_until_it_is_answered(through_proxy: StorePath, proxy: FaultProxy) -> None:
    root, kinds = through_proxy, ["reset", "lost", "cut", 503]
    (root / "a" / "b").write_bytes(b"b")
    for number, call in enumerate((
        lambda: (root / "a" / "c").write_bytes(b"c"),
        lambda: (root / "a" / "b").read_bytes(),
        lambda: (root / "a").is_dir(),
        lambda: list(root.rglob("*")),
        lambda: list((root / "a").iterdir()),
        lambda: (root / "a" / "c").rename(root / "a" / "d"),
        lambda: write_new(root / "new", b"new"),
        lambda: remove_tree(root / "a"),
    )):  # fmt: skip
        faults: list[Any] = [kinds[(number + turn) % 4] for turn in range(3)]  # botocore itself tries twice
        proxy.fault = lambda method, path, faults=faults: faults.pop() if faults else None  # type: ignore[misc]
        call()
        assert len(faults) < 3
    assert [path.name for path in root.iterdir() if path.exists()] == ["new"]
    with pytest.raises(FileExistsError):
        write_new(root / "new", b"new")  # the same content, and yet another's


def test_a_put_whose_answer_was_lost_is_known_again(through_proxy: StorePath, proxy: FaultProxy) -> None:
    file = through_proxy / "file"
    proxy.fail("lost", times=2, method="PUT")
    write_new(file, b"one")
    found = read_version(file)
    assert found
    proxy.fail("lost", times=2, method="PUT")
    version = write_over(file, b"two", found[1])
    assert read_version(file) == (b"two", version)
    with pytest.raises(Changed):
        write_over(file, b"three", found[1])


def test_a_store_that_takes_no_conditions_is_not_taken_for_another_writer(
    s3: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    (s3 / "file").write_bytes(b"1")
    found = read_version(s3 / "file")
    assert found

    def refuse(*_: object, **named: object) -> None:
        raise answer(400, "InvalidRequest")

    monkeypatch.setattr(s3.system, "pipe_file", refuse)
    for call in (
        lambda: write_new(s3 / "new", b"2"),
        lambda: write_over(s3 / "file", b"2", found[1]),
        lambda: append_line(s3 / "lines", {}),
    ):
        with pytest.raises(OSError, match="InvalidRequest") as refused:
            call()
        assert type(refused.value) is OSError


def test_a_deletion_of_many_files_that_leaves_one_is_an_error(s3: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    (s3 / "folder" / "file").write_bytes(b"1")
    real = s3.system.call_s3

    def refuse(method: str, **named: Any) -> Any:
        if method == "delete_objects":
            return {"Errors": [{"Code": "AccessDenied", "Message": "it is locked", "Key": "file"}]}
        return real(method, **named)

    monkeypatch.setattr(s3.system, "call_s3", refuse)
    with pytest.raises(PermissionError, match="1 objects cannot be deleted: it is locked"):
        remove_tree(s3 / "folder")


def test_a_store_that_stays_away_ends_in_time_with_one_line(
    through_proxy: StorePath, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = through_proxy / "file"
    file.write_bytes(b"x")
    # A try may take a second (botocore's own pause after a 503): four leave time for one that ends between the first line
    # and the limit.
    for fault, limit in (("hang", 1), (503, 4), (503, 4)):
        monkeypatch.setenv(patience.TIMEOUT, str(limit))
        proxy.fault = lambda method, path, fault=fault: fault  # type: ignore[misc]
        started = time.monotonic()
        with pytest.raises(OSError, match=f"has not answered for {limit} s") as error:
            file.read_bytes()
        assert (error.value.errno, error.value.filename) == (errno.ETIMEDOUT, str(file))
        assert limit - 0.1 < time.monotonic() - started < limit + 4, fault
    assert len(caplog.records) == 1, "once, however often it is asked"
    assert "does not answer" in caplog.records[0].message
    proxy.fault = lambda method, path: None
    assert file.read_bytes() == b"x"
    assert len(caplog.records) == 2
    assert "answers again" in caplog.records[1].message


def test_no_secret_is_said(
    s3: StorePath, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "wrong-" + SECRET
    root = use_store({**s3_server.env, "AWS_SECRET_ACCESS_KEY": wrong}, monkeypatch)
    with pytest.raises(PermissionError, match="the store refuses") as refused:
        (root / "a").write_bytes(b"x")
    said = [str(refused.value)]
    monkeypatch.setenv(patience.TIMEOUT, "1")
    url = s3_server.url.replace("http://", f"http://user:{wrong}@").rpartition(":")[0] + ":1"
    root = use_store({**s3_server.env, "AWS_ENDPOINT_URL": url, "AWS_SECRET_ACCESS_KEY": wrong}, monkeypatch)
    with pytest.raises(OSError, match="has not answered") as silent:
        (root / "a").read_bytes()
    said += [str(silent.value), caplog.text]
    assert not any(wrong in text or SECRET in text for text in said)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    root = use_store({"AWS_ENDPOINT_URL": s3_server.url, "HOME": "/nonexistent"}, monkeypatch)
    monkeypatch.setenv(patience.TIMEOUT, "6")
    started = time.monotonic()
    with pytest.raises(PermissionError, match="credentials"):
        (root / "a").read_bytes()
    assert time.monotonic() - started < 3, "asking again changes nothing"


def test_texts_lose_their_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountKey-abcdef")
    text = "https://u:p@host/c?sv=1&sig=ab%2Fc&X-Amz-Signature=99&x=1 AccountKey-abcdef"
    assert without_secrets(text) == "https://…@host/c?sv=1&sig=…&X-Amz-Signature=…&x=1 …"


def answer(status: int, code: str) -> OSError:
    """As s3fs raises it."""
    from botocore.exceptions import ClientError

    error = OSError(errno.EINVAL, code)
    error.__cause__ = ClientError(
        {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}},  # type: ignore[typeddict-item]
        "PutObject",
    )
    return error


def errors() -> Iterator[tuple[BaseException, bool]]:
    import asyncio

    from botocore import exceptions

    http = type("HttpError", (Exception,), {"__module__": "gcsfs.retry", "code": 503})
    missing = type("HttpError", (Exception,), {"__module__": "gcsfs.retry", "code": 404})
    azure = type("ServiceRequestError", (Exception,), {"__module__": "azure.core.exceptions"})
    login = type("DefaultCredentialsError", (Exception,), {"__module__": "google.auth.exceptions"})
    yield from [
        (answer(500, "InternalError"), True), (answer(503, "SlowDown"), True), (answer(429, "x"), True),
        (answer(400, "BadDigest"), True), (answer(412, "PreconditionFailed"), False), (answer(403, "AccessDenied"), False),
        (answer(501, "NotImplemented"), False),
        (exceptions.NoCredentialsError(), False), (exceptions.EndpointConnectionError(endpoint_url="x"), True),
        (exceptions.CredentialRetrievalError(provider="x", error_msg="x"), True),
        (exceptions.PartialCredentialsError(provider="x", cred_var="x"), False),
        (exceptions.ReadTimeoutError(endpoint_url="x"), True), (exceptions.ParamValidationError(report="x"), False),
        (http(), True), (missing(), False), (azure(), True), (login(), False), (asyncio.TimeoutError(), True),
        (OSError("HDFS connection failed"), True), (ConnectionResetError(errno.ECONNRESET, "x"), True),
        (OSError(errno.EROFS, "x"), False), (OSError(errno.ENOSPC, "x"), False), (FileNotFoundError("x"), False),
        (RuntimeError("a bug"), False), (KeyError("a bug"), False), (KeyboardInterrupt(), False),
    ]  # fmt: skip


@pytest.mark.parametrize(("error", "passing"), errors(), ids=lambda value: repr(value)[:40])
def test_which_errors_another_try_may_not_meet(error: BaseException, passing: bool) -> None:
    assert may_pass(error) is passing


def test_a_bug_is_not_taken_for_a_silent_store() -> None:
    with pytest.raises(ZeroDivisionError):
        patiently("s3://bucket/a", lambda: 1 // 0)


@pytest.mark.parametrize("limit", ["soon", "nan", "-1"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.TIMEOUT, limit)
    with pytest.raises(UserError, match=f"TASKFUSE_STORE_TIMEOUT={limit} in the environment is no number of seconds"):
        patiently("s3://bucket/a", lambda: 1)


@pytest.mark.parametrize("url", ["localhost:9000", "http//host", f"http://user:{SECRET}@bad host:1"])
def test_an_endpoint_that_is_no_url_is_refused_without_its_password(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL in the environment is no URL") as refused:
        StorePath("s3://bucket/a").read_bytes()
    assert SECRET not in str(refused.value)


def test_a_server_that_is_killed_and_started_again_is_waited_for(
    s3: StorePath, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(patience.TIMEOUT, "60")
    monkeypatch.setattr(object_files, "PART_BYTES", 5 << 20)
    (s3 / "read").write_bytes(BIG)
    done: dict[str, Any] = {}
    busy, stop = threading.Event(), threading.Event()

    def write() -> None:
        for number in range(1000):
            (s3 / "many" / f"{number:04}").write_bytes(b"%d" % number)
            done["writes"] = number + 1
            if stop.is_set():
                return

    def read() -> None:
        while not stop.is_set():
            assert (s3 / "read").read_bytes() == BIG
            assert len(list((s3 / "many").iterdir())) <= 1000
            busy.set()
            time.sleep(0.1)

    def upload() -> None:
        with uploading(s3 / "upload") as file:
            for start in range(0, len(BIG), 1 << 20):
                file.write(BIG[start : start + (1 << 20)])
                if start > len(BIG) // 2:
                    stop.wait(60)
        done["upload"] = True

    threads = [threading.Thread(target=each) for each in (write, read, upload)]
    for thread in threads:
        thread.start()
    busy.wait(30)
    time.sleep(0.3)
    s3_server.kill()
    time.sleep(0.5)
    s3_server.start()
    stop.set()
    for thread in threads:
        thread.join(60)
    written = [(s3 / "many" / f"{number:04}").read_bytes() for number in range(done["writes"])]
    assert written == [b"%d" % number for number in range(done["writes"])]
    assert done["upload"]
    assert (s3 / "upload").read_bytes() == BIG
    assert uploads(s3) == []


def test_an_upload_that_fails_leaves_nothing(s3: StorePath, memory: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_files, "PART_BYTES", 5 << 20)

    def fail(file: Path) -> None:
        with uploading(file) as target:
            target.write(BIG)
            target.close()  # by a library that it was handed to
            if file.scheme == "s3":  # type: ignore[attr-defined]
                assert uploads(s3), "parts have been sent"
            raise KeyError

    for root in (s3, memory):
        (root / "old").write_bytes(b"old")
        for name in ("old", "new"):
            with pytest.raises(KeyError):
                fail(root / name)
        assert [path.name for path in root.rglob("*")] == ["old"]
        assert (root / "old").read_bytes() == b"old"
    assert uploads(s3) == []


def test_a_file_of_which_a_part_could_not_be_sent_does_not_appear_when_it_is_closed(
    through_proxy: StorePath, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_files, "PART_BYTES", 5 << 20)
    proxy.fail(403, method="POST", path="uploads")
    file = (through_proxy / "file").open("wb")
    with pytest.raises(PermissionError):
        file.write(BIG)
    file.close()
    assert not (through_proxy / "file").exists()


@pytest.mark.parametrize("size", [0, 5 << 20, (5 << 20) + 1, len(BIG)])
def test_an_upload_has_what_was_written_also_through_faults(
    size: int,
    through_proxy: StorePath,
    proxy: FaultProxy,
    memory: StorePath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(object_files, "PART_BYTES", 5 << 20)
    (tmp_path / "source").write_bytes(BIG[:size])
    for target in (through_proxy / "a", memory / "a"):
        ends: list[Any] = [404, "lost"]  # the end of an upload is done, not answered, and then the upload is unknown
        proxy.fault = lambda method, path, ends=ends: (
            ends.pop() if ends and "uploadId=" in path and method == "POST" else None
        )  # type: ignore[misc]
        copy_file(tmp_path / "source", target)
        assert not (target.parent / "none").exists()
        proxy.fail("cut", times=1, method="GET")
        assert sha256(target) == sha256(tmp_path / "source")
        copy_file(target, target.parent / "again")
        copy_file(target.parent / "again", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == BIG[:size]
        assert sorted(path.name for path in target.parent.iterdir()) == ["a", "again"]
        assert remove_tree(target.parent / "a") is None  # type: ignore[func-returns-value]


def test_an_upload_that_the_store_has_forgotten_is_not_taken_for_the_object_before_it(
    through_proxy: StorePath, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_files, "PART_BYTES", 5 << 20)
    file = through_proxy / "file"
    with uploading(file) as before:
        before.write(BIG)
    proxy.fault = lambda method, path: 404 if method == "POST" and "uploadId=" in path else None
    with pytest.raises(FileNotFoundError), uploading(file) as other:
        other.write(BIG[:-1])
    assert file.read_bytes() == BIG


def test_a_killed_upload_shows_no_object(s3: StorePath) -> None:
    code = (
        "import os, sys\nfrom pipeline.storage import object_files\nfrom pipeline.storage.store_path import place\n"
        "from pipeline.storage.uploading import uploading\nobject_files.PART_BYTES = 5 << 20\n"
        "with uploading(place(sys.argv[1])) as file:\n    file.write(bytes(12 << 20))\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(s3 / "file")], check=False).returncode == -9
    assert not (s3 / "file").exists()


def test_lines_of_several_writers_are_all_kept(s3: StorePath, memory: StorePath) -> None:
    def append(number: int) -> None:
        for count in range(5):
            append_line(s3 / "log.jsonl", {"writer": number, "count": count})

    threads = [threading.Thread(target=append, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = list(read_lines(s3 / "log.jsonl"))
    assert sorted((line["writer"], line["count"]) for line in lines) == [(w, c) for w in range(4) for c in range(5)]
    (memory / "log.jsonl").write_bytes(b'{"a": 1}\n{"a": ')
    append_line(memory / "log.jsonl", {"a": 2})
    assert [line["a"] for line in read_lines(memory / "log.jsonl")] == [1, 2]


def test_an_open_file_is_of_one_version_or_fails(s3: StorePath) -> None:
    for content in (BIG[::-1], b"short"):
        (s3 / "file").write_bytes(BIG)
        with (s3 / "file").open("rb") as file:
            assert file.read(10) == BIG[:10]
            (s3 / "file").write_bytes(content)
            with pytest.raises(OSError, match="changed while it was read") as error:
                file.read()
        assert (error.value.errno, error.value.filename) == (errno.ESTALE, str(s3 / "file"))


def test_a_file_is_read_several_ranges_ahead(
    through_proxy: StorePath, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_files, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(store_path, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(storage_files, "COPIED_BYTES", 1 << 20)
    file, lock, running, most = through_proxy / "file", threading.Lock(), [0], [0]
    file.write_bytes(BIG)

    def fetch(self: Any, *span: int) -> bytes:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        try:
            time.sleep(0.02)
            return real(self, *span)
        finally:
            with lock:
                running[0] -= 1

    real = object_files.ObjectReader._fetch
    monkeypatch.setattr(object_files.ObjectReader, "_fetch", fetch)
    copy_file(file, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BIG
    assert most[0] == object_files.READS_AT_ONCE
    assert sha256(file) == hashlib.sha256(BIG).hexdigest()
    proxy.requests.clear()
    with file.open("rb") as opened:
        assert opened.read() == BIG
    assert len(proxy.requests) <= 15
    with file.open("rb") as opened:  # as a seeking reader does
        for start, size in ((0, 3 << 20), (3 << 20, 100), (5 << 20, 1 << 20), ((6 << 20) - 7, 2 << 20), (0, 9 << 20)):
            opened.seek(start)
            assert opened.read(size) == BIG[start : start + size]


def test_a_range_that_failed_is_asked_for_again_by_the_next_read(
    memory: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_files, "READ_BYTES", 1 << 20)
    (memory / "file").write_bytes(BIG)
    fetch, failing = object_files.ObjectReader._fetch, [2 << 20]

    def fails_once(self: Any, start: int, end: int) -> bytes:
        if start in failing:
            failing.clear()
            raise OSError(errno.ETIMEDOUT, "the store has not answered", self.name)
        return fetch(self, start, end)

    monkeypatch.setattr(object_files.ObjectReader, "_fetch", fails_once)
    reader = object_files.ObjectReader("file", memory.system, (memory / "file").key, len(BIG))
    found = b"".join(reader.read(1 << 20) or b"" for _ in range(2))
    with pytest.raises(OSError, match="has not answered"):
        reader.read(1 << 20)
    while part := reader.read(1 << 20):
        found += part
    assert found == BIG


def test_a_small_file_is_read_by_one_request_with_or_without_its_version(
    through_proxy: StorePath, proxy: FaultProxy
) -> None:
    for content in (b"", b"x"):
        (through_proxy / "file").write_bytes(content)
        proxy.requests.clear()
        assert (through_proxy / "file").read_bytes() == content
        found = read_version(through_proxy / "file")
        assert found
        assert found[0] == content
        assert [method for method, _ in proxy.requests] == ["GET"] * 2
        write_over(through_proxy / "file", b"next", found[1])


def test_a_large_file_is_read_whole(s3: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_files, "LARGE_BYTES", 5)
    (s3 / "file").write_bytes(BIG)
    assert (s3 / "file").read_bytes() == BIG
