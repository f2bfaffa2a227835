"""jobs.explain: which features a checkpoint rests on, and what a step on one of its tasks does to the others.

Prints by how much each task's NE (regression: NRMSE) rises when a feature's values are permuted over the rows, with a paired
interval, and task affinity; both are kept in RUN/explain/SPLIT-STEP.json, and of the newest checkpoint that jobs.evaluate has
evaluated they are in RUN/report.html.

Examples:
  python -m jobs.explain run=runs/demo/adatt
  python -m jobs.explain run=runs/demo/adatt split=valid step=200 rows=50000 'groups={user: [user_id, user_age]}'
  python -m jobs.explain run=runs/census/ple 'features=[age, occupation]' permutations=10 affinity_batches=0
"""

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from jobs.entry import job, parse
from pipeline.quick_imports import quick_imports

if TYPE_CHECKING:
    from pipeline.evaluation.explain.explain import ExplainConfig


def checked(config: DictConfig) -> "ExplainConfig":
    """The checked settings. Raises UserError."""
    from pipeline.evaluation.explain.explain import ExplainConfig

    found: ExplainConfig = parse(config, ExplainConfig)
    return found


@job("explain")
def main(config: DictConfig) -> None:
    """Explains one checkpoint and prints the tables."""
    with quick_imports():
        from pipeline.evaluation.explain.explain import explain
        from pipeline.evaluation.explain.tables import tables
        from pipeline.evaluation.follow import results_of
        from pipeline.evaluation.report import page
        from pipeline.run.explanation import path
        from pipeline.run.run import Run
        from pipeline.training.config import Settings

    settings = checked(config)
    found = explain(settings)
    print(f"step {found.step:,}  {found.split}  {found.rows:,} rows, {found.buckets} buckets by {found.cluster}\n")
    run = Run(settings.run)
    print(f"{tables(found)}\n\n{path(run, found.split, found.step)}")
    results = results_of(
        run, found.split, found.dataset, {name: task.kind for name, task in run.schema().tasks.items()}
    )
    if results.records and results.records[-1]["step"] == found.step:
        page.write_run(results, defaults=Settings().model_dump(mode="json"))
        print(run.report)


if __name__ == "__main__":
    main()
