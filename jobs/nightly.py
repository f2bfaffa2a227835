"""jobs.nightly: a new day's logs and two models to a verdict.

Exit codes: 0 passed, 2 failed, 3 undecided, 1 an error, 75 preempted (run the same command again). A night is a pipeline of
steps, recorded in OUT/DATE/night.json: killed anywhere, the same command takes it up where it was. The last line on stdout is
the outcome as JSON.

Examples:
  python -m jobs.nightly run=runs/demo/adatt serving=runs/demo/ple input=/logs/2026-11-09 out=runs/nightly date=2026-11-09
  python -m jobs.nightly run=/runs/new input=/logs/today out=/nightly gates=gates.yaml bless=pass webhook=true
  python -m jobs.nightly 'train={args: ["model=ple"]}' days=/runs/days input=/logs out=/runs/nightly date=2026-11-09
  python -m jobs.nightly bless=back withdraw=2026-11-09 out=/nightly
"""

import sys
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from jobs.entry import job, parse
from pipeline.quick_imports import quick_imports

if TYPE_CHECKING:
    from pipeline.release.config import NightlyConfig


def checked(config: DictConfig) -> "NightlyConfig":
    """The checked settings. Raises UserError."""
    from pipeline.release.config import NightlyConfig

    found: NightlyConfig = parse(config, NightlyConfig)
    return found


@job("nightly")
def main(config: DictConfig) -> None:
    """Judges the night and prints its gates, the trend and the outcome."""
    with quick_imports():
        from features.errors import Preempted
        from pipeline.malloc import tune_malloc
        from pipeline.release.nightly import go_back, nightly
        from pipeline.release.outcome import error_message
        from pipeline.release.tables import text
        from pipeline.storage.files import json_text

    settings = checked(config)
    tune_malloc()
    try:
        if settings.bless == "back":
            print(json_text(go_back(settings)), flush=True)
            return
        result = nightly(settings)
    except Preempted:
        raise
    except Exception as error:
        print(json_text(error_message(settings, error)), flush=True)
        raise
    print(text(result), flush=True)
    print(json_text(result.message), flush=True)
    sys.exit(result.night.exit_code)


if __name__ == "__main__":
    main()
