"""Jobs that are told to write where they may not."""

import errno

import pytest

from jobs.entry import user_errors


def test_a_read_only_file_system_is_one_line() -> None:
    with pytest.raises(SystemExit) as stop, user_errors():
        raise OSError(errno.EROFS, "Read-only file system", "/data/nightly")
    assert str(stop.value.code).startswith("error: /data/nightly: Read-only file system. Choose another folder")
    assert "\n" not in str(stop.value.code)
