"""Reports as JSON and back: a step that reads one gets what was written, whatever process wrote it."""

import json
import pickle

import pytest
from pydantic import ValidationError

from pipeline.dataset.entries import Shard, StateFile
from pipeline.ingest.messages import (
    DeadLetters,
    EncodedBatch,
    EncodeReport,
    GatherPastReport,
    JoinReport,
    LabelledPart,
    LabelReport,
    LookUpReport,
    MergeReport,
    ReadReport,
    Report,
    ScatterPastReport,
    TypedPart,
    WriteReport,
    WriteStateReport,
    from_json,
    to_json,
)
from pipeline.ingest.steps import STEPS

PART = LabelledPart(
    3, "features", {"train": 5, "valid": 0, "test": 1}, {"rule": 2}, "statistics", {"train": [-1, 1 << 60]}
)
LETTERS = DeadLetters("path", {"price: wrong value": 2}, 7, "price: 'x' is not a number")
SHARD = Shard(
    path="a", split="test", rows=2, bytes=3, sha256="ab", footer_sha256="cd", row_groups=[1, 1], observed={"t": 1},
    positives={"t": 0.1 + 0.2},
)  # fmt: skip
STATE = StateFile(path="state/a", bytes=3, sha256="ab", name="a", definition="cd", row_groups=[0, 7])
REPORTS: list[Report] = [
    ReadReport("impressions", "file", 5, 4, [TypedPart(1, 2, 3, "path", None)], [], [], None, DeadLetters()),
    ReadReport("click", "file", 0, 4, [], [PART], ["scattered"], -5, LETTERS),
    JoinReport("path", {"click": {"joined": 1, "late": 0}}, {"click": None, "buy": 9}),
    LookUpReport("item", "path", 3, 2, 1, {"matched": 5, "unmatched": 1, "early": 0}, [2**64 - 1]),
    ScatterPastReport({"seen": "path"}, {"seen": 2}, {"ctr": (1.5, 3)}, 9, 1, 2),
    GatherPastReport("seen", "path", "later"),
    WriteStateReport(STATE),
    LabelReport(PART, LETTERS),
    MergeReport("path"),
    EncodeReport("path", [EncodedBatch("valid", 0, 7)]),
    WriteReport(SHARD),
]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.step)
def test_a_report_survives_json_and_pickle(report):
    [back] = from_json(type(report), json.loads(json.dumps(to_json([report]))))
    assert back == report
    assert type(back) is type(report)
    assert pickle.loads(pickle.dumps(report)) == report


def test_every_step_has_a_report_that_bears_its_name():
    # Other jobs, such as predict, have reports of their own, which other tests in this process may have imported.
    kinds = [kind for kind in Report.__subclasses__() if kind.__module__.startswith("pipeline.ingest.")]
    assert {report.step for report in REPORTS} == set(STEPS) == {kind.step for kind in kinds}


def test_a_report_of_another_step_is_refused():
    with pytest.raises(ValidationError):
        from_json(JoinReport, to_json([MergeReport("path")]))
