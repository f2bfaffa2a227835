"""jobs.search: lets the data choose the architecture of a multi-task model (AutoMTL), on one process or many.

A supernet holds every candidate: alpha weighs them and learns from the valid split, beta weighs experts for each task and
learns from the train split, as the weights do. Writes architecture.yaml and search.html into the run's folder; run again, it
resumes. What was found is then trained from scratch. All settings of jobs.train apply too (python -m jobs.train --help).

Examples:
  python -m jobs.search dataset=runs/census/data run=runs/census/search train.epochs=5
  python -m jobs.train dataset=runs/census/data run=runs/census/automtl model=automtl model.architecture=runs/census/search
  python -m jobs.launch --nproc-per-node=2 -m jobs.search dataset=D run=R space.experts=16 search.paths=one
  python -m jobs.search dataset=D run=R 'search.budget={flops: 0.5, model: adatt}'    # at most half of adatt's FLOPs
"""

from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf, open_dict

from features.errors import UserError
from features.yaml_text import read_yaml
from jobs.command_line import CONF
from jobs.entry import job, parse, read_schema
from pipeline.quick_imports import quick_imports

if TYPE_CHECKING:
    from pipeline.search.config import SearchConfig


def checked(config: DictConfig) -> "SearchConfig":
    """The checked settings. Raises UserError."""
    from pipeline.search.config import SearchConfig

    name = OmegaConf.select(config, "search.budget.model")
    if isinstance(name, str):
        file = CONF / "model" / f"{name}.yaml"
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
            raise UserError(f"search.budget.model: {name} is not one of {known}")
        with open_dict(config):
            config.search.budget.model = read_yaml(file)
    found: SearchConfig = parse(config, SearchConfig)
    return found


@job("search")
def main(config: DictConfig) -> None:
    """Searches, and prints what was found."""
    import os

    with quick_imports():
        from pipeline.search.search import search

    settings = checked(config)
    settings.dataset = settings.dataset.absolute()  # the run's config.yaml is read from elsewhere too
    found = search(settings, read_schema(config) if "data" in config else None)
    if os.environ.get("RANK", "0") == "0":
        page = " and search.html" if settings.search.method == "gradient" else ""
        print(f"{found.summary()}\n{settings.run}/architecture.yaml{page}; to train it:")
        print(
            f"python -m jobs.train dataset={settings.dataset} model=automtl model.architecture={settings.run} run=RUN"
        )


if __name__ == "__main__":
    main()
