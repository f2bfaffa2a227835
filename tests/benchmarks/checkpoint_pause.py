"""How long training waits for a checkpoint of one table, copied or staged, on a disk and on an S3 server on loopback.

python tests/benchmarks/checkpoint_pause.py [MiB]
"""

import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "pipeline")]

from s3_server import S3Server  # noqa: E402
from small_checkpoint import MANIFEST  # noqa: E402

from pipeline.run import checkpoint  # noqa: E402
from pipeline.run.checkpoint.writer import CheckpointWriter  # noqa: E402
from pipeline.storage.store_path import place  # noqa: E402

TRIES = 4


def measured(where: Path, background: bool, table: torch.Tensor) -> tuple[float, float, int]:
    """Seconds that `save` takes once a copy is there, seconds until it is committed, and the most bytes beside the table."""
    writer = CheckpointWriter(where, None, background, lambda *_: None)
    process, pauses, totals, peak = psutil.Process(), [], [], 0
    before, ended = process.memory_info().rss, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.01):
            peak = max(peak, process.memory_info().rss - before)

    watching = threading.Thread(target=watch)
    watching.start()
    for step in range(TRIES):
        begin = time.perf_counter()
        writer.save({"table": table}, MANIFEST.model_copy(update={"step": step}))
        pauses.append(time.perf_counter() - begin)
        if error := writer.wait():
            raise error
        totals.append(time.perf_counter() - begin)
        checkpoint.remove(checkpoint.folder(where, step))
    ended.set()
    watching.join()
    return min(pauses), min(totals), peak


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 128
    table = torch.rand(size << 12, 64)
    folder = Path(tempfile.mkdtemp())
    server = S3Server(folder / "s3").start()
    os.environ.update(server.env)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for where in (folder / "disk", place("s3://bucket/checkpoints")):
            for background in (True, False):
                pause, total, peak = measured(where, background, table)
                name = f"{'disk' if where == folder / 'disk' else 's3'} {'background' if background else 'staged'}"
                print(f"{name:14} pause {pause / size * 1024:6.2f} s/GiB  total {total / size * 1024:6.2f} s/GiB  "
                      f"peak {peak >> 20} MiB", flush=True)  # fmt: skip
    finally:
        server.kill()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
