"""jobs.compare: architectures side by side on one data set, over several seeds, with boosted trees and R-MTGB among them.

Prints and saves per task AUC and NE, the NE difference to a baseline with a paired 95% interval, the cost of each model, and
the difference after 1/7 and 3/7 of the training rows. Each run is represented by the checkpoint that early stopping on the
validation split keeps. Complete runs are not repeated.

automtl is searched first (jobs.search, on the train and validation splits), then trained from scratch. automtl_random, beside
it, draws architectures and trains each, as many as fit in the time that automtl took; the best on the validation split counts.

Examples:
  python -m jobs.compare
  python -m jobs.compare models='[adatt,ple,automtl,automtl_random]' 'search_overrides=["train.epochs=5", "space.experts=6"]'
  python -m jobs.compare models='[adatt,adatt_sp]' baseline=adatt_sp seeds=5
  python -m jobs.compare data=demo models='[mmoe,ple,adatt]' seeds=2 'overrides=["train.batch_size=2048"]'
  python -m jobs.compare models='[adatt,wide]' baseline=adatt '+model_overrides={wide: ["model=adatt", "model.tower=[128]"]}'
"""

import sys
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from jobs.entry import job, parse
from pipeline.quick_imports import quick_imports

if TYPE_CHECKING:
    from pipeline.search.compare_config import CompareConfig


def checked(config: DictConfig) -> "CompareConfig":
    """The checked settings. Raises UserError."""
    from pipeline.search.compare_config import CompareConfig

    found: CompareConfig = parse(config, CompareConfig)
    return found


@job("compare")
def main(config: DictConfig) -> None:
    """Trains and evaluates every model and seed, prints and saves the tables."""
    with quick_imports():
        from pipeline.search import report
        from pipeline.search.compare import compare
        from pipeline.search.trained import Jobs

    settings = checked(config)
    hydra = HydraConfig.get()
    of_data = [text for text in hydra.overrides.task if text.lstrip("+~").startswith("data.")]
    config_dirs = [text for text in sys.argv[1:] if text.startswith("--config-dir=")]
    entries, tasks = compare(settings, Jobs([f"data={hydra.runtime.choices['data']}", *of_data], config_dirs))
    baseline = next(entry for entry in entries if entry.name == (settings.baseline or settings.models[0]))
    report.write(entries, baseline, tasks, settings.folder)
    print(report.tables(entries, baseline, tasks, "simple"))
    print(
        f"\n{settings.seeds} seeds, mean±deviation on the test split; % is the difference to {baseline.name}, ± half its 95%\n"
        "hours: core-hours of training, with searches, draws and sources, a seed's mean; search: of its search alone\n"
        f"{settings.folder}/compare.html, compare.md, compare.png and compare.parquet; a run a folder beside them"
    )


if __name__ == "__main__":
    main()
