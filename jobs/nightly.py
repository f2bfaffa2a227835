"""jobs.nightly: a new day's logs and two models to a verdict; exit code 0: as good, 2: worse than allowed, 1: error.

Examples:
  python -m jobs.nightly run=runs/demo/adatt serving=runs/demo/ple input=/logs/2026-11-09 out=runs/nightly date=2026-11-09
  python -m jobs.nightly run=/runs/new serving=/runs/live serving_step=9000 input=/logs/today out=/nightly max_increase=0.001
  python -m jobs.nightly run=/runs/first input=/logs/today out=/nightly/today
"""

import sys

from omegaconf import DictConfig

from jobs.entry import job, parse


@job("nightly")
def main(config: DictConfig) -> None:
    """Writes verdict.json and prints it as a table."""
    from tabulate import tabulate

    from pipeline.release.nightly import NightlyConfig, nightly

    settings: NightlyConfig = parse(config, NightlyConfig)
    verdict = nightly(settings)
    lines = [
        [name, task.figure.upper(), task.candidate, task.serving, "pass" if task.passed else "WORSE", task.why]
        for name, task in verdict.tasks.items()
    ]
    print(tabulate(lines, ["task", "", "newest", "serving", "", ""], floatfmt=".4f", missingval="-"))
    print(f"\n{'passed' if verdict.passed else 'worse than allowed'}: {settings.folder / 'verdict.json'}")
    sys.exit(0 if verdict.passed else 2)


if __name__ == "__main__":
    main()
