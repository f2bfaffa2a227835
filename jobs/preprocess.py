"""jobs.preprocess: raw logs to a dataset (sharded Parquet with a manifest).

Examples:
  python -m jobs.preprocess data=census out=runs/census/data
  python -m jobs.preprocess data=demo out=runs/demo/data input=runs/demo/raw workers=2
  python -m jobs.preprocess --config-dir=my/conf data=mine out=/data/mine input=s3://bucket/logs overwrite=true
  python -m jobs.preprocess --config-dir=my/conf data=mine out=/data/days date=2026-11-21      # one day: /data/days/2026-11-21
  python -m jobs.preprocess --config-dir=my/conf data=mine out=/data/today encoders.from=/data/mine
  python -m jobs.preprocess --config-dir=my/conf data=mine out=/data/asked input=/asked encoders.from=/data/mine labels=none
"""

from datetime import datetime, timezone

from omegaconf import DictConfig

from jobs.entry import job, parse, read_schema
from pipeline.dataset.card.card import read_card
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.job import preprocess


@job("preprocess")
def main(config: DictConfig) -> None:
    """Parses the configuration, runs the Beam job, prints a summary of the dataset."""
    schema = read_schema(config)
    settings: PreprocessConfig = parse(config, PreprocessConfig)
    manifest = preprocess(settings, schema)
    for split, rows in manifest.rows.items():
        rates = ", ".join(
            f"{task} {manifest.positives[split][task] / observed:.4f} of {observed:,}"
            for task, observed in manifest.observed.get(split, {}).items()
            if observed
        )
        print(f"{split:5}  {rows:>10,} rows   mean label: {rates or '-'}")
    for entry in read_card(settings.folder, schema).get("drift", []):
        if entry["verdict"] != "stable":
            unknown = (
                f", unknown {entry['unknown']:.1%} (was {entry['unknown_before']:.1%})"
                if entry["unknown"] is not None
                else ""
            )
            print(
                f"drift  {entry['feature']} {entry['verdict']}: PSI {entry['psi']:.3f}, missing {entry['missing']:.1%} "
                f"(was {entry['missing_before']:.1%}){unknown}"
            )
    for outcome, until in manifest.complete_until.items():
        print(f"{outcome}: complete until {datetime.fromtimestamp(until, timezone.utc):%Y-%m-%dT%H:%M:%SZ}")
    bad, left_out = sum(manifest.dead_letters.values()), sum(manifest.left_out.values())
    print(
        f"{settings.folder}: {len(manifest.shards)} shards, schema {manifest.fingerprint}, {bad} dead letters"
        + (f", {left_out} rows left out" if left_out else "")
    )


if __name__ == "__main__":
    main()
