from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from pipeline.storage.files import copy_file
from pipeline.synthetic import output
from pipeline.synthetic.event_log import DWELL_SIGMA, LogConfig, generate

pytestmark = pytest.mark.integration

SMALL = {"impressions": 20_000, "days": 2, "users": 20_000, "items": 2_000}


def make(out: Path, **changes: object) -> Path:
    generate(LogConfig(**(SMALL | changes)), out)
    return out


def read(logs: Path, stream: str) -> pl.DataFrame:
    return pl.concat(pl.read_csv(path, infer_schema_length=None) for path in sorted(logs.glob(f"{stream}-*.csv")))


def happened(logs: Path, stream: str) -> np.ndarray:
    """For each row of the truth, whether the stream has it."""
    return (
        pl.read_parquet(logs / "truth.parquet")["impression_id"].is_in(read(logs, stream)["impression_id"]).to_numpy()
    )


def truth(logs: Path, column: str) -> np.ndarray:
    return pl.read_parquet(logs / "truth.parquet")[column].to_numpy()


def best_ne(p: np.ndarray) -> float:
    """Expected log loss of the truth over the entropy of its mean, in nats."""

    def entropy(q: np.ndarray) -> np.ndarray:
        return -q * np.log(q) - (1 - q) * np.log(1 - q)

    return entropy(p).mean() / entropy(p.mean())


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("logs"), impressions=50_000, extra_tasks=1)


@pytest.mark.parametrize("stream", ["click", "conversion", "event_1"])
def test_the_truth_is_the_rate_of_what_happened_overall_and_in_every_decile(logs, stream):
    p = truth(logs, f"p_{stream}")
    label = happened(logs, stream if stream == "event_1" else stream + "s")
    if stream == "conversion":
        clicked = happened(logs, "clicks")
        p, label = p[clicked], label[clicked]
    groups = [np.arange(len(p)), *np.array_split(np.argsort(p), 10)]
    for group in groups:
        sigma = np.sqrt((p[group] * (1 - p[group])).sum())
        assert abs(label[group].sum() - p[group].sum()) < 4 * sigma


def test_rates_and_the_best_possible_ne_are_those_of_a_click_log(logs):
    p_click, p_conversion = truth(logs, "p_click"), truth(logs, "p_conversion")
    assert 0.1 < p_click.mean() < 0.15
    assert 0.15 < np.average(p_conversion, weights=p_click) < 0.25
    assert 0.7 < best_ne(p_click) < 0.88


def test_only_clicked_impressions_dwell_and_convert_and_time_moves_forward(logs):
    impressions, clicks, conversions = (read(logs, name) for name in ("impressions", "clicks", "conversions"))
    assert impressions["impression_id"].is_unique().all()
    assert clicks["impression_id"].is_unique().all()
    assert clicks["impression_id"].is_in(impressions["impression_id"]).all()
    joined = conversions.join(clicks, "impression_id").join(impressions, "impression_id")
    assert len(joined) == len(conversions)
    assert (joined["conversion_time"] > joined["click_time"]).all()
    assert (joined["click_time"] > joined["event_time"]).all()
    assert (joined["revenue"] > 0).all()
    assert (clicks["dwell_seconds"] > 0).all()


def test_log_dwell_is_normal_around_its_mean(logs):
    known = pl.read_parquet(logs / "truth.parquet").join(read(logs, "clicks"), "impression_id")
    z = (known["dwell_seconds"].log1p() - known["dwell_mean"]).to_numpy() / DWELL_SIGMA
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert abs(z.std() - 1) < 4 / np.sqrt(2 * len(z))
    assert np.std(known["dwell_mean"].to_numpy()) > 0.3


def test_impressions_are_in_order_of_time_within_their_day_and_miss_what_they_should(logs):
    for day in range(2):
        rows = pl.read_csv(logs / f"impressions-{date(2026, 11, 1) + timedelta(day)}.csv", infer_schema_length=None)
        assert rows["event_time"].is_sorted()
        assert {str(d) for d in pl.from_epoch(rows["event_time"]).dt.date().unique()} == {f"2026-11-0{day + 1}"}
        missing = {name: rows[name].null_count() / len(rows) for name in rows.columns}
        assert missing["user_age"] == pytest.approx(0.1, abs=0.02)
        assert missing["item_ctr_7d"] == pytest.approx(0.05, abs=0.01)
        assert 0.03 < missing["recent_items"] < 0.3
        assert rows["recent_items"].drop_nulls().str.contains(r"^i\d+(\|i\d+){0,9}$").all()
        assert rows.group_by("item_id").agg(pl.col("category").n_unique())["category"].max() == 1
        assert (rows["item_age_days"] >= 0).all()


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    first, again, other = (make(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert len(names) == 7
    for name in names:
        assert (first / name).read_bytes() == (again / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_day_generated_alone_with_the_same_rows_per_day_is_the_day_of_a_longer_run(tmp_path):
    long = make(tmp_path / "long", impressions=20_000, days=4)
    alone = make(tmp_path / "alone", impressions=5_000, days=1, start=date(2026, 11, 3))
    for stream in ("impressions", "clicks", "conversions"):
        name = f"{stream}-2026-11-03.csv"
        assert (alone / name).read_bytes() == (long / name).read_bytes()


def test_a_day_added_later_to_the_same_folder_joins_the_truth_of_the_days_before(tmp_path):
    at_once = make(tmp_path / "once", impressions=15_000, days=3)
    make(tmp_path / "nightly", impressions=10_000, days=2)
    for _ in range(2):  # and a rerun of that night changes nothing
        nightly = make(tmp_path / "nightly", impressions=5_000, days=1, start=date(2026, 11, 3))
    assert pl.read_parquet(nightly / "truth.parquet").equals(pl.read_parquet(at_once / "truth.parquet"))


def test_more_tasks_change_nothing_about_clicks_and_conversions(tmp_path):
    few, more = make(tmp_path / "few"), make(tmp_path / "more", extra_tasks=3)
    assert (more / "event_3-2026-11-02.csv").exists()
    for path in few.glob("*.csv"):
        assert path.read_bytes() == (more / path.name).read_bytes()


def test_each_extra_task_has_the_rate_that_was_asked_for_and_the_last_one_is_repeated(tmp_path):
    logs = make(tmp_path / "rates", impressions=40_000, extra_tasks=4, event_rates=[0.2, 0.02, 0.004])
    rates = [truth(logs, f"p_event_{k}").mean() for k in range(1, 5)]
    assert rates == pytest.approx([0.2, 0.02, 0.004, 0.004], rel=0.1)
    shares = [happened(logs, f"event_{k}").mean() for k in range(1, 5)]
    for rate, share in zip(rates, shares, strict=True):
        assert abs(share - rate) < 4 * np.sqrt(rate / 40_000)
    assert best_ne(truth(logs, "p_event_3")) < 0.95  # a rare task has a signal too


def test_task_correlation_is_seen_in_the_true_logits(tmp_path):
    def correlation(asked: float) -> float:
        logs = make(tmp_path / str(asked), extra_tasks=1, task_correlation=asked)
        return np.corrcoef(logit(truth(logs, "p_click")), logit(truth(logs, "p_event_1")))[0, 1]

    none, half, full = correlation(0.0), correlation(0.5), correlation(1.0)
    assert none + 0.1 < half < full - 0.1
    assert full == pytest.approx(1)


def test_noise_takes_the_signal_away_and_leaves_the_rates(tmp_path):
    clear, noisy, blind = (make(tmp_path / str(noise), noise=noise) for noise in (0.0, 0.5, 0.999))
    ne = [best_ne(truth(logs, "p_click")) for logs in (clear, noisy, blind)]
    assert ne[0] + 0.05 < ne[1] < ne[2]
    assert ne[2] == pytest.approx(1, abs=1e-4)
    rates = [truth(logs, "p_click").mean() for logs in (clear, noisy, blind)]
    assert rates == pytest.approx([rates[0]] * 3, abs=0.005)


def test_files_appear_on_a_store_by_name_the_outcomes_of_a_day_before_its_impressions(memory, monkeypatch):
    appeared = []

    def seen(source: Path, target: Path) -> None:
        copy_file(source, target)
        appeared.append(target.name)

    monkeypatch.setattr(output, "copy_file", seen)
    make(memory / "raw", days=1)
    outcomes = [name for name in appeared if name.startswith(("clicks", "conversions"))]
    assert outcomes == appeared[: len(outcomes)] != []
    assert appeared[-1] == "truth.parquet"
    assert {file.name for file in (memory / "raw").glob("*")} == {*appeared}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"impressions": 10, "days": 3}, "impressions"),
        ({"noise": 1.0}, "noise"),
        ({"colour": 1}, "colour"),
        ({"extra_tasks": 1, "event_rates": [0.1, 0.2]}, "event_rates"),
        ({"extra_tasks": 1, "event_rates": [0.0]}, "event_rates"),
        ({"event_rates": []}, "event_rates"),
    ],
)
def test_a_configuration_that_cannot_be_kept_is_refused_by_name(changes, key):
    with pytest.raises(ValidationError, match=key):
        LogConfig(**changes)
