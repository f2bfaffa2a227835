"""jobs.predict: raw logs without labels to predictions of a run's checkpoint, as Parquet files.

The files have the schema's key, row_id, the chosen columns of the log, and per task prob.TASK (binary) or prediction.TASK
(regression, in the label's unit). Rows are in the order of the log; bad ones are in OUT/dead_letters.

Examples:
  python -m jobs.predict run=runs/demo/adatt input=runs/demo/raw out=runs/demo/scores columns='[user_id]'
  python -m jobs.predict run=/runs/serving step=4400 input=s3://bucket/asked out=/scores/today workers=8
  python -m jobs.predict run=/runs/serving input=/logs out=/scores/2026-11-22 date=2026-11-22     # the files of that day
  python -m jobs.predict run=/runs/serving input=/logs out=/scores/now state.from=/data/days/2026-11-21
"""

import shlex
import time
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from jobs.entry import job, parse

if TYPE_CHECKING:
    from pipeline.release.predict.config import PredictConfig


def checked(config: DictConfig) -> "PredictConfig":
    """The checked settings. Raises UserError."""
    from pipeline.release.predict.config import PredictConfig

    found: PredictConfig = parse(config, PredictConfig)
    return found


@job("predict")
def main(config: DictConfig) -> None:
    """Scores the log, and prints where its rows went."""
    from pipeline.dataset.card.summary import summary_of_scored
    from pipeline.release.predict.predict import predict

    settings = checked(config)
    begin = time.perf_counter()
    made, encoded = predict(settings)
    seconds = time.perf_counter() - begin
    for line in summary_of_scored(encoded):
        print(line)
    print(f"{made.model.run}: step {made.model.step:,}, checkpoint {made.model.checkpoint[:16]}")
    print(
        f"{settings.out}: {made.rows:,} rows in {len(made.files)} files, {seconds:.1f} s, {made.rows / seconds:,.0f} rows/s; "
        f"columns {', '.join(made.columns)}"
    )
    code = f'import polars; print(polars.read_parquet("{settings.out}/*.parquet"))'
    print(f"next   python -c {shlex.quote(code)}")


if __name__ == "__main__":
    main()
