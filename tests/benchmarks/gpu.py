"""What a machine's GPUs do with taskfuse, in one run of under 8 minutes: python tests/benchmarks/gpu.py OUT.

    trains        training, a checkpoint, a resume; losses against those of the CPU, within 1e-4
    data path     a trainer on its own loader: rows/s, copies by kind (pinned or pageable), host syncs by where they are caused
    loader        rows/s that are decoded, by workers
    steps         ms and kernels of a step, busy share of the GPU: models, rows, schemas, number formats, eager or compiled
    two GPUs      scaling from one rank to two, the exchange's share of a step, time until a killed rank has ended the job

Figures of `steps` are of batches in pinned memory, timed without a profiler; kernels are counted in further steps under it.
Prints a markdown report after each section and keeps it as OUT/gpu.md and OUT/gpu.json. A section that fails prints its
error, the others follow; the exit code is then 1. --small is a form of seconds, which runs on a CPU too.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "training")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from gpu_sections import Bench, Row, data_path, loader, steps, train, trains, two_gpus  # noqa: E402
from tabulate import tabulate  # noqa: E402
from train_runs import machine  # noqa: E402

from pipeline.training.parallel import process_group  # noqa: E402

Section = Callable[[Bench], list[Row]]
SECTIONS: dict[str, Section] = {
    "trains": trains, "data path": data_path, "loader": loader, "steps": steps, "two GPUs": two_gpus,
}  # fmt: skip
PACKAGES = ("torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "triton", "numpy", "pyarrow", "polars")


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections; the exit code."""
    options = parse(arguments)
    if options.reference:
        data, run, rows, end = options.reference
        train(Path(data), Path(run), int(rows), int(end), process_group.start())
        dist.destroy_process_group()
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    device = process_group.start()
    content: dict[str, Any] = {"machine": hardware(device), "sections": {}}
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), device, options.small, time.monotonic() + 60 * options.minutes)
        for title in options.sections:
            content["sections"][title] = answered(SECTIONS[title], bench)
            (options.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
            (options.out / "gpu.md").write_text(report(content))
            print(section(title, content["sections"][title]), flush=True)
    dist.destroy_process_group()
    rows = [row for found in content["sections"].values() for row in found["rows"]]
    failed = any("error" in found for found in content["sections"].values())
    return int(failed or any(row.get("ok") is False for row in rows))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path(tempfile.gettempdir()) / "taskfuse-gpu")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no further case of steps begins")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes, on a CPU too")
    parser.add_argument("--reference", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def answered(run: Section, bench: Bench) -> dict[str, Any]:
    """A section's rows and seconds, and its error if it failed."""
    begin, found = time.monotonic(), dict[str, Any](rows=[])
    try:
        found["rows"] = run(bench)
    except Exception as error:  # the other sections follow
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"[:2000]
    return found | {"seconds": round(time.monotonic() - begin, 1)}


def hardware(device: torch.device) -> dict[str, Any]:
    """What figures depend on besides the code."""
    found: dict[str, Any] = machine() | {"system": platform.platform(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpus": torch.cuda.device_count(), "GiB": properties.total_memory / 2**30}
        found |= {
            "multiprocessors": properties.multi_processor_count,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def report(content: dict[str, Any]) -> str:
    """All of it in markdown."""
    parts = [section(title, found) for title, found in content["sections"].items()]
    return "\n".join(["# GPUs", "", *(f"- {key}: {value}" for key, value in content["machine"].items()), "", *parts])


def section(title: str, found: dict[str, Any]) -> str:
    """One section in markdown."""
    lines = [f"## {title}", "", f"{found['seconds']:.0f} s", ""]
    if "error" in found:
        lines += [f"failed: {found['error']}", ""]
    keys = list(dict.fromkeys(key for row in found["rows"] for key in row))
    cells = [[number(row.get(key, "")) for key in keys] for row in found["rows"]]
    return "\n".join([*lines, tabulate(cells, keys, tablefmt="github", disable_numparse=True), ""])


def number(value: object) -> str:
    """A cell: three digits that count, thousands apart."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
