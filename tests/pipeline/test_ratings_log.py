"""The generated ratings: that they follow their truth, look like MovieLens, and fit the data group that reads them."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import ValidationError

from features.schema.schema import Schema
from jobs.command_line import CONF
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.job import preprocess
from pipeline.synthetic import event_log
from pipeline.synthetic.ratings_log import RatingsConfig, generate_ratings

pytestmark = pytest.mark.integration

SMALL = {"ratings": 3_000, "users": 120, "items": 200}


def make(out: Path, **changes: object) -> Path:
    generate_ratings(RatingsConfig(**(SMALL | changes)), out)
    return out


def truth(logs: Path) -> dict[str, np.ndarray]:
    return {name: column.to_numpy() for name, column in pl.read_parquet(logs / "truth.parquet").to_dict().items()}


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the sizes of MovieLens-100k."""
    generate_ratings(RatingsConfig(), out := tmp_path_factory.mktemp("ratings"))
    return out


@pytest.fixture(scope="module")
def ratings(logs: Path) -> pl.DataFrame:
    return pl.read_csv(logs / "ratings.csv")


def test_sizes_shares_and_spreads_are_those_of_movielens(logs, ratings):
    assert ratings.height == 100_000
    assert not ratings.select("user_id", "item_id").is_duplicated().any()
    assert ratings["event_time"].is_sorted()
    assert (ratings["event_time"].max() - ratings["event_time"].min()) / 86_400 == pytest.approx(215, abs=3)
    shares = ratings["rating"].value_counts().sort("rating")["count"].to_numpy() / ratings.height
    assert shares == pytest.approx([0.061, 0.114, 0.271, 0.342, 0.212], abs=0.005)
    assert ratings["rating"].mean() == pytest.approx(3.53, abs=0.02)
    rows = np.sort(ratings["item_id"].value_counts()["count"].to_numpy())
    rank = np.arange(1, len(rows) + 1)
    gini = 2 * (rank * rows).sum() / (len(rows) * rows.sum()) - (len(rows) + 1) / len(rows)
    assert gini == pytest.approx(0.63, abs=0.04)
    by_user = ratings["user_id"].value_counts()["count"]
    assert by_user.median() == pytest.approx(65, abs=20)
    best_rmse = np.sqrt(np.mean((ratings["rating"].to_numpy() - truth(logs)["rating_mean"]) ** 2))
    assert best_rmse == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("outcome", ["like", "rating", "finished"])
def test_the_truth_is_the_mean_of_what_was_drawn_overall_and_in_every_decile(logs, ratings, outcome):
    known = truth(logs)
    mean = known["rating_mean" if outcome == "rating" else f"p_{outcome}"]
    drawn = {"like": ratings["rating"] >= 4, "rating": ratings["rating"], "finished": ratings["finished"]}
    label = drawn[outcome].to_numpy().astype(float)
    for group in [np.arange(len(mean)), *np.array_split(np.argsort(mean), 10)]:
        error = label[group] - mean[group]
        assert abs(error.mean()) < 4 * error.std() / np.sqrt(len(group))
    assert 0.15 < np.var(mean) / np.var(label) < 0.5  # there is something to learn, and something that nobody can


def test_users_and_items_of_the_ratings_are_in_their_tables(logs, ratings):
    users, items = pl.read_csv(logs / "users.csv"), pl.read_csv(logs / "items.csv")
    assert ratings["user_id"].is_in(users["user_id"]).all()
    assert ratings["item_id"].is_in(items["item_id"]).all()
    genres = items["genres"].str.split("|")
    assert genres.list.len().min() == 1
    assert 2 <= genres.list.len().max() <= 3
    assert (genres.list.n_unique() == genres.list.len()).all()
    assert users["age"].is_between(7, 75).all()


def test_a_part_of_the_signal_shows_in_the_logged_columns_and_most_does_not(logs, ratings):
    rows = ratings.join(pl.read_csv(logs / "items.csv"), "item_id", maintain_order="left")
    rows = rows.with_columns(score=logit(truth(logs)["p_like"]))

    def explained(column: str) -> float:
        return rows.select(pl.col("score").mean().over(column).var() / pl.col("score").var()).item()

    assert 0.05 < explained("genres") < explained("item_id") < 0.6
    assert 0.2 < explained("user_id") < 0.6


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    first, again, other = (make(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    names = sorted(path.name for path in first.iterdir())
    assert names == ["items.csv", "ratings.csv", "truth.parquet", "users.csv"]
    for name in names:
        assert (first / name).read_bytes() == (again / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("asked", [0.0, 0.4, 1.0])
def test_task_correlation_is_that_of_the_true_logits(tmp_path, asked):
    known = truth(make(tmp_path / "log", task_correlation=asked))
    assert np.corrcoef(logit(known["p_like"]), logit(known["p_finished"]))[0, 1] == pytest.approx(asked, abs=1e-6)


def test_noise_takes_its_share_of_the_signal_and_leaves_the_rates(tmp_path):
    clear, noisy = (truth(make(tmp_path / str(noise), noise=noise)) for noise in (0.0, 0.4))
    for name in ("p_like", "p_finished"):
        assert logit(noisy[name]).std() == pytest.approx(0.6 * logit(clear[name]).std(), rel=1e-6)
        assert noisy[name].mean() == pytest.approx(clear[name].mean(), abs=1e-6)
    assert noisy["rating_mean"].mean() == pytest.approx(clear["rating_mean"].mean(), abs=1e-6)


def test_every_pair_may_be_asked_for_and_no_more(tmp_path):
    make(tmp_path / "all", ratings=600, users=20, items=30)
    assert pl.read_csv(tmp_path / "all" / "ratings.csv").select("user_id", "item_id").n_unique() == 600
    with pytest.raises(ValidationError, match="nobody rates an item twice"):
        RatingsConfig(ratings=601, users=20, items=30)
    with pytest.raises(ValidationError, match="50,000,000"):
        RatingsConfig(users=100_000, items=100_000)


def data_group(name: str, raw: Path) -> tuple[Schema, dict[str, str]]:
    """The schema of a shipped data group and its truth.columns."""
    with initialize_config_dir(config_dir=str(CONF), version_base=None):
        data = OmegaConf.to_container(compose("preprocess", [f"data={name}", f"data.input={raw}"]).data, resolve=True)
    assert data["truth"]["file"] == str(raw / "truth.parquet")
    return Schema.parse(data["schema"], where=name), data["truth"]["columns"]


def test_the_data_group_reads_the_ratings_and_names_a_truth_of_each_task(tmp_path):
    raw = make(tmp_path / "raw")
    schema, columns = data_group("ratings", raw)
    preprocess(PreprocessConfig(input=str(raw), out=tmp_path / "data"), schema)
    assert list(schema.tasks) == ["like", "rating", "finished"] == list(columns)
    assert set(columns.values()) <= truth(raw).keys()
    rows = pl.concat(pl.read_parquet(path) for path in (tmp_path / "data").glob("*/part-*.parquet"))
    drawn = pl.read_csv(raw / "ratings.csv")
    rows = rows.join(drawn.rename({"rating_id": "row_id", "rating": "stars", "finished": "seen"}), "row_id")
    assert rows.height == 3_000
    labels = {task: next(c for c in rows.columns if c.endswith(task)) for task in columns}
    assert (rows[labels["like"]] == (rows["stars"] >= 4)).all()
    assert (rows[labels["rating"]] == rows["stars"]).all()
    assert (rows[labels["finished"]] == rows["seen"]).all()


def test_the_data_group_of_six_tasks_has_a_stream_and_a_truth_of_each(tmp_path):
    config = event_log.LogConfig(impressions=80, days=1, users=50, items=60, extra_tasks=3)
    event_log.generate(config, tmp_path)
    schema, columns = data_group("six_tasks", tmp_path)
    assert list(schema.tasks) == ["click", "conversion", "dwell", "event_1", "event_2", "event_3"]
    assert schema.tasks.keys() == columns.keys()
    assert set(columns.values()) <= truth(tmp_path).keys()
    for stream in schema.source.outcomes.values():
        header = (tmp_path / stream.files.format(date=config.start)).read_text().splitlines()[0].split(",")
        assert {stream.key, *stream.columns} <= set(header)
