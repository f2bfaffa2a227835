"""jobs.evaluate: the checkpoints of a run to metrics per task, while it trains or after.

Examples:
  python -m jobs.evaluate run=runs/demo/adatt
  python -m jobs.evaluate run=runs/demo/adatt split=valid follow=true
  python -m jobs.evaluate run=/runs/serving dataset=/data/2026-11-22 step=newest
"""

from omegaconf import DictConfig, OmegaConf

from jobs.entry import job, parse


@job("evaluate")
def main(config: DictConfig) -> None:
    """Evaluates, a line a checkpoint, then prints the table and writes the report."""
    from pipeline.evaluation.follow import EvaluateConfig, Evaluation
    from pipeline.evaluation.report import page, tables
    from pipeline.terminal import short_decimal
    from pipeline.training.config import Settings

    if "data" in config and "truth" in config.data and config.truth is None:
        config.truth = OmegaConf.to_container(config.data.truth, resolve=True)
    settings: EvaluateConfig = parse(config, EvaluateConfig)
    evaluation = Evaluation(settings)
    for record in evaluation.records():
        ne = " ".join(f"{task} {short_decimal(m['ne'])}" for task, m in record["metrics"].items() if m.get("ne"))
        print(f"step {record['step']:,}  {settings.split}  NE {ne}  {record['seconds']:.1f} s", flush=True)
    results = evaluation.results()
    page.write_run(results, defaults=Settings().model_dump(mode="json"))
    print(f"\n{tables.table(results)}\n\n{evaluation.run.report}")


if __name__ == "__main__":
    main()
