"""jobs.plan: whether a model's embedding tables fit on a cluster, their placement, and how long a step takes. Needs no GPU.

It takes the groups and settings of jobs.train (python -m jobs.train --help) except run and resume, and the cluster's size.
Without a dataset, tables are as large as the schema allows. Tables that do not fit end it with exit code 1 and by how much.
With kind= it estimates step time and rows/s on 1, 2, 4, ... 512 ranks from public figures, and prints what it assumes.

Examples:
  python -m jobs.plan dataset=runs/demo/data model=adatt ranks=64 hbm=80GB
  python -m jobs.plan data=NAME ranks=8 hbm=40GB train.batch_size=65536 train.sharding.default=[row_wise]
  python -m jobs.plan dataset=D ranks=16 hbm=24GB ddr=64GB train.kernels.default=[fused,fused_uvm_caching]
  python -m jobs.plan dataset=D device=cpu ranks=4 ranks_per_node=4 ddr=8GB
  python -m jobs.plan dataset=D kind=h100 link=400gbit train.batch_size=65536 train.precision=bf16 'scale=[1,8,64]'
"""

from omegaconf import DictConfig

from jobs.entry import job, parse, read_schema
from pipeline.quick_imports import quick_imports


@job("plan")
def main(config: DictConfig) -> None:
    """Prints the plan."""
    with quick_imports():
        from pipeline.training.parallel.capacity import PlanConfig, capacity_report

    settings: PlanConfig = parse(config, PlanConfig)
    print("\n".join(capacity_report(settings, read_schema(config) if "data" in config else None)))


if __name__ == "__main__":
    main()
