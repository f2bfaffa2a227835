"""jobs.relabel: a dataset and a run's predictions of its train rows to a dataset with these as labels.

Examples:
  python -m jobs.evaluate run=runs/demo/teacher split=train step=newest predictions=true
  python -m jobs.relabel dataset=runs/demo/data predictions=runs/demo/teacher/predictions/train-00000440.parquet \\
      out=runs/demo/soft

AutoTask's two stages, from a teacher that is any run (the paper: train.epochs=30 and 45):
  python -m jobs.train dataset=runs/demo/soft model=autotask recipe=autotask train.epochs=1 run=runs/demo/first
  python -m jobs.train dataset=runs/demo/data model=autotask recipe=autotask train.epochs=1 \\
      train.init_from=runs/demo/first run=runs/demo/second
"""

from omegaconf import DictConfig

from jobs.entry import job, parse
from pipeline.quick_imports import quick_imports


@job("relabel")
def main(config: DictConfig) -> None:
    """Writes the dataset and prints each task's mean label."""
    with quick_imports():
        from pipeline.evaluation.relabel import SPLIT, RelabelConfig, relabel

    settings: RelabelConfig = parse(config, RelabelConfig)
    manifest = relabel(settings)
    for task, observed in manifest.observed[SPLIT].items():
        mean = f"mean {manifest.positives[SPLIT][task] / observed:.4f}" if observed else "none observed"
        print(f"{SPLIT}  {task}  {observed:,} labels  {mean}")
    print(f"{settings.out}: {len(manifest.shards)} shards, schema {manifest.fingerprint}")


if __name__ == "__main__":
    main()
