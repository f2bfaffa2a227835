"""Jobs that are told to write where they may not."""

import errno
import threading

import pytest

from jobs.entry import thread_error, user_errors


def test_a_read_only_file_system_is_one_line() -> None:
    with pytest.raises(SystemExit) as stop, user_errors():
        raise OSError(errno.EROFS, "Read-only file system", "/data/nightly")
    assert str(stop.value.code).startswith("error: /data/nightly: Read-only file system. Choose another folder")
    assert "\n" not in str(stop.value.code)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("code", "printed"), [(errno.ENOSPC, False), (errno.EDQUOT, False), (errno.EIO, True)])
def test_a_thread_that_meets_a_full_disk_prints_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], code: int, printed: bool
) -> None:
    monkeypatch.setattr(threading, "excepthook", thread_error)

    def fail() -> None:
        raise OSError(code, "of the disk")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert ("Traceback" in capfd.readouterr().err) is printed


def test_a_store_that_refuses_is_one_line_about_credentials() -> None:
    with pytest.raises(SystemExit) as stop, user_errors():
        raise PermissionError(errno.EACCES, "the store refuses: Unable to locate credentials", "s3://bucket/data")
    assert str(stop.value.code).startswith(
        "error: s3://bucket/data: the store refuses: Unable to locate credentials. Check"
    )
    assert "another file" not in str(stop.value.code)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ETIMEDOUT, "the store has not answered for 120 s", "s3://bucket/data"),
            "s3://bucket/data: the store has not answered for 120 s. What was committed is kept: run the same command again.",
        ),
        (
            OSError(errno.ENOPKG, "gs:// needs a package: install gcsfs", "gs"),
            "gs: gs:// needs a package: install gcsfs. Install it, then run the same command again.",
        ),
    ],
)
def test_a_store_that_does_not_answer_or_has_no_package_is_one_line(error: OSError, line: str) -> None:
    with pytest.raises(SystemExit) as stop, user_errors():
        raise error
    assert stop.value.code == f"error: {line}"
