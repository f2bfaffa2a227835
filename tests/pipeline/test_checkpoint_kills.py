"""Writers of checkpoints that are really killed, and a disk that is really full."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

TESTS = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS / 'training'}"}


def test_a_writer_that_is_killed_at_any_moment_leaves_the_checkpoint_before_it_or_a_whole_new_one(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoints"
    script = [sys.executable, str(Path(__file__).with_name("kill_checkpoint_writers.py")), str(folder)]
    done = subprocess.run(script, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=True)
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) >= 12
    for number, code, good, listed, again, then, names in kills:
        assert code == -signal.SIGKILL, number
        assert good == listed, number  # what is there is whole
        assert good in ([1], [1, 2]), number
        assert again == 0, number
        assert then == [1, 2], number
        assert names == ["step-00000001", "step-00000002"], number
    assert sum(good == [1] for _, _, good, *_ in kills) >= 10


def small_disk() -> list[str]:
    """What runs a shell script where it may mount; a skip where nothing does."""
    for prefix in (["unshare", "-m"], ["unshare", "-rm"]):
        mount = [*prefix, "mount", "-t", "tmpfs", "none", "/mnt"]
        if shutil.which("unshare") and not subprocess.run(mount, capture_output=True).returncode:
            return prefix
    pytest.skip("neither root nor a user namespace may mount a file system here")


def test_a_run_on_a_disk_that_fills_up_ends_with_one_line_and_resumes_once_there_is_room(tmp_path: Path) -> None:
    """The disk holds two checkpoints; then it grows, and the same command ends the run."""
    run = tmp_path / "run"
    run.mkdir()
    code = f"""
from pathlib import Path
from tiny_training import configuration, make_dataset
from jobs.entry import configure_logging, user_errors
from pipeline.training.train import train
data = Path({str(tmp_path / "data")!r})
if not data.exists():
    make_dataset(data)
configure_logging("info")
with user_errors():
    train(configuration(data, Path({str(run)!r}) / "r", checkpoint_every=4, max_steps=20))
"""
    script = (
        'mount -t tmpfs -o size=200k none "$0"; "$@"; echo "full $?"; ls "$0/r/checkpoints" -A; '
        'mount -o remount,size=20m "$0"; "$@"; echo "room $?"; ls "$0/r/checkpoints" -A'
    )
    done = subprocess.run(
        [*small_disk(), "sh", "-c", script, str(run), sys.executable, "-c", code],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    said = done.stdout.split()
    full = said[said.index("full") + 1 : said.index("room")]
    assert full[0] == "1", done.stderr
    assert full[1:] == [f"step-{step:08d}" for step in range(4, 4 * len(full), 4)], done.stdout
    assert 1 <= len(full[1:]) < 5
    room = said[said.index("room") + 1 :]
    assert room[0] == "0", done.stderr
    assert room[-1] == "step-00000020"
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "step-00000020: cannot be written: " in error
    assert "No space left on device" in error
    assert any("Training continues, and retries" in line for line in done.stderr.splitlines())
    assert "Traceback" not in done.stderr
