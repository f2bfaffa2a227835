"""Models that nobody trained and their pages as a browser reads them: for tests of reports."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from typing import Any

import polars as pl
from hostile_text import assert_tame

from pipeline.evaluation.metrics.evaluated import COLUMNS, Evaluated, Provenance
from pipeline.evaluation.report.content import (
    Model,
    TrainLine,
)
from pipeline.run.explanation import Explanation

VOID = {"meta", "br", "img", "input", "link", "hr"}
KINDS = {"click": "binary", "dwell": "regression"}
METRICS = {
    "click": {"rows": 1000, "weight_sum": 1000.0, "base_rate": 0.1, "ne": 0.8123, "log_loss": 0.26, "auc": 0.71,
              "calibration": 1.04, "ece": 0.01},
    "dwell": {"rows": 100, "weight_sum": 100.0, "label_mean": 2.0, "mse": 4.0, "nrmse": 0.93, "r2": 0.14, "calibration": 0.99},
}  # fmt: skip


class Parsed(HTMLParser):
    """A page's elements; fails on one that is not closed, or closed twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # innermost tag, text
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def values(self, name: str) -> list[str]:
        return [found[name] or "" for _, found in self.elements if name in found]

    def shown(self) -> str:
        return "\n".join(text for tag, text in self.texts if tag not in ("style", "script"))


def checked(text: str) -> Parsed:
    """A page's elements, once all that holds of every page is asserted."""
    assert_tame(text)
    parsed = Parsed(text)
    ids = parsed.values("id")
    assert len(set(ids)) == len(ids)
    assert all(link.startswith("#") or re.fullmatch(r"\./[^:]*", link) for link in parsed.values("href"))
    assert {link[1:] for link in parsed.values("href") if link.startswith("#")} == set(ids)
    assert not any(name in ("src", "style", "srcset", "action") or name.startswith("on")
                   for _, found in parsed.elements for name in found)  # fmt: skip
    assert not re.search(r"https?:|@import|url\(", text)
    [policy] = [found["content"] for tag, found in parsed.elements if found.get("http-equiv")]
    for tag in ("style", "script"):
        [inner] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    for tag, found in parsed.elements:
        if tag == "svg":
            assert re.fullmatch(r"0 0 [\d.]+ [\d.]+", found["viewbox"] or "")
        assert not any(
            "nan" in (value or "").split() for name, value in found.items() if name in ("x", "y", "cx", "cy")
        )
    return parsed


def figures(metrics: dict[str, dict[str, float]], slices: list[str], shift: float = 0.0) -> Evaluated:
    lines: list[tuple[Any, ...]] = []
    for task, found in metrics.items():
        for number, name in enumerate(["all", *slices]):
            for metric, value in found.items():
                size = found["rows"] / (number + 1)
                part = size if metric in ("rows", "weight_sum") else value * (1 + 0.03 * number)
                left = [] if metric in ("rows", "weight_sum") else [part + shift + 0.001 * (k % 5) for k in range(20)]
                lines.append(
                    (task, metric, name.split("=")[0], name, int(size), part + shift * bool(left), 0.004, left)
                )
    provenance = Provenance(run="r", step=200, checkpoint="c", dataset="/d", split="test", cluster="user", buckets=20)
    return Evaluated(pl.DataFrame(lines, schema=COLUMNS, orient="row"), provenance)


def record(step: int, metrics: dict[str, dict[str, float]] = METRICS, **further: Any) -> dict[str, Any]:
    bins = [[0.01 * (b + 1), 0.011 * (b + 1), 0.002, 50.0] for b in range(20)]
    gates = [[[0.7, 0.2, 0.1], [0.1, -0.3, 1.2]]]
    names = [{"units": ["click", "dwell"], "experts": ["click", "dwell", "shared"]}]
    return {
        "step": step, "rows": 100 * step, "checkpoint": "c", "split": "test", "dataset": "/d", "metrics": metrics,
        "buckets": 20, "intervals": {task: {"ne": 0.004, "nrmse": 0.01} for task in metrics},
        "reliability": {"click": bins, "dwell": []},
        "gates": gates, "gate_names": names, "lag": {"steps": 3, "seconds": 1.5}, "rows_evaluated": 1000, "rows_per_s": 5e4,
        "seconds": 0.2, "time": 1.7e9, "ranks": 1, "ranking": "exact", "cluster": "user", "share": 1.0, **further,
    }  # fmt: skip


def model(
    name: str = "adatt", slices: tuple[str, ...] = ("device=mobile", "day=2026-11-08"), shift: float = 0.0
) -> Model:
    training = [
        TrainLine(100 * s, {"click": 0.9}, {"dwell": 0.8}, {"lr": 0.01, "rows_per_s": 1e4}) for s in range(1, 201, 10)
    ]
    return Model(
        name, "test", "/d", KINDS, [record(100), record(200)], figures(METRICS, list(slices), shift),
        {"click": {"ne": 0.79}, "dwell": {"nrmse": 0.9}}, training, [training[-1]],
        {"model": {"fusion": {"name": name, "levels": [[4]]}}, "train": {"seed": 7, "epochs": 1}}, "./data.card.html",
    )  # fmt: skip


def explanation_of(names: list[str], tasks: list[str], **further: Any) -> Explanation:
    rise = {"value": 0.1, "se": 0.01, "low": 0.08, "high": 0.12}
    importance = [
        {"name": name, "features": [name], "tasks": {task: rise | {"value": 0.1 / (n + 1)} for task in tasks}}
        for n, name in enumerate(names)
    ]
    z_TT: list[list[float | None]] = [
        [0.004 * (i == j) - 0.001 * (i + 1) * (i != j) for j in range(len(tasks))] for i in range(len(tasks))
    ]
    affinity = {
        "tasks": tasks, "batches": 19, "batch_rows": 64, "dense_rate": 0.1, "table_rate": 0.1, "z_TT": z_TT,
        "se_TT": [[0.0001] * len(tasks)] * len(tasks),
    }  # fmt: skip
    figures = {task: {"metric": "ne", "value": 0.8} for task in tasks}
    return Explanation.model_validate(
        {
            "run": "r", "step": 200, "checkpoint": "c", "dataset": "/d", "split": "test", "rows": 1234, "share": 0.5,
            "cluster": "user", "buckets": 20, "permutations": 3, "seed": 0, "confidence": 0.9, "figures": figures,
            "importance": importance, "affinity": affinity, **further,
        }
    )  # fmt: skip
