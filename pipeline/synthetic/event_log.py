"""Raw event logs with known true probabilities, which give the best possible NE. The demo trains on one.

Every outcome's logit is a weighted sum of the same K nonlinear effects (`World.effects`), with one weight vector per
task and one cosine between any two of them: the synthetic data of MMoE (Ma et al. 2018, section 3.2), which
MultiTab-Bench (arXiv 2511.09970) takes to many tasks. Nearly all of the signal is in the logged columns.

The world (items, users, weights) is drawn from the seed alone and a day's rows from the seed and its date, so one more
day can be added later, alone, and has the same items, users and tastes.
"""

# Shapes: B rows of a day, C categories, I items, U users, S segments, D devices, R rank of taste, K effects, T tasks,
# L recent items of all rows.

import datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, model_validator

from features.errors import UserError, one_line
from features.parquet_limits import check_file
from features.regular_files import local_file, lstat_regular
from pipeline.synthetic.draws import Array, bias, draw, named, sigmoid, write_csv, zipf
from pipeline.synthetic.output import published

CATEGORIES, SEGMENTS, RANK, COUNTRIES, QUERIES = 60, 12, 2, 50, 1_000_000
DEVICES, DEVICE_SHARES = ("phone", "desktop", "tablet", "tv"), (0.5, 0.3, 0.13, 0.07)
MAX_RECENT, MAX_ROWS_PER_DAY, DAY = 10, 10_000_000, 86_400

# A task's rate, and the standard deviation of its logit: what puts the best possible NE near 0.8.
CLICK, CONVERSION, EVENT_SCALE = (0.13, 1.5), (0.2, 1.5), 1.3
DWELL_MEAN, DWELL_SCALE, DWELL_SIGMA = 4.0, 0.5, 0.6  # of log1p(seconds)

# Spread of each family of effects before a task weighs it. A single user's own effect is next to nothing: most users
# are seen too seldom for any model to learn it.
STRENGTH = {
    "category": 1.0, "taste": 0.9, "match": 0.8, "quality": 0.6, "position": 1.0, "device": 0.8, "place": 0.5,
    "country": 0.4, "hour": 0.6, "age": 1.0, "price": 1.0, "freshness": 0.7, "activity": 0.7, "user": 0.08,
}  # fmt: skip

# Second number of every random stream's seed; those of a day or of an extra task have more numbers after it.
WORLD, WEIGHTS, SAMPLE, ROWS, OUTCOMES = range(5)


class LogConfig(BaseModel, extra="forbid"):
    """What to generate.

    A day's rows depend on the number of rows per day, but not on start and days: eight days of 75,000 impressions and
    later one more, with `start` on the ninth, `days=1` and `impressions=75_000`, are the same log as nine at once.

    Args:
        impressions: rows over all days, the same number each day.
        days: number of days from start on.
        start: first day, UTC.
        users: user ids that may occur.
        items: item ids that may occur.
        extra_tasks: binary outcomes besides click and conversion, each of any impression.
        event_rates: mean rates of the extra tasks, in order; the last one is also that of all further ones.
        task_correlation: cosine between the weight vectors of any two tasks.
        noise: share of the logit's deviation from its mean that is taken away; rates stay.
    """

    impressions: int = Field(default=600_000, ge=1)
    days: int = Field(default=8, ge=1)
    start: datetime.date = datetime.date(2026, 11, 1)
    users: int = Field(default=1_000_000, ge=1)
    items: int = Field(default=50_000, ge=CATEGORIES)
    extra_tasks: int = Field(default=0, ge=0, le=16)
    event_rates: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default=[0.2], min_length=1)
    task_correlation: float = Field(default=0.5, ge=0, le=1)
    noise: float = Field(default=0.0, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _rows_per_day(self) -> "LogConfig":
        if self.impressions % self.days or self.rows_per_day >= MAX_ROWS_PER_DAY:
            raise ValueError(
                f"impressions ({self.impressions:,}) must be a multiple of days ({self.days}), with fewer than "
                f"{MAX_ROWS_PER_DAY:,} a day: a day's rows must not depend on the days around it"
            )
        return self

    @model_validator(mode="after")
    def _as_many_rates_as_tasks(self) -> "LogConfig":
        if len(self.event_rates) > max(1, self.extra_tasks):
            raise ValueError(f"event_rates has {len(self.event_rates)} rates for extra_tasks={self.extra_tasks}")
        return self

    @property
    def rows_per_day(self) -> int:
        """B, the same for every day."""
        return self.impressions // self.days


class Rows(NamedTuple):
    """The impressions of one day as drawn, nothing hidden or formatted yet; ids are indices into the world's arrays."""

    time_B: Array  # unix seconds
    user_B: Array
    item_B: Array
    query_B: Array
    device_B: Array
    position_B: Array
    recent: Array  # items, all rows' one after the other
    recent_offset: Array  # [B + 1]
    taste_BR: Array  # mean factor of the recent items' categories, 0 without any
    item_age_B: Array  # days


class World:
    """Items, users and task weights: a function of the configuration's seed and sizes, not of its days or rows."""

    def __init__(self, config: LogConfig) -> None:
        rng = np.random.default_rng([config.seed, WORLD])
        # Items: popularity falls as Zipf's law with a flattened head, so that no single item is a tenth of the log.
        share_C = zipf(CATEGORIES, 0.5)
        self.category_I = rng.permutation(np.searchsorted(np.cumsum(share_C), np.linspace(0, 1, config.items, False)))
        self.factor_CR = rng.standard_normal((CATEGORIES, RANK))
        self.quality_I = rng.standard_normal(config.items)
        self.log_price_I = rng.normal(3.0, 0.8, config.items)
        self.lifetime_I = np.ceil(rng.lognormal(4.0, 0.8, config.items)).astype(np.int64)
        self.phase_I = rng.integers(0, self.lifetime_I)
        popularity_I = rng.permutation(zipf(config.items, 1.7, head=100))
        self.item_cdf_I = np.cumsum(popularity_I)
        # Items of a category side by side: a draw within a category is a draw from one stretch of the distribution.
        self.by_category_I = np.argsort(self.category_I, kind="stable")
        self.by_category_cdf = np.concatenate([[0.0], np.cumsum(popularity_I[self.by_category_I])])
        self.category_start = np.searchsorted(self.category_I[self.by_category_I], np.arange(CATEGORIES + 1))
        self.device_DR = rng.standard_normal((len(DEVICES), RANK + 1))
        self.country_effect = rng.standard_normal(COUNTRIES)
        # Segments like categories whose factors point their way; a user's recent items show it.
        liking_SC = np.exp(1.5 * rng.standard_normal((SEGMENTS, RANK)) @ self.factor_CR.T) * share_C
        self.liking_cdf_SC = np.cumsum(liking_SC / liking_SC.sum(1, keepdims=True), axis=1)
        self.query_id = rng.permutation(QUERIES)
        self.query_cdf = np.cumsum(zipf(QUERIES, 0.8))
        # Users.
        self.user_id_U = rng.permutation(config.users)
        self.user_cdf_U = np.cumsum(zipf(config.users, 1.8, head=200))
        self.segment_U = rng.integers(0, SEGMENTS, config.users)
        self.age_U = np.clip(rng.gamma(6.0, 4.5, config.users) + 14, 16, 90).astype(np.int64)
        self.country_U = draw(rng, np.cumsum(zipf(COUNTRIES, 1.1)), config.users)
        self.activity_U = np.floor(rng.lognormal(2.2, 1.2, config.users)).astype(np.int64)
        self.effect_U = rng.standard_normal(config.users)

        # Effects are standardised and rates set on a sample of this world that no day's rows have a part in.
        sample = self.rows(np.random.default_rng([config.seed, SAMPLE]), datetime.date(2026, 1, 1), 50_000)
        effects = self.effects(sample)
        self.strength_K = np.array([STRENGTH[name.split()[0]] for name in effects])
        x_BK = np.column_stack(list(effects.values()))
        self.mean_K, self.std_K = x_BK.mean(0), x_BK.std(0)
        self.weight_KT = _directions(config, len(effects))
        self.weight_KT /= (self.standardised(effects) @ self.weight_KT).std(0)
        self.bias_T = np.zeros(self.weight_KT.shape[1])
        scale = [CLICK[1], CONVERSION[1], DWELL_SCALE] + [EVENT_SCALE] * config.extra_tasks
        self.weight_KT *= (1 - config.noise) * np.array(scale)
        logit_BT = self.logits(sample)
        seen_B = np.ones(len(logit_BT))
        self.bias_T[0] = bias(logit_BT[:, 0], seen_B, CLICK[0])
        self.bias_T[1] = bias(logit_BT[:, 1], sigmoid(logit_BT[:, 0] + self.bias_T[0]), CONVERSION[0])
        self.bias_T[2] = DWELL_MEAN
        rates = config.event_rates + [config.event_rates[-1]] * config.extra_tasks
        self.bias_T[3:] = [bias(logit_B, seen_B, rate) for logit_B, rate in zip(logit_BT[:, 3:].T, rates, strict=False)]

    def rows(self, rng: np.random.Generator, date: datetime.date, count: int) -> Rows:
        """Draws `count` impressions of a day, in order of time."""
        midnight = int(datetime.datetime.combine(date, datetime.time(), datetime.timezone.utc).timestamp())
        second = np.arange(DAY)
        traffic_cdf = np.cumsum(1 - 0.6 * np.cos(2 * np.pi * (second / DAY - 1 / 6)))  # least at 4, most at 16 o'clock
        time_B = midnight + np.sort(draw(rng, traffic_cdf / traffic_cdf[-1], count))
        user_B, item_B = draw(rng, self.user_cdf_U, count), draw(rng, self.item_cdf_I, count)
        activity_B = self.activity_U[user_B]
        length_B = rng.binomial(MAX_RECENT, activity_B / (activity_B + 10.0))
        owner = np.repeat(np.arange(count), length_B)
        recent = self._items_liked(rng, self.segment_U[user_B[owner]])
        factor_LR = self.factor_CR[self.category_I[recent]]
        taste_BR = np.column_stack([np.bincount(owner, factor_L, count) for factor_L in factor_LR.T])
        return Rows(
            time_B=time_B,
            user_B=user_B,
            item_B=item_B,
            query_B=draw(rng, self.query_cdf, count),
            device_B=draw(rng, np.cumsum(DEVICE_SHARES), count),
            position_B=1 + draw(rng, np.cumsum(zipf(10, 0.6)), count),
            recent=recent,
            recent_offset=np.concatenate([[0], np.cumsum(length_B)]),
            taste_BR=taste_BR / np.maximum(length_B, 1)[:, None],
            # An item is listed anew when its lifetime is over, so its age follows from the date alone.
            item_age_B=(date.toordinal() + self.phase_I[item_B]) % self.lifetime_I[item_B],
        )

    def _items_liked(self, rng: np.random.Generator, segment_L: Array) -> Array:
        """One item for each given segment: a category it likes, then an item of that category by popularity."""
        flat_cdf = (self.liking_cdf_SC + np.arange(SEGMENTS)[:, None]).ravel()
        category_L = np.searchsorted(flat_cdf, segment_L + rng.random(len(segment_L)), side="right") % CATEGORIES
        low_L = self.by_category_cdf[self.category_start[category_L]]
        high_L = self.by_category_cdf[self.category_start[category_L + 1]]
        draw_L = low_L + (high_L - low_L) * rng.random(len(segment_L))
        place_L = np.searchsorted(self.by_category_cdf, draw_L, side="right")
        return self.by_category_I[np.minimum(place_L, len(self.by_category_I)) - 1]

    def effects(self, rows: Rows) -> dict[str, Array]:
        """The K effects by name, each [B]; the first word is the family that STRENGTH knows."""
        factor_BR = self.factor_CR[self.category_I[rows.item_B]]
        device_BR = self.device_DR[rows.device_B]
        hour_B = 2 * np.pi * (rows.time_B % DAY) / DAY
        age_B = (self.age_U[rows.user_B] - 40.0) / 12.0
        price_B = (self.log_price_I[rows.item_B] - 3.0) / 0.8
        return {
            **{f"category {r}": factor_BR[:, r] for r in range(RANK)},
            **{f"taste {r}": rows.taste_BR[:, r] for r in range(RANK)},
            # Hinges on two columns together, taste x category and device x category. A plain product leaves no trace
            # in either column alone, and networks hardly find it before they start to learn rows by heart.
            **{f"match {r}": np.maximum(rows.taste_BR[:, r] + factor_BR[:, r], 0) for r in range(RANK)},
            **{f"place {r}": np.maximum(device_BR[:, r] + factor_BR[:, r], 0) for r in range(RANK)},
            "device": device_BR[:, RANK],
            "quality": self.quality_I[rows.item_B],
            "position": -np.log(rows.position_B),
            "hour sin": np.sin(hour_B),
            "hour cos": np.cos(hour_B),
            "age": np.tanh(age_B),
            "age peak": np.exp(-(age_B**2)),
            "price": -np.tanh(price_B),
            "price peak": np.exp(-(price_B**2)),
            "freshness": np.exp(-rows.item_age_B / 14.0),
            "activity": np.log1p(self.activity_U[rows.user_B]),
            "country": self.country_effect[self.country_U[rows.user_B]],
            "user": self.effect_U[rows.user_B],
        }

    def standardised(self, effects: dict[str, Array]) -> Array:
        """Effects of mean 0 and their family's spread, [B, K]."""
        return (np.column_stack(list(effects.values())) - self.mean_K) / self.std_K * self.strength_K

    def logits(self, rows: Rows) -> Array:
        """[B, T]: click, conversion given a click, mean of log1p(dwell) given a click, then the extra tasks."""
        return self.standardised(self.effects(rows)) @ self.weight_KT + self.bias_T


def generate(config: LogConfig, out: Path) -> None:
    """Writes impressions-, clicks-, conversions- and event_k-DATE.csv of each day, and truth.parquet, into `out`.

    Files of other days stay, and so do their rows of truth.parquet. Nothing under a final name is ever half written.
    """
    world = World(config)
    with published(out) as folder:
        dates = [config.start + datetime.timedelta(days=day) for day in range(config.days)]
        truth = pa.concat_tables([_write_day(config, world, date, folder) for date in dates])
        if lstat_regular(out, "truth.parquet"):
            kept = _read_truth(out / "truth.parquet")
            day = pc.divide(kept["impression_id"], MAX_ROWS_PER_DAY)
            kept = kept.filter(pc.invert(pc.is_in(day, pa.array([date.toordinal() for date in dates]))))
            truth = pa.concat_tables([kept, truth], promote_options="default").sort_by("impression_id")
        # Files appear by name, so outcomes before the impressions that they belong to.
        pq.write_table(truth, folder / "truth.parquet")


def _read_truth(path: Path) -> pa.Table:
    """The truth of the days that are there. Raises UserError for a file that cannot be read or unpacks to too much."""
    try:
        with local_file(path) as local:
            schema = pq.read_schema(local)
            if not all(map(pa.types.is_primitive, schema.types)) or schema.field("impression_id").type != pa.int64():
                raise ValueError("its columns are not numbers")
            check_file(local)
            kept = pq.read_table(local)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}). Remove it, or choose another out=.") from None
    return kept


def _write_day(config: LogConfig, world: World, date: datetime.date, folder: Path) -> pa.Table:
    """Draws and writes one day; returns its part of the truth."""
    rng, count = np.random.default_rng([config.seed, ROWS, date.toordinal()]), config.rows_per_day
    rows = world.rows(rng, date, count)
    logit_BT = world.logits(rows)
    p_BT = sigmoid(logit_BT)
    id_B = date.toordinal() * MAX_ROWS_PER_DAY + np.arange(count)
    price_B = np.round(np.exp(world.log_price_I[rows.item_B]), 2)
    write_csv(folder / f"impressions-{date}.csv", _impressions(world, rng, rows, id_B, price_B))

    clicked_B = rng.random(count) < p_BT[:, 0]
    click_time_B = rows.time_B + rng.integers(1, 120, count)
    dwell_B = np.maximum(np.round(np.expm1(rng.normal(logit_BT[:, 2], DWELL_SIGMA)), 3), 0.001)
    clicks = {"impression_id": id_B, "click_time": click_time_B, "dwell_seconds": dwell_B}
    write_csv(folder / f"clicks-{date}.csv", {name: column[clicked_B] for name, column in clicks.items()})

    converted_B = clicked_B & (rng.random(count) < p_BT[:, 1])
    delay_B = rng.exponential(1200, count).astype(np.int64) + 10
    revenue_B = np.round(price_B * rng.geometric(0.7, count) * rng.uniform(0.8, 1.0, count), 2)
    conversions = {"impression_id": id_B, "conversion_time": click_time_B + delay_B, "revenue": revenue_B}
    write_csv(folder / f"conversions-{date}.csv", {name: column[converted_B] for name, column in conversions.items()})

    truth = {"impression_id": id_B, "p_click": p_BT[:, 0], "p_conversion": p_BT[:, 1], "dwell_mean": logit_BT[:, 2]}
    for k in range(1, config.extra_tasks + 1):
        # A stream of its own: more tasks change nothing about the others.
        rng = np.random.default_rng([config.seed, OUTCOMES, date.toordinal(), k])
        truth[f"p_event_{k}"] = p_B = p_BT[:, 2 + k]
        happened_B = rng.random(count) < p_B
        event = {"impression_id": id_B, f"event_{k}_time": rows.time_B + rng.integers(1, 3600, count)}
        write_csv(folder / f"event_{k}-{date}.csv", {name: column[happened_B] for name, column in event.items()})
    return pa.table(truth)


def _impressions(world: World, rng: np.random.Generator, rows: Rows, id_B: Array, price_B: Array) -> dict[str, Any]:
    """The logged columns: ids as strings, and a few percent of values lost."""
    count = len(id_B)
    age_B = world.age_U[rows.user_B]
    # A tenth of the ages is missing, more often those of younger users, so that missingness is slightly informative.
    age_missing_B = rng.random(count) < 0.05 + 0.1 / (1 + np.exp((age_B - 40) / 6.0))
    rate_B = sigmoid(-1.9 + 0.5 * world.quality_I[rows.item_B] + rng.normal(0, 0.15, count))  # around 0.13
    recent = pa.ListArray.from_arrays(pa.array(rows.recent_offset, pa.int32()), named("i", rows.recent))
    return {
        "impression_id": pa.array(id_B),
        "event_time": pa.array(rows.time_B),
        "user_id": named("u", world.user_id_U[rows.user_B]),
        "item_id": named("i", rows.item_B),
        "category": named("c", world.category_I[rows.item_B]),
        "query_id": named("q", world.query_id[rows.query_B]),
        "device": pa.array(DEVICES).take(pa.array(rows.device_B, mask=rng.random(count) < 0.01)),
        "country": named("k", world.country_U[rows.user_B], rng.random(count) < 0.02),
        "position": pa.array(rows.position_B),
        "recent_items": pc.binary_join(recent, "|"),
        "user_age": pa.array(age_B, mask=age_missing_B),
        "item_price": pa.array(price_B, mask=rng.random(count) < 0.02),
        "item_age_days": pa.array(rows.item_age_B),
        "user_activity": pa.array(world.activity_U[rows.user_B]),
        "item_ctr_7d": pa.array(np.round(rate_B, 4), mask=rng.random(count) < 0.05),
    }


def _directions(config: LogConfig, effects: int) -> Array:
    """Weight vectors [K, T] of unit length with the same cosine between any two.

    Ma et al. 2018, section 3.2, for any number of tasks: a direction that all share, here the one that likes more of
    every effect, mixed with one of each task's own that is orthogonal to all others.
    """
    tasks = 3 + config.extra_tasks
    rng = np.random.default_rng([config.seed, WEIGHTS])
    own = rng.standard_normal((tasks, effects))  # task by task, so that the first ones stay when more are asked for
    basis_KT, _ = np.linalg.qr(np.vstack([np.ones(effects), own]).T)
    shared_K = np.full(effects, effects**-0.5)
    return np.sqrt(config.task_correlation) * shared_K[:, None] + np.sqrt(1 - config.task_correlation) * basis_KT[:, 1:]
