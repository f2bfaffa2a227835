"""jobs.generate: a raw event log whose true probabilities are known.

Examples:
  python -m jobs.generate out=runs/demo/raw
  python -m jobs.generate out=runs/demo/raw impressions=75000 days=1 start=2026-11-09     # one more day of the same world
  python -m jobs.generate out=runs/hard/raw task_correlation=0.1 noise=0.3 extra_tasks=2
  python -m jobs.generate out=runs/six_tasks/raw extra_tasks=3 event_rates=[0.06,0.015,0.003]        # for data=six_tasks
"""

from omegaconf import DictConfig, open_dict

from jobs.entry import job, parse
from pipeline.synthetic.output import Output


@job("generate")
def main(config: DictConfig) -> None:
    """Generates impressions, clicks, conversions and the truth."""
    from pipeline.synthetic.event_log import LogConfig, generate

    with open_dict(config):
        out = parse(DictConfig({"out": config.pop("out")}), Output).out
    settings: LogConfig = parse(config, LogConfig)
    generate(settings, out)
    size = sum(path.stat().st_size for path in out.glob("*.csv"))
    print(
        f"{out}: {settings.impressions:,} impressions over {settings.days} days from {settings.start}, {size / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
