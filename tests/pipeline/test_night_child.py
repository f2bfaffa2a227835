"""The log of a night's process on a store: it is there while the process runs, and no failure of it hides the exit code."""

from pathlib import Path
from threading import Thread

from waiting import wait_for

from pipeline.release import child
from pipeline.storage.objects import ObjectStorage
from pipeline.storage.store_path import StorePath

WAITS = """
import os, time
print('first', flush=True)
end = time.monotonic() + 20
while not os.path.exists({go!r}) and time.monotonic() < end: time.sleep(.02)
print('second' if os.path.exists({go!r}) else 'nobody has read it', flush=True)
"""


def run(code: str, log: StorePath) -> int:
    return child.run_module("timeit", ["-n1", "-r1", code], 1, log)


def test_a_log_is_on_the_store_while_its_process_runs_and_of_a_long_one_the_end(memory, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(child, "PUT_S", 0.05)
    monkeypatch.setattr(child, "MAX_LOG_BYTES", 2000)
    log, go = memory / "train.log", tmp_path / "go"
    log.write_bytes(b"-" * 3000 + b"before\n")

    def reader() -> None:
        wait_for(lambda: b"first\n" in log.read_bytes())
        go.touch()

    thread = Thread(target=reader)
    thread.start()
    assert run(WAITS.format(go=str(go)), log) == 0
    thread.join()
    found = log.read_bytes()
    assert len(found) == 2000
    assert b"-before\nfirst\nsecond\n1 loop" in found


def test_a_store_that_takes_no_log_does_not_hide_the_exit_code(memory, monkeypatch, caplog):
    def refused(*_: object) -> None:
        raise PermissionError(13, "the store refuses")

    monkeypatch.setattr(ObjectStorage, "write", refused)
    assert run("raise ValueError", memory / "train.log") == 1
    assert "train.log cannot be written: " in caplog.text
