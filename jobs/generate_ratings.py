"""jobs.generate_ratings: a log of ratings like MovieLens, whose true probabilities are known.

Examples:
  python -m jobs.generate_ratings out=runs/ratings/raw                                  # sizes of MovieLens-100k
  python -m jobs.generate_ratings out=runs/ratings/raw ratings=1000000 users=6040 items=3706          # of MovieLens-1M
  python -m jobs.generate_ratings out=runs/hard/raw task_correlation=0 noise=0.3
"""

from omegaconf import DictConfig, open_dict

from jobs.entry import job, parse
from pipeline.synthetic.output import Output


@job("generate_ratings")
def main(config: DictConfig) -> None:
    """Generates ratings, users, items and the truth."""
    from pipeline.synthetic.ratings_log import RatingsConfig, generate_ratings

    with open_dict(config):
        out = parse(DictConfig({"out": config.pop("out")}), Output).out
    settings: RatingsConfig = parse(config, RatingsConfig)
    generate_ratings(settings, out)
    print(f"{out}: {settings.ratings:,} ratings by up to {settings.users:,} users of up to {settings.items:,} items")
    print(f"next   python -m jobs.preprocess data=ratings input={out} out={out.parent / 'data'}")


if __name__ == "__main__":
    main()
