"""jobs.preprocess: raw logs to a dataset (sharded Parquet with a manifest).

Examples:
  python -m jobs.preprocess data=census out=runs/census/data
  python -m jobs.preprocess data=demo out=runs/demo/data input=runs/demo/raw workers=2
  python -m jobs.preprocess --config-dir=my/conf data=mine out=/data/mine input=s3://bucket/logs overwrite=true
  python -m jobs.preprocess --config-dir=my/conf data=mine out=/data/days date=2026-11-21      # one day: /data/days/2026-11-21
  python -m jobs.preprocess --config-dir=my/conf data=mine out=/data/today encoders.from=/data/mine
  python -m jobs.preprocess --config-dir=my/conf data=mine out=/data/new input=/new encoders.from=/data/mine labels=none
"""

import shlex

from omegaconf import DictConfig

from jobs.entry import job, parse, read_schema
from pipeline.dataset.card.card import read_card
from pipeline.dataset.card.summary import summary
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.job import preprocess


def checked(config: DictConfig) -> PreprocessConfig:
    """The checked settings. Raises UserError."""
    found: PreprocessConfig = parse(config, PreprocessConfig)
    return found


@job("preprocess")
def main(config: DictConfig) -> None:
    """Parses the configuration, runs the Beam job, prints a summary of the dataset."""
    schema = read_schema(config)
    settings = checked(config)
    manifest = preprocess(settings, schema)
    for line in summary(manifest, read_card(settings.folder, schema)):
        print(line)
    print(f"{settings.folder}: {len(manifest.shards)} shards, schema {manifest.fingerprint}")
    folder = shlex.quote(str(settings.folder))
    train = "" if settings.labels == "none" else f"   then   python -m jobs.train dataset={folder}"
    print(f"next   python -m jobs.inspect {folder}{train}")


if __name__ == "__main__":
    main()
