"""Where the time of a training step goes, on 1 and 2 ranks in fp32 and bf16: python tests/benchmarks/step_profile.py.

Each run is jobs.train's trainer on the workload of workload.py, 4,096 rows and one thread a rank, with a stopwatch inside
(stopwatch.py). Prints milliseconds of a step by part, the mean of the ranks; keeps them in results/train-profile.json and
draws results/train-profile.png.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import workload
from tabulate import tabulate
from train_runs import RESULTS, configuration, machine, preprocess, run, write_raw

WARMUP = 10  # steps before the stopwatch starts
RUNS = [(ranks, dtype) for dtype in ("fp32", "bf16") for ranks in (1, 2)]
COLOURS = ("#9e9e9e", "#1f77b4", "#6baed6", "#d62728", "#2ca02c", "#98df8a", "#d9d9d9")
Profile = dict[str, float]  # seconds of a step by part


def main() -> None:
    """Profiles each run; with --worker it is one rank of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mmoe", "ple"), default="mmoe")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=workload.ROWS, help="of the dataset; fewer: a trial, not kept")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        profile_rank(options)
        return
    profiles = {}
    with tempfile.TemporaryDirectory() as name:
        write_raw(Path(name) / "raw", options.rows)
        preprocess(Path(name) / "raw", Path(name) / "data")
        for ranks, dtype in RUNS:
            arguments = ["--model", options.model, "--steps", str(options.steps), "--dtype", dtype, "--worker", name]
            printed = run([__file__, *arguments], ranks)
            profiles[f"{ranks} rank{'s' * (ranks > 1)}, {dtype}"] = json.loads(printed.splitlines()[-1])
    print(table(options.model, profiles))
    if options.rows == workload.ROWS:
        content = {"machine": machine(), "model": options.model, "seconds_per_step": profiles}
        (RESULTS / "train-profile.json").write_text(json.dumps(content, indent=1) + "\n")
        draw(options.model, profiles, RESULTS / "train-profile.png")
    else:
        draw(options.model, profiles, Path(tempfile.gettempdir()) / "train-profile.png")


def profile_rank(options: argparse.Namespace) -> None:
    """Trains; rank 0 prints the seconds of a step by part as one JSON line."""
    import torch.distributed as dist
    from stopwatch import Stopwatch, attach

    from pipeline.training.observer import Observer
    from pipeline.training.parallel import process_group
    from pipeline.training.train import prepare
    from pipeline.training.trainer import Trainer

    stopwatch, last = Stopwatch(), WARMUP + options.steps
    found: dict[str, float] = {}

    class Timing(Observer):
        """Restarts the stopwatch after the warm-up, and reads it after the last step."""

        def on_step(self, trainer: Trainer, output: object) -> None:
            if trainer.state.step == WARMUP:
                stopwatch.restart()
            elif trainer.state.step == last:
                found.update(stopwatch.read())

    device = process_group.start()
    ranks = dist.get_world_size()
    folder = options.worker / f"run-{ranks}-{options.dtype}"
    train = {"precision": options.dtype, "max_steps": last, "checkpoint_every": last}
    config = configuration(
        options.worker / "data", folder, f"bench_{options.model}", batch_size=workload.BATCH * ranks, **train
    )
    trainer = prepare(config, None, device, [Timing()])
    attach(trainer, stopwatch)
    trainer.run_to_end()
    all_found: list[Any] = [None] * ranks
    dist.all_gather_object(all_found, found)
    if dist.get_rank() == 0:
        print(json.dumps({part: sum(each[part] for each in all_found) / ranks / options.steps for part in found}))
    dist.destroy_process_group()


def table(model: str, profiles: dict[str, Profile]) -> str:
    """Milliseconds and shares by part, a column a run."""
    totals = {name: sum(profile.values()) for name, profile in profiles.items()}

    def cell(name: str, seconds: float) -> str:
        return f"{seconds * 1e3:.1f} ({seconds / totals[name]:.1%})"

    parts = next(iter(profiles.values()))
    lines = [[part, *(cell(name, profile[part]) for name, profile in profiles.items())] for part in parts]
    lines.append(["a step", *(f"{total * 1e3:.1f}" for total in totals.values())])
    title = f"{model}: ms of a step of 4,096 rows a rank, mean of the ranks"
    return f"{title}\n" + tabulate(
        lines, ["", *profiles], colalign=("left", *["right"] * len(profiles)), disable_numparse=True
    )


def draw(model: str, profiles: dict[str, Profile], path: Path) -> None:
    """A stacked bar a run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.6 * len(profiles)), layout="constrained")
    names = list(profiles)
    left = [0.0] * len(names)
    for part, colour in zip(profiles[names[0]], COLOURS, strict=True):
        widths = [profile[part] * 1e3 for profile in profiles.values()]
        bars = axes.barh(names, widths, left=left, color=colour, label=part, edgecolor="white", linewidth=0.5)
        total = [sum(profile.values()) * 1e3 for profile in profiles.values()]
        shown = [f"{width:.0f}" if width > 0.03 * max(total) else "" for width in widths]
        axes.bar_label(bars, shown, label_type="center", fontsize=8)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of one training step (4,096 rows a rank, one thread a rank)")
    axes.set_title(f"Where a step's time goes: {model}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
