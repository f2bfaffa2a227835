"""jobs.evaluate: the checkpoints of a run to metrics per task, while it trains or after.

Examples:
  python -m jobs.evaluate run=runs/demo/adatt
  python -m jobs.evaluate run=runs/demo/adatt split=valid follow=true
  python -m jobs.evaluate run=/runs/serving dataset=/data/2026-11-22 step=newest
"""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from jobs.entry import job, parse


@job("evaluate")
def main(config: DictConfig) -> None:
    """Evaluates, a line a checkpoint, then prints the table and writes the report."""
    from pipeline.evaluation.follow import EvaluateConfig, dataset_of, evaluate
    from pipeline.evaluation.report import report
    from pipeline.run.run import Run

    if "data" in config and "truth" in config.data and config.truth is None:
        config.truth = OmegaConf.to_container(config.data.truth, resolve=True)
    settings: EvaluateConfig = parse(config, EvaluateConfig)
    run = Run(settings.run)
    for record in evaluate(settings):
        ne = " ".join(
            f"{task} {m['ne']:.4f}".replace(" 0.", " .") for task, m in record["metrics"].items() if m.get("ne")
        )
        print(f"step {record['step']:,}  {settings.split}  NE {ne}  {record['seconds']:.1f} s", flush=True)
    dataset = Path(dataset_of(run, settings).name)
    report.write(run, settings.split, dataset)
    print(f"\n{report.table(run, settings.split, dataset)}\n\n{run.report}")


if __name__ == "__main__":
    main()
