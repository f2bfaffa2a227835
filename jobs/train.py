"""jobs.train: a dataset to a trained model, on one process or many.

Examples:
  python -m jobs.train dataset=runs/census/data model=adatt run=runs/census/adatt
  python -m jobs.launch --nproc-per-node=2 -m jobs.train dataset=runs/demo/data model=ple run=runs/demo/ple train.epochs=2
  python -m jobs.launch --nnodes=8 --node-rank=N --master-addr=HOST0 --nproc-per-node=8 -m jobs.train dataset=D run=R
"""

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from jobs.entry import job, parse, read_schema
from pipeline.quick_imports import quick_imports

if TYPE_CHECKING:
    from pipeline.training.config import TrainConfig


def checked(config: DictConfig) -> "TrainConfig":
    """The checked settings. Raises UserError."""
    from pipeline.training.config import TrainConfig

    found: TrainConfig = parse(config, TrainConfig)
    return found


@job("train")
def main(config: DictConfig) -> None:
    """Parses the configuration and trains; run again, it resumes from the newest checkpoint."""
    with quick_imports():
        from pipeline.training.train import train

    settings = checked(config)
    settings.dataset = settings.dataset.absolute()  # the run's config.yaml is read from elsewhere too
    train(settings, read_schema(config) if "data" in config else None)


if __name__ == "__main__":
    main()
