"""Kills ingest jobs at many moments: kill_ingest_jobs.py LOG SCHEMA OUT prints one JSON line for each: the content of OUT.

A forked job kills itself with SIGKILL just before its n-th look-up, write, rename or removal of a file. A first job runs to
its end, to list the moments. At the end everything that the killed jobs left behind lies beside OUT.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from ingest_runs import content_of, no_beam

from features.schema.schema import Schema
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.job import preprocess

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlsym"}
SPREAD = 6  # kills over the whole job, besides those where the dataset is put into place


def forked(log: str, schema: str, out: Path, on_event: Callable[[str, tuple], object]) -> int:
    """Runs a job in a child that hears of its own events; returns how it ended."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    hooked = [True]
    sys.addaudithook(lambda name, given: on_event(name, given) if hooked and name in EVENTS else None)
    with no_beam():
        preprocess(PreprocessConfig(input=log, out=out, overwrite=True, rows_per_shard=100), Schema.load(Path(schema)))
    hooked.clear()
    os._exit(0)


def events_of(log: str, schema: str, out: Path) -> list[str]:
    """The events of a job that is left alone, each with what it is about."""
    notes = out.with_name("events")
    descriptor = os.open(notes, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    assert forked(log, schema, out, lambda *what: os.write(descriptor, f"{what}\n".encode())) == 0
    os.close(descriptor)
    found = notes.read_text().splitlines()
    notes.unlink()
    return found


def kill_at(number: int) -> Callable[[str, tuple], None]:
    left = [number]

    def count(_name: str, _given: tuple) -> None:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    return count


def main(log: str, schema: str, out: Path) -> None:
    before, aside = out.with_name("before"), out.with_name("aside")
    aside.mkdir()
    if out.exists():
        out.rename(before)
    events = events_of(log, schema, restored(before, out))
    put = max(
        i for i, event in enumerate(events) if (f"{out}'" in event and "os.rename" in event) or "renameat2" in event
    )
    manifest = max(i for i, event in enumerate(events) if "manifest.json'" in event and "os.rename" in event)
    moments = {len(events) * i // SPREAD for i in range(SPREAD)}
    moments |= {i for place in (manifest, put) for i in range(place - 1, place + 3) if i < len(events)}
    for moment in sorted(moments):
        code = forked(log, schema, restored(before, out), kill_at(moment))
        digest = hashlib.sha256(repr(sorted(content_of(out).items())).encode()).hexdigest() if out.exists() else None
        print(json.dumps({"event": events[moment], "code": code, "content": digest}), flush=True)
        for left in out.parent.glob(f"{out.name}.staging-*"):
            left.rename(aside / left.name)
    for left in aside.iterdir():  # for the next job to find
        left.rename(out.with_name(left.name))
    aside.rmdir()
    shutil.rmtree(before, ignore_errors=True)


def restored(before: Path, out: Path) -> Path:
    """`out` as it was before the first job."""
    shutil.rmtree(out, ignore_errors=True)
    if before.exists():
        shutil.copytree(before, out)
    return out


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
