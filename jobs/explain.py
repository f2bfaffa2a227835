"""jobs.explain: which features a checkpoint rests on, and what a step on one of its tasks does to the others.

Prints by how much each task's NE (regression: NRMSE) rises when a feature's values are permuted over the rows, with a paired
interval, and task affinity; both are kept in RUN/explain/SPLIT-STEP.json.

Examples:
  python -m jobs.explain run=runs/demo/adatt
  python -m jobs.explain run=runs/demo/adatt split=valid step=200 rows=50000 'groups={user: [user_id, user_age]}'
  python -m jobs.explain run=runs/census/ple 'features=[age, occupation]' permutations=10 affinity_batches=0
"""

from omegaconf import DictConfig

from jobs.entry import job, parse


@job("explain")
def main(config: DictConfig) -> None:
    """Explains one checkpoint and prints the tables."""
    from pipeline.evaluation.explain.content import path
    from pipeline.evaluation.explain.explain import ExplainConfig, explain
    from pipeline.evaluation.explain.tables import tables
    from pipeline.run.run import Run

    settings: ExplainConfig = parse(config, ExplainConfig)
    found = explain(settings)
    print(f"step {found.step:,}  {found.split}  {found.rows:,} rows, {found.buckets} buckets by {found.cluster}\n")
    print(f"{tables(found)}\n\n{path(Run(settings.run), found.split, found.step)}")


if __name__ == "__main__":
    main()
