"""A log of ratings like MovieLens, whose true probabilities are known: users who give items 1 to 5 stars.

A rating is drawn from the cumulative logit model (McCullagh 1980, "Regression models for ordinal data", proportional odds):
the odds of at least k stars are exp(score + cut_k). The score is a matrix factorisation: an effect of the user, one of the
item, and the product of their vectors (Koren, Bell and Volinsky 2009, "Matrix factorization techniques for recommender
systems"). A part of each shows in the logged columns (age, gender, occupation, year, genres), the rest in the ids alone.
Whether an item was watched to its end has a logit of the same form.

Sizes and spreads follow MovieLens-100k as LensKit's codex describes it: 943 users, 1,682 items, 215 days, a Gini
coefficient of 0.63 over the items, ratings of a user log-normal around 19 + 39. The shares of the stars are remembered, not
looked up; the strength of the effects is chosen here, to put the best possible RMSE near 0.9. Neither paper was reachable here.
"""

# Shapes: B rows, U users, I items, G genres, O occupations, R rank, K cuts between stars.

import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, model_validator

from pipeline.synthetic.draws import Array, bias, draw, named, sigmoid, write_csv, zipf
from pipeline.synthetic.output import published

GENRES, OCCUPATIONS, RANK, MAX_GENRES, MAX_PAIRS, DAY = 18, 21, 4, 3, 50_000_000, 86_400
AT_LEAST = (0.939, 0.825, 0.554, 0.212)  # share of ratings of at least 2, 3, 4 and 5 stars: 3.53 on average
FINISHED_RATE = 0.7
SCORE_SCALE, FINISHED_SCALE = 1.45, 1.2  # standard deviations of the logits
SHARES = {"user": 0.35, "item": 0.35, "match": 0.3}  # of a logit's variance
# Share of an effect's variance that the logged columns show.
SEEN_OF_USER, SEEN_OF_ITEM, SEEN_OF_VECTOR = 0.2, 0.3, 0.5
ONE_SESSION = 0.8  # of a user's ratings are of the first hour

# Second number of every random stream's seed.
PEOPLE, PAIRS, OUTCOMES, SCORE, FINISHED = range(5)


class RatingsConfig(BaseModel, extra="forbid"):
    """What to generate.

    Args:
        ratings: rows; no user rates an item twice.
        users, items: ids that may occur. All their pairs are drawn from at once, at most 50 million.
        start, days: when ratings are given, from this day on, UTC.
        task_correlation: of the true logits of rating and finishing, over the log.
        noise: share of the logits' deviation from their mean that is taken away; rates stay.
    """

    ratings: int = Field(default=100_000, ge=1)
    users: int = Field(default=943, ge=1)
    items: int = Field(default=1_682, ge=1)
    start: datetime.date = datetime.date(2026, 4, 1)
    days: int = Field(default=215, ge=1, le=10_000)
    task_correlation: float = Field(default=0.5, ge=0, le=1)
    noise: float = Field(default=0.0, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _pairs(self) -> "RatingsConfig":
        if not self.ratings <= self.users * self.items <= MAX_PAIRS:
            raise ValueError(
                f"users x items is {self.users * self.items:,}: it must be at least ratings ({self.ratings:,}), since "
                f"nobody rates an item twice, and at most {MAX_PAIRS:,}"
            )
        return self


class People(NamedTuple):
    """Users and items: what is logged of them, and how often they occur."""

    age_U: Array
    occupation_U: Array
    woman_U: Array
    start_U: Array  # seconds after the log's begin
    activity_U: Array
    year_I: Array
    genre_IG: Array  # 0 or 1
    popularity_I: Array


def generate_ratings(config: RatingsConfig, out: Path) -> None:
    """Writes ratings.csv, users.csv, items.csv and truth.parquet into `out`; none is ever half written under its name."""
    people = _people(config)
    user_B, item_B, second_B = _pairs(config, people)
    score_B = _logit(config, people, user_B, item_B, SCORE)
    own_B = _logit(config, people, user_B, item_B, FINISHED)
    own_B -= (
        score_B * (score_B @ own_B) / max(score_B @ score_B, 1e-30)
    )  # what the two share is their correlation alone
    mixed_B = config.task_correlation * score_B + np.sqrt(1 - config.task_correlation**2) * _standard(own_B)
    score_B, finished_B = ((1 - config.noise) * x for x in (SCORE_SCALE * score_B, FINISHED_SCALE * mixed_B))
    even_B = np.ones(len(user_B))
    p_BK = np.column_stack([sigmoid(score_B + bias(score_B, even_B, share)) for share in AT_LEAST])
    p_finished_B = sigmoid(finished_B + bias(finished_B, even_B, FINISHED_RATE))

    rng = np.random.default_rng([config.seed, OUTCOMES])
    id_B = np.arange(len(user_B))
    begin = int(datetime.datetime.combine(config.start, datetime.time(), datetime.timezone.utc).timestamp())
    ratings = {
        "rating_id": id_B,
        "user_id": named("u", user_B),
        "item_id": named("i", item_B),
        "rating": 1 + (rng.random((len(id_B), 1)) < p_BK).sum(1),
        "finished": (rng.random(len(id_B)) < p_finished_B).astype(np.int64),
        "event_time": begin + second_B,
    }
    truth = {"rating_id": id_B, "p_like": p_BK[:, 2], "rating_mean": 1 + p_BK.sum(1), "p_finished": p_finished_B}
    _publish(out, {"ratings": ratings, "users": _users(people), "items": _items(people)}, truth)


def _people(config: RatingsConfig) -> People:
    rng = np.random.default_rng([config.seed, PEOPLE])
    users, items = config.users, config.items
    # One to three genres, the first by its share, the others as they come.
    genre_IG = np.zeros((items, GENRES))
    drawn = draw(rng, np.cumsum(zipf(GENRES, 0.9)), items * MAX_GENRES).reshape(items, MAX_GENRES)
    for place in range(MAX_GENRES):
        has_I = rng.random(items) < (1.0, 0.5, 0.25)[place]
        genre_IG[has_I, drawn[has_I, place]] = 1
    return People(
        age_U=np.clip(rng.gamma(6.0, 4.0, users) + 10, 7, 75).astype(np.int64),
        occupation_U=draw(rng, np.cumsum(zipf(OCCUPATIONS, 0.6)), users),
        woman_U=rng.random(users) < 0.3,
        start_U=rng.integers(0, config.days * DAY, users),
        activity_U=19 + 39 * rng.lognormal(0.0, 1.2, users),
        year_I=1998 - np.minimum(rng.exponential(12.0, items), 76).astype(np.int64),
        genre_IG=genre_IG,
        popularity_I=rng.permutation(zipf(items, 2.0, head=0.1 * items)),
    )


def _pairs(config: RatingsConfig, people: People) -> tuple[Array, Array, Array]:
    """User, item and second of every rating, in order of time; pairs without repetition.

    The pairs with the largest log weight plus Gumbel noise are a sample without replacement by weight (Efraimidis and
    Spirakis 2006).
    """
    rng = np.random.default_rng([config.seed, PAIRS])
    key_UI = np.log(people.activity_U)[:, None] + np.log(people.popularity_I)
    key_UI += rng.gumbel(size=key_UI.shape)
    pair_B = np.argpartition(-key_UI, config.ratings - 1, axis=None)[: config.ratings]
    pair_B.sort()  # the order of a partition is numpy's own
    user_B, item_B = np.divmod(pair_B, config.items)
    start_B = people.start_U[user_B]
    session_B = rng.random(len(pair_B)) < ONE_SESSION
    later_B = rng.random(len(pair_B)) * np.where(session_B, 3600, config.days * DAY - start_B)
    second_B = np.minimum(start_B + later_B.astype(np.int64), config.days * DAY - 1)
    order_B = np.argsort(second_B, kind="stable")
    return user_B[order_B], item_B[order_B], second_B[order_B]


def _logit(config: RatingsConfig, people: People, user_B: Array, item_B: Array, stream: int) -> Array:
    """One outcome's effects of users, items and both together over the rows: mean 0, deviation 1."""
    rng = np.random.default_rng([config.seed, stream])
    users, items = len(people.age_U), len(people.year_I)
    age_U, age_of_I = (people.age_U - 34) / 11.0, (1998 - people.year_I) / 12.0
    user_U = _mixed(SEEN_OF_USER, np.tanh(age_U) + 0.5 * people.woman_U, rng.standard_normal(users))
    by_genre_G = rng.standard_normal(GENRES)
    of_genres_I = people.genre_IG @ by_genre_G / people.genre_IG.sum(1)
    item_I = _mixed(SEEN_OF_ITEM, of_genres_I + np.tanh(age_of_I), rng.standard_normal(items))
    occupation_OR, genre_GR = rng.standard_normal((OCCUPATIONS, RANK)), rng.standard_normal((GENRES, RANK))
    vector_UR = _mixed(SEEN_OF_VECTOR, occupation_OR[people.occupation_U], rng.standard_normal((users, RANK)))
    vector_IR = _mixed(SEEN_OF_VECTOR, people.genre_IG @ genre_GR, rng.standard_normal((items, RANK)))
    match_B = np.einsum("br,br->b", vector_UR[user_B], vector_IR[item_B])
    parts = {"user": user_U[user_B], "item": item_I[item_B], "match": match_B}
    return _standard(sum(np.sqrt(SHARES[name]) * _standard(part_B) for name, part_B in parts.items()))


def _mixed(share: float, seen: Array, own: Array) -> Array:
    """What the logged columns show and what they do not, by their shares of the variance."""
    return np.sqrt(share) * _standard(seen) + np.sqrt(1 - share) * own


def _standard(x: Any) -> Array:
    """Mean 0 and deviation 1 over the first axis; 0 where all are alike."""
    return (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)


def _users(people: People) -> dict[str, Any]:
    return {
        "user_id": named("u", np.arange(len(people.age_U))),
        "age": people.age_U,
        "gender": pa.array(np.where(people.woman_U, "F", "M")),
        "occupation": named("o", people.occupation_U),
    }


def _items(people: People) -> dict[str, Any]:
    item, genre = np.nonzero(people.genre_IG)
    offset = np.searchsorted(item, np.arange(len(people.year_I) + 1))
    genres = pa.ListArray.from_arrays(pa.array(offset, pa.int32()), named("g", genre))
    return {
        "item_id": named("i", np.arange(len(people.year_I))),
        "year": people.year_I,
        "genres": pc.binary_join(genres, "|"),
    }


def _publish(out: Path, files: dict[str, dict[str, Any]], truth: dict[str, Array]) -> None:
    with published(out) as folder:
        for name, columns in files.items():
            write_csv(folder / f"{name}.csv", columns)
        pq.write_table(pa.table(truth), folder / "truth.parquet")
