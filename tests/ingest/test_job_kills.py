"""Jobs that are killed, told to end, or run out of disk: `out` is what it was or the whole new dataset."""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ingest_runs import ENVIRONMENT, content_of, no_beam, run, write_conf

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.verify import verify

pytestmark = pytest.mark.system

Run = Callable[..., Any]


def digest_of(folder: Path) -> str:
    return hashlib.sha256(repr(sorted(content_of(folder).items())).encode()).hexdigest()


@pytest.fixture
def job(small_log: Path, small_content: Callable[[], dict[str, Any]]) -> Run:
    """Runs the job that is killed elsewhere, undisturbed."""

    def undisturbed(out: Path, **changes: Any) -> None:
        with no_beam():
            run(small_log, out, small_content() | changes, overwrite=True, rows_per_shard=100)

    return undisturbed


def killed(log: Path, schema: Path, out: Path) -> list[dict[str, Any]]:
    """What `kill_ingest_jobs.py` found after each kill."""
    command = [sys.executable, str(Path(__file__).with_name("kill_ingest_jobs.py")), str(log), str(schema), str(out)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def schema(small_content, tmp_path) -> Path:
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(small_content(), sort_keys=False))
    return tmp_path / "schema.yaml"


def test_a_killed_job_leaves_no_dataset_or_a_whole_one_and_the_next_cleans_up(job, schema, small_log, tmp_path):
    out = tmp_path / "there" / "out"
    out.parent.mkdir()
    job(tmp_path / "expected")
    whole = digest_of(tmp_path / "expected")
    found = killed(small_log, schema, out)
    assert len(found) >= 12
    assert {each["code"] for each in found} == {-signal.SIGKILL}
    contents = [each["content"] for each in found]
    first = contents.index(whole)
    assert contents == [None] * first + [whole] * (len(found) - first)
    assert len(list(out.parent.glob("out.staging-*"))) >= first - 2
    job(out)
    assert digest_of(out) == whole
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_overwrite_that_is_killed_leaves_the_old_or_the_new_dataset(job, schema, small_log, tmp_path):
    out = tmp_path / "there" / "out"
    out.parent.mkdir()
    job(out, weight="3")
    job(tmp_path / "expected")
    old, new = digest_of(out), digest_of(tmp_path / "expected")
    found = killed(small_log, schema, out)
    assert {each["code"] for each in found} == {-signal.SIGKILL}
    contents = [each["content"] for each in found]
    first = contents.index(new)
    assert contents == [old] * first + [new] * (len(found) - first)
    assert len(list(out.parent.glob("out.staging-*"))) >= first - 2
    job(out)
    list(verify(Dataset(out)))
    assert [path.name for path in out.parent.iterdir()] == ["out"]


# The command


@pytest.fixture
def conf(small_content, tmp_path) -> Path:
    return write_conf(tmp_path / "conf", small=small_content())


def command(conf: Path, out: Path, *settings: str) -> list[str]:
    return [sys.executable, "-m", "jobs.preprocess", f"--config-dir={conf}", "data=small", f"out={out}", *settings]


def started(arguments: list[str], there: Path) -> subprocess.Popen[bytes]:
    """The command, as soon as it has begun to write; what it says is in a file beside `there`."""
    with there.with_name("said").open("w") as said:
        process = subprocess.Popen(
            arguments, env=ENVIRONMENT, cwd=there, stdout=said, stderr=said, start_new_session=True
        )
    while not any(there.iterdir()):
        assert process.poll() is None, there.with_name("said").read_text()
        time.sleep(0.005)
    return process


def session(leader: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = status.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == leader and state != "Z":
            found.append(int(status.parent.name))
    return found


@pytest.mark.parametrize("after", [0.0, 0.5])
def test_a_job_that_is_told_to_end_leaves_nothing(after, conf, small_log, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    process = started(command(conf, there / "out", f"input={small_log}", "unit_bytes=2000"), there)
    time.sleep(after)
    process.terminate()
    code, said = process.wait(60), there.with_name("said").read_text()
    assert code == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert list(there.iterdir()) == []


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_job_with_workers_is_followed_by_one_that_succeeds(job, conf, small_log, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    job(tmp_path / "expected")
    settings = [f"input={small_log}", "rows_per_shard=100"]
    process = started(command(conf, there / "out", *settings, "workers=2"), there)
    time.sleep(random.Random(0).uniform(0.5, 2))
    process.kill()
    process.wait()
    assert not (there / "out").exists()
    job(there / "out")
    assert content_of(there / "out") == content_of(tmp_path / "expected")
    wait_until(lambda: not session(process.pid))  # its workers see that their job is gone
    job(there / "out")
    assert [path.name for path in there.iterdir()] == ["out"]


# A full disk


def small_disk() -> list[str]:
    """What runs a shell script where it may mount; a skip where nothing does."""
    tried = [["unshare", "-m"], ["unshare", "-rm"]]
    for prefix in tried:
        if (
            shutil.which("unshare")
            and not subprocess.run([*prefix, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode
        ):
            return prefix
    pytest.skip("neither root nor a user namespace may mount a file system here")


@pytest.mark.parametrize("kilobytes", [40, 100, 300])
def test_a_full_disk_ends_the_job_with_one_line_and_leaves_nothing(kilobytes, conf, small_log, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    line = command(conf, there / "out", f"input={small_log}")
    script = f'mount -t tmpfs -o size={kilobytes}k none "$0" && {{ "$@"; echo "$?" "$(ls -A "$0")" "end"; }}'
    done = subprocess.run(
        [*small_disk(), "sh", "-c", script, str(there), *line],
        env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "1  end\n", done.stderr
    errors = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert "No space left on device" in errors[0]
    assert str(there) in errors[0]
    assert "Traceback" not in done.stderr
