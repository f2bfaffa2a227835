"""jobs.evaluate: the checkpoints of a run to metrics per task, while it trains or after.

Examples:
  python -m jobs.evaluate run=runs/demo/adatt
  python -m jobs.evaluate run=runs/demo/adatt split=valid follow=true every=4 order=newest
  python -m jobs.evaluate run=/runs/serving dataset=/data/2026-11-22 step=newest
  python -m jobs.evaluate compare='[runs/demo/adatt,runs/demo/ple@440]'
  python -m jobs.launch --nproc-per-node=8 -m jobs.evaluate run=/runs/large step=newest table_precision=fp16
"""

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from features.errors import UserError
from jobs.entry import job, parse
from pipeline.quick_imports import quick_imports
from pipeline.run.headline import headline
from pipeline.terminal import short_decimal

if TYPE_CHECKING:
    from pipeline.evaluation.follow import EvaluateConfig


def checked(config: DictConfig) -> "EvaluateConfig":
    """The checked settings; of `compare` the run is the first one. Raises UserError."""
    from pipeline.evaluation.follow import EvaluateConfig

    if "data" in config and "truth" in config.data and config.truth is None:
        config.truth = OmegaConf.to_container(config.data.truth, resolve=True)
    if config.compare:
        if not OmegaConf.is_missing(config, "run"):
            raise UserError("compare names both of its runs: leave run out")
        config.run = str(config.compare[0])
    found: EvaluateConfig = parse(config, EvaluateConfig)
    return found


@job("evaluate")
def main(config: DictConfig) -> None:
    """Evaluates, a line a checkpoint, then prints the table and writes the report; or, with `compare`, those of two."""
    with quick_imports():
        from pipeline.evaluation.compared_runs import comparison
        from pipeline.evaluation.follow import Evaluation
        from pipeline.evaluation.report import page, tables
        from pipeline.training.config import Settings
        from pipeline.training.parallel import process_group
        from pipeline.training.parallel.scoring import shard_for_scoring

    settings = checked(config)
    if settings.compare:
        if os.environ.get("RANK", "0") == "0":  # of ranks, which have nothing to share here, one does it
            compared = comparison(settings)
            print(compared.table)
            page.write_comparison(compared.models, compared.models[1], compared.file)
            print(f"\n{compared.file}")
        return
    with process_group.joined() as rank:
        evaluation = Evaluation(settings, shard_for_scoring)

        def write_page() -> None:
            page.write_run(evaluation.results(), defaults=Settings().model_dump(mode="json"))

        found = False
        try:
            for record in evaluation.records(write_page):
                found = True
                print(progress_line(record), flush=True)
        except (UserError, SystemExit):
            if found:
                with suppress(UserError, OSError):  # the first error is the one to print
                    write_page()
                    evaluation.publish()
            raise
        if rank == 0:
            if not found and not settings.follow:
                print("Nothing new: these checkpoints have a record of these settings, or are another evaluator's.")
            write_page()
            evaluation.publish()
            print(f"\n{tables.table(evaluation.results())}\n\n{evaluation.run.report}")


def progress_line(record: dict[str, Any]) -> str:
    """A record in a line: step, split, headline metric of each task, duration, lag behind the trainer."""
    shown: dict[str, str] = {}
    for task, metrics in record["metrics"].items():
        name = headline(metrics)
        if metrics[name] is not None:
            shown[name] = f"{shown.get(name, name.upper())} {task} {short_decimal(metrics[name])}"
    line = f"step {record['step']:,}  {record['split']}  {' '.join(shown.values())}  {record['seconds']:.1f} s"
    if lag := record.get("lag"):
        line += f"  lag {lag['steps']:,} steps" + (f", {lag['seconds']:,.1f} s" if "seconds" in lag else "")
    return line


if __name__ == "__main__":
    main()
