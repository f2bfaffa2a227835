"""The card against loops over rows, numpy and closed forms; its page against an HTML parser."""

import json
import math
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from dataset_by_hand import SCHEMA, draw_rows, fit_encoders, write_dead_letters, write_manifest, write_shard
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from features.errors import UserError
from features.fit.statistics import Statistics
from pipeline.dataset.card.card import card, read_card
from pipeline.dataset.card.content import NumberEntry
from pipeline.dataset.card.drift import psi, verdict
from pipeline.dataset.card.page import page
from pipeline.dataset.card.statistics import number_statistics
from pipeline.dataset.card.tables import number, percent, tables

SHARES = st.lists(st.integers(0, 50), min_size=2, max_size=12).filter(any)


def made(rows: pa.Table, like: pa.Table | None = None) -> dict[str, Any]:
    """The card of rows, or of those under the encoders of others with the card of these as reference."""
    if like is None:
        return card(SCHEMA, *fit_encoders(rows))
    encoders, statistics = fit_encoders(like)
    return card(SCHEMA, encoders, Statistics.of(SCHEMA, rows), card(SCHEMA, encoders, statistics))


def plain_psi(p: list[float], q: list[float]) -> float:
    pairs = [(max(a, 1e-4), max(b, 1e-4)) for a, b in zip(p, q, strict=True)]
    return sum((a - b) * math.log(a / b) for a, b in pairs)


def drift_of(found: dict[str, Any], feature: str) -> dict[str, Any]:
    return next(line for line in found["drift"] if line["feature"] == feature)


@pytest.mark.parametrize(("name", "step"), [("price", 0), ("age", 1)])  # between whole numbers a digest interpolates
def test_a_number_is_described_by_what_numpy_says_of_its_raw_values(name, step):
    rows = draw_rows(20_000)
    found, x = made(rows)["numbers"][name], rows[name].drop_null().to_numpy()
    assert found["missing"] == rows[name].null_count / 20_000
    assert (found["mean"], found["std"]) == pytest.approx((x.mean(), x.std()))
    assert (found["min"], found["max"]) == (x.min(), x.max())
    for label, value in found["quantiles"].items():
        share = float(label.strip("%")) / 100
        assert (x < value - step).mean() - 0.003 <= share <= (x <= value + step).mean() + 0.003
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    assert len(counts) == 20
    assert np.abs(np.cumsum(counts) - [((x >= edges[0]) & (x <= e)).sum() for e in edges[1:]]).max() < 0.02 * len(x)
    assert sum(found["cells"]["shares"]) == pytest.approx(1)
    assert found["cells"]["shares"] == pytest.approx([0.1] * 10, abs=0.03)


@pytest.mark.parametrize("value", [0.0, -3.5, 1e12, None])
def test_a_number_without_two_values_has_a_card_too(value):
    rows = draw_rows(50).set_column(0, "price", pa.array([value] * 50, pa.float64()))
    found = json.loads(json.dumps(made(rows), allow_nan=False))["numbers"]["price"]
    if value is None:
        assert (found["missing"], found["mean"], found["histogram"]["counts"]) == (1, None, [])
    else:
        assert set(found["quantiles"].values()) == {found["min"], found["max"]} == {value}
        assert sum(found["histogram"]["counts"]) == 50
    assert drift_of(made(rows, rows), "price")["psi"] == pytest.approx(0, abs=1e-9)


def test_ids_are_described_by_counts_of_a_loop():
    rows = draw_rows(3000, cities=90)
    found = made(rows)["ids"]
    cities = Counter(c for c in rows["city"].to_pylist() if c is not None)
    total, known = sum(cities.values()), {c for c, n in cities.items() if n >= 3}
    city = found["city"]
    assert city["missing"] == 1 - total / 3000
    assert (city["vocabulary"], city["seen"], city["distinct"]) == (len(known), len(known), len(cities))
    ranked = sorted(cities.items(), key=lambda item: (-item[1], item[0]))
    assert [tuple(pair) for pair in city["top"]] == [(value, count / total) for value, count in ranked[:50]]
    assert city["unknown"] == sum(n for c, n in cities.items() if c not in known) / total
    assert city["other_known"] == sum(n for c, n in ranked[50:] if c in known) / total
    assert city["other_unknown"] == pytest.approx(sum(n for c, n in ranked[50:] if c not in known) / total)
    lists = rows["tags"].to_pylist()
    assert found["tags"]["missing"] == sum(not tags for tags in lists) / 3000
    assert found["tags"]["length"] == pytest.approx(np.mean([len(tags) for tags in lists if tags]))
    assert len(found["user"]["groups"]) == 64
    assert sum(found["user"]["groups"]) == pytest.approx(1)
    assert max(found["user"]["groups"]) < 0.05


def test_a_vocabulary_that_is_used_again_says_what_is_unknown_to_it():
    rows, like = draw_rows(3000, seed=1, cities=90), draw_rows(2000, cities=20)
    found = made(rows, like)["ids"]["city"]
    before = Counter(c for c in like["city"].to_pylist() if c is not None)
    known = {c for c, n in before.items() if n >= 3}
    cities = [c for c in rows["city"].to_pylist() if c is not None]
    assert found["unknown"] == sum(c not in known for c in cities) / len(cities) > 0
    assert (found["vocabulary"], found["seen"]) == (len(known), len(known & set(cities)))


def test_tasks_are_described_by_their_observed_rows_and_correlations_by_the_common_ones():
    rows = draw_rows(4000)
    found = made(rows)
    for name, task in found["tasks"].items():
        label = rows[f"label.{name}"].drop_null().to_numpy().astype(float)
        assert task["observed"] == len(label) / 4000
        assert (task["mean"], task["std"]) == pytest.approx((label.mean(), label.std()), rel=1e-5)
    label_BT = np.array([rows[f"label.{t}"].to_numpy().astype(float) for t in found["tasks"]]).T
    both = ~np.isnan(label_BT[:, 1])
    assert found["correlations"][0][2] == pytest.approx(np.corrcoef(label_BT[:, 0], label_BT[:, 2])[0, 1], abs=1e-6)
    assert found["correlations"][1][2] == pytest.approx(
        np.corrcoef(label_BT[both, 1], label_BT[both, 2])[0, 1], abs=1e-6
    )
    assert found["correlations"][0][1] is None  # bought is observed where click is 1


@settings(max_examples=examples(100), deadline=None)
@given(SHARES, st.randoms())
def test_the_index_is_that_of_its_formula_grows_with_distance_and_is_the_same_either_way(counts, random):
    p = np.array(counts) / sum(counts)
    q = np.array(random.sample(counts, len(counts))) / sum(counts)
    assert psi(p, q) == pytest.approx(plain_psi(p.tolist(), q.tolist())) == pytest.approx(psi(q, p))
    assert psi(p, p) == 0
    assert psi(p, q) >= 0


def test_the_same_rows_have_not_drifted_and_other_rows_of_one_distribution_are_stable():
    rows = draw_rows(3000)
    assert max(line["psi"] for line in made(rows, rows)["drift"]) < 1e-6
    for line in made(draw_rows(3000, seed=1), rows)["drift"]:
        assert line["verdict"] == "stable"
        assert line["psi"] < 3 * line["chance"]


def test_what_shifted_comes_first_and_what_stayed_is_stable():
    found = made(draw_rows(8000, seed=1, shift=1.0, cities=400), draw_rows(8000))
    verdicts = {line["feature"]: line["verdict"] for line in found["drift"]}
    assert {name: verdicts[name] for name in ("age", "user", "tags")} == dict.fromkeys(
        ("age", "user", "tags"), "stable"
    )
    assert verdicts["price"] == verdicts["city"] == "shifted"
    assert {line["feature"] for line in found["drift"][:2]} == {"price", "city"}
    assert [line["psi"] for line in found["drift"]] == sorted((line["psi"] for line in found["drift"]), reverse=True)


TIES = st.sampled_from([-1e9, -3.0, -1.0, -0.5, -1e-12, 0.0, 1e-12, 0.1, 0.5, 1.0, 2.0, 3.0, 1e9])


def plain_cells(x: np.ndarray, edges: list[float]) -> list[float]:
    """Shares of the values up to the first edge, …, and beyond the last, where the first of two equal edges is no part."""
    counts = [0] * (len(edges) + 1)
    for value in x.tolist():
        counts[
            sum(value > e or (value == e and e == after) for e, after in zip(edges, [*edges[1:], None], strict=True))
        ] += 1
    return [count / len(x) for count in counts]


@settings(max_examples=examples(150), deadline=None)
@given(st.dictionaries(TIES, st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 9))
@example({-1.0: 50, 0.0: 350, 1.0: 100}, 1, 0)
@example({-1.0: 1, 0.0: 5, 1.0: 1}, 1, 0)
@example({-1.0: 3, 0.0: 5, 1.0: 2}, 1, 0)
@example({0.0: 5, 1e9: 1}, 2, 0)
def test_cells_of_a_number_of_few_values_are_those_counted_row_by_row(counts, parts, seed):
    x = np.random.default_rng(seed).permutation(np.repeat([*counts], [*counts.values()]))
    found = [Statistics() for _ in range(parts)]
    for part, values in zip(found, np.array_split(x, parts), strict=True):
        part.rows = len(values)
        part.count_number("v", pa.array(values))
    entry = number_statistics(found[0].merge(*found[1:]), "v")
    NumberEntry.model_validate_json(json.dumps(entry))
    edges, shares = entry["cells"]["edges"], entry["cells"]["shares"]
    assert min(shares) >= 0
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx(plain_cells(x, edges), abs=0.05 + 1 / len(x))
    assert all(e == 0 or abs(e) > 1e-300 for e in [*edges, *entry["quantiles"].values(), *entry["histogram"]["edges"]])
    assert sum(entry["histogram"]["counts"]) == pytest.approx(len(x), abs=1 + 0.05 * len(x))


def test_no_share_is_negative_of_values_that_are_neighbouring_floats():
    statistics = Statistics(rows=109)
    statistics.count_number("v", pa.array([-1.0] * 42 + [-5e-324] * 18 + [0.0] * 49))
    NumberEntry.model_validate_json(json.dumps(number_statistics(statistics, "v")))


def test_drift_of_a_number_is_that_of_its_cells_counted_row_by_row():
    rows, like = draw_rows(20_000, seed=1, shift=0.3), draw_rows(20_000)
    edges = made(like)["numbers"]["price"]["cells"]["edges"]

    def shares(table: pa.Table) -> list[float]:
        cells = Counter("missing" if x is None else sum(x > edge for edge in edges) for x in table["price"].to_pylist())
        return [cells[cell] / 20_000 for cell in [*range(len(edges) + 1), "missing"]]

    expected = plain_psi(shares(rows), shares(like))
    assert drift_of(made(rows, like), "price")["psi"] == pytest.approx(expected, rel=0.05)


def test_drift_of_ids_is_that_of_the_listed_values_the_other_known_ones_unknown_ones_and_missing_ones():
    rows, like = draw_rows(3000, seed=1, cities=200), draw_rows(3000, cities=120)
    before = Counter(like["city"].to_pylist())
    ranked = sorted(((c, n) for c, n in before.items() if c is not None), key=lambda item: (-item[1], item[0]))
    listed, known = [c for c, _ in ranked[:50]], {c for c, n in ranked if n >= 3}
    assert len(ranked) > 50

    def shares(table: pa.Table) -> list[float]:
        cells = Counter(
            c if c is None or c in listed else "other" if c in known else "unknown" for c in table["city"].to_pylist()
        )
        return [cells[cell] / 3000 for cell in [*listed, "other", "unknown", None]]

    line = drift_of(made(rows, like), "city")
    assert line["psi"] == pytest.approx(plain_psi(shares(rows), shares(like)))
    assert line["missing_before"] == before[None] / 3000
    assert line["unknown_before"] < line["unknown"]


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("step", [-1, 1])
def test_a_value_of_many_rows_that_became_another_is_drift(share, step):
    rng = np.random.default_rng(0)
    heavy_B, other_B = rng.random(3000) < share, rng.normal(5, 3, 3000)
    like, same, moved = (
        draw_rows(3000).set_column(0, "price", pa.array(np.where(heavy_B, value, other_B)))
        for value in (5.0, 5.0, 5.0 + step)
    )
    assert drift_of(made(moved, like), "price")["verdict"] == "shifted"
    assert drift_of(made(same, like), "price")["verdict"] == "stable"


def test_values_that_went_missing_are_drift():
    rows = draw_rows(3000).set_column(0, "price", pa.nulls(3000, pa.float64()))
    line = drift_of(made(rows, draw_rows(3000)), "price")
    assert (line["verdict"], line["missing"]) == ("shifted", 1)
    assert line["missing_before"] < 0.2


def test_what_chance_explains_is_no_drift():
    assert [verdict(x) for x in (0.0, 0.099, 0.11, 0.24, 0.26)] == ["stable", "stable", "moves", "moves", "shifted"]
    assert verdict(0.3, chance=0.25) == "stable"
    draws = [np.random.default_rng(seed).multinomial(500, [1 / 20] * 20) / 500 for seed in range(200)]
    expected = 19 * (1 / 500 + 1 / 500)
    assert np.mean([psi(a, b) for a, b in zip(draws[::2], draws[1::2], strict=True)]) == pytest.approx(
        expected, rel=0.15
    )


def test_a_card_survives_json_and_one_of_no_rows_can_be_made():
    found = made(draw_rows(500))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    none = made(draw_rows(0), draw_rows(100))
    assert json.loads(json.dumps(none, allow_nan=False))["drift"] == []


def test_a_card_that_cannot_be_read_is_named(tmp_path):
    for content in (None, "{", "[]", '{"version": 0}'):
        if content is not None:
            (tmp_path / "statistics.json").write_text(content)
        with pytest.raises(UserError, match=r"statistics.json.*Run jobs.preprocess again"):
            read_card(tmp_path)


class Texts(HTMLParser):
    """Collects tags that are open, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag != "meta":
            self.open.append(tag)
        assert not {"src", "href", "onload"} & {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_the_page_needs_nothing_else_and_shows_raw_values_as_text(tmp_path):
    evil = "<script>alert('é')</script>"
    rows = draw_rows(300)
    cities = pa.array([evil] * 100 + ["city & co"] * 200, pa.large_string()).dictionary_encode()
    found = made(rows.set_column(rows.column_names.index("city"), "city", cities), draw_rows(300))
    letters = [write_dead_letters(tmp_path, "impressions", [evil] * 2)]
    manifest = write_manifest(tmp_path, [], letters, dead_letters={evil: 2})
    parser = Texts()
    parser.feed(page("<b>mine</b>", manifest, found))
    parser.close()
    assert parser.open == []
    assert not {"script", "b", "link", "img"} & parser.tags.keys()
    assert {evil, "city & co", "<b>mine</b>", "33.3%", "price", "click"} <= set(parser.texts)
    assert parser.tags["svg"] == len(found["numbers"]) + 1  # and the hashed feature
    assert parser.tags["rect"] == 20 * len(found["numbers"]) + 64


def test_tables_say_where_every_row_went(tmp_path):
    letters = [write_dead_letters(tmp_path, "impressions", ["bad"] * 4), write_dead_letters(tmp_path, "click", ["bad"])]
    rows = fit_encoders(draw_rows(100))[0].encode(draw_rows(100))
    manifest = write_manifest(tmp_path, [write_shard(tmp_path, "train/part.parquet", "train", rows)], letters)
    found = {table.title: table for table in tables(manifest, made(draw_rows(100)))}
    went = {line[0]: int(line[1]) for line in found["Where the rows went"].lines}
    assert went.pop("read") == sum(went.values()) == 115
    outcome = found["Outcomes by join status"]
    assert dict(zip(outcome.header, outcome.lines[0], strict=True))["late"] == "3"
    assert not any(title.startswith("Drift") for title in found)
    for table in found.values():
        assert all(len(line) == len(table.header) for line in table.lines)


def test_statistics_of_all_rows_are_not_called_those_of_train(tmp_path):
    """As of a dataset that is made with the encoders of another one, in which no split is fitted on."""
    rows = fit_encoders(draw_rows(100))[0].encode(draw_rows(100))
    shard = write_shard(tmp_path, "train/part.parquet", "train", rows)
    manifest = write_manifest(tmp_path, [shard], [], dead_letters={})
    found = made(draw_rows(100))
    found["ids"]["city"]["markers"] = {"NULL": 3}
    for content, words in ((found, "train"), (found | {"splits": {"train": {}, "test": {}}}, "all rows")):
        made_of = {table.title: table for table in tables(manifest, content)}
        assert made_of["Tasks"].header[-1] == f"std {words}"
        assert f"Ids that look like missing values ({words}): list them in source.missing if they are" in made_of
        over = {"train": "train rows", "all rows": "rows"}[words]
        assert f"Correlations of labels, over {over} where both are observed" in made_of
        html = page("mine", manifest, content)
        for text in (
            "statistics of {} over",
            "Histograms of the middle 98% of values ({})",
            "Most frequent values ({})",
        ):
            assert text.format(words) in html
        assert ("(train)" in html) == (words == "train")


def test_shares_and_numbers_are_short_and_small_ones_are_not_zero():
    assert [percent(x) for x in (None, 0, 0.0012, 0.5, 0.9996, 1)] == [
        "–",
        "0.0%",
        "0.12%",
        "50.0%",
        "99.96%",
        "100.0%",
    ]
    assert [number(x) for x in (None, 0, 0.00012, 1234567, 1.5e12)] == ["–", "0", "0.00012", "1,234,567", "1.5e+12"]
