"""gates.yaml: what is read, what is refused with file and key, and gates that name nothing real."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluated_by_hand import around, evaluated, line
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import UserError
from pipeline.release.gates import check_gates, judge
from pipeline.release.gates_config import Gate, Gates, default_gates, load_gates

ROOT = Path(__file__).parents[2]
CLICK = {"click": "binary"}
KINDS = CLICK | {"watch": "regression"}
DIMENSIONS = {
    "device": None,
    "device, country": None,
    "position <= 3": ["position <= 3"],
    "user_age": [f"user_age {ages}" for ages in ("below 18", "18..25", "25..65", "from 65", "missing")],
    "user_id (cold start)": ["user_id: missing", "user_id: unseen", "user_id: rare"],
    "day": [f"day=2026-11-{day:02d}" for day in range(1, 31)],
    "hour": [f"hour={hour:02d}" for hour in range(24)],
}


def written(folder: Path, content: Any) -> Path:
    file = folder / "gates.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Input should be a mapping"),
        ("task: {}", "task: Extra inputs are not permitted"),
        ("default: [{metric: ne}]", "default.0: has no bound: give min, max, band or change"),
        ("default: [{max: 1}]", "default.0.metric: Field required"),
        ("default: [{metric: ne, max: .nan}]", "default.0.max: Input should be a finite number"),
        ("default: [{metric: ne, max: yes}]", "default.0.max: Input should be a valid number"),
        ("default: [{metric: ne, max: 1, tresh: 2}]", "default.0.tresh: Extra inputs are not permitted"),
        ("default: [{metric: ne, max: 1, change: {worse_by_at_most: 1}}]", "max and change are two gates"),
        ("default: [{metric: ne, max: 1, band: [0, 1]}]", "give band or max, not both"),
        ("default: [{metric: ne, band: [1.1, 0.9]}]", "the lower bound 1.1 is above the upper one 0.9"),
        ("default: [{metric: ne, band: [1]}]", "default.0.band: List should have at least 2 items"),
        ("default: [{metric: ne, max: 1, slice: a=b, slices: c}]", "give slice or slices, not both"),
        ("default: [{metric: ne, max: 1, confidence: 95}]", "default.0.confidence: Input should be less than 1"),
        ("default: [{metric: ne, max: 1, missing: skip}]", "default.0.missing: Input should be 'fail' or 'pass'"),
        (
            "default: [{metric: ne, max: 1, min_rows: -1}]",
            "default.0.min_rows: Input should be greater than or equal to 0",
        ),
        ("default: [{metric: ne, max: 1, below_min_rows: pass}]", "below_min_rows needs min_rows"),
        ("default: [{metric: auc, min: 1, allow_ne_above_one: true}]", "allow_ne_above_one is for gates on ne"),
        ("tasks: {click: [{metric: ne, change: {}}]}", "tasks.click.gates.0.change: give one of worse_by_at_most and"),
        ("tasks: {click: [{metric: ne, change: {worse_by_at_most: 1, better_by_at_least: 1}}]}", "give one of"),
        ("tasks: {click: [{metric: ne, change: {worse_by_at_most: -1}}]}", "worse_by_at_most: must be at least 0"),
        ("tasks: {click: [{metric: ne, change: {worse_by_at_most: 1 %!}}]}", "must be a number, or a share"),
        ("tasks: {click: [{metric: ne, change: {worse_by_at_most: nan%}}]}", "must be a number, or a share"),
        ("tasks: {click: [{metric: ne, change: {worse_by_at_most: true}}]}", "must be a number, or a share"),
        ('tasks: {click: [{metric: ne, change: {worse_by_at_most: "\\n1%"}}]}', "must be a number, or a share"),
        ("tasks: {click: {gate: []}}", "tasks.click.gate: Extra inputs are not permitted"),
        ("tasks: {click: 1}", "tasks.click: Input should be a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_what_is_no_gate_is_refused_with_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_gates(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["1%", "device=*"])
)
KEYS = st.sampled_from(
    [*Gate.model_fields, "default", "tasks", "gates", "worse_by_at_most", "click", "watch", "ne"]
) | st.text(max_size=4)
METRICS = st.sampled_from(["ne", "auc", "calibration", "nrmse", "rows", "x"])
GATES = st.fixed_dictionaries(
    {"metric": METRICS},
    optional={
        "max": st.floats(-1, 2),
        "slice": st.sampled_from(["all", "device=a"]) | st.text(max_size=5),
        "slices": st.sampled_from(["device", "device=*", "*", "["]) | st.lists(st.text(max_size=5), max_size=2),
        "change": st.dictionaries(st.sampled_from(["worse_by_at_most", "better_by_at_least"]), LEAVES, max_size=2),
        "confidence": st.floats(0.4, 1),
        "min_rows": st.integers(-1, 2000),
    },
)
DOCUMENTS = st.one_of(
    st.recursive(
        LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
    ),
    st.fixed_dictionaries(
        {"default": st.lists(GATES, max_size=3)},
        optional={"tasks": st.dictionaries(st.sampled_from(["click", "watch", "x"]), st.lists(GATES, max_size=2))},
    ),
)


@settings(max_examples=examples(150), deadline=None)
@given(DOCUMENTS)
def test_any_document_is_gates_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(json.dumps(content))  # JSON is YAML; NaN and Infinity are text there
    figures = [
        line(task, metric, 0.8, around(0.8, 0.01), name)
        for task, metric in (("click", "ne"), ("click", "auc"), ("click", "calibration"), ("watch", "nrmse"))
        for name in ("all", "device=a")
    ]
    try:
        gates = load_gates(file)
        check_gates(gates, KINDS, DIMENSIONS, str(file))
    except UserError as error:
        faults = str(error).splitlines()
        if len(faults) != 1 or not faults[0].startswith(f"{file}: "):
            pytest.fail(f"not one line: {faults}")
        return
    verdict = judge(gates, KINDS, evaluated(figures), evaluated(figures))
    assert {gate.task for gate in verdict.gates} <= KINDS.keys()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"tasks": {"clik": []}}, "tasks.clik: no such task (did you mean click?); there are click, watch"),
        ({"default": [{"metric": "au", "max": 1}]}, "default.0: metric au (did you mean auc?)"),
        ({"tasks": {"watch": {"allow_ne_above_one": True}}}, "tasks.watch.allow_ne_above_one: is for binary tasks"),
        ({"tasks": {"watch": [{"metric": "ne", "max": 1}]}}, "tasks.watch.0: metric ne: regression tasks have"),
        ({"default": [{"metric": "gauc", "min": 1, "slice": "device=a"}]}, "gauc: is of the whole split only"),
        ({"default": [{"metric": "gauc", "min": 1, "slices": "device"}]}, "gauc: is of the whole split only"),
        ({"default": [{"metric": "calibration", "change": {"worse_by_at_most": 1}}]}, "neither direction is better"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "os=ios"}]}, "default.0: slice os=ios: the evaluation has slices of"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "device"}]}, "(for each slice of it: slices: device)"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "country=DE"}]}, "slice country=DE"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "device=a, os=b"}]}, "slice device=a, os=b"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "device=a, b, country=c"}]}, "slice device=a, b, country=c"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "device=*"}]}, "(for each slice of it: slices: device=*)"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "user_id: *"}]}, "(for each slice of it: slices: user_id: *)"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "user_age *"}]}, "(for each slice of it: slices: user_age *)"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "user_age 19..26"}]}, "hour (did you mean user_age 18..25?)"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "user_age 26..19"}]}, "slice user_age 26..19"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "hour=99"}]}, "slice hour=99"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "hour=noon"}]}, "slice hour=noon"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "hour=7"}]}, "slice hour=7"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "day=monday"}]}, "slice day=monday"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "position <= 4"}]}, "slice position <= 4"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "user_id: seen"}]}, "slice user_id: seen"),
        ({"default": [{"metric": "ne", "max": 1, "slice": "user_age 18"}]}, "slice user_age 18"),
        ({"default": [{"metric": "ne", "max": 1, "slices": ["device", "os=*"]}]}, "slices os=*"),
        ({"default": [{"metric": "ne", "max": 1, "slices": "all"}]}, "slices all"),
        ({"default": [{"metric": "ne", "max": 1, "slices": "device="}]}, "slices device="),
        ({"default": [{"metric": "ne", "max": 1, "slices": "user: *"}]}, "slices user: *"),
        ({"default": [{"metric": "ne", "max": 1, "slices": "user_age 19..*"}]}, "slices user_age 19..*"),
        ({"default": [{"metric": "ne", "max": 1, "slices": "hour=3*"}]}, "slices hour=3*"),
        ({"default": [{"metric": "ne", "max": 1, "slices": "device=*, os=*"}]}, "slices device=*, os=*"),
        ({"default": [{"metric": "ne", "max": 1, "slices": "device=*, country=*, os=*"}]}, "slices device=*, country=*"),
        ({"default": [{"metric": "ne", "max": 1, "slices": "country=*"}]}, "slices country=*"),
    ],
)  # fmt: skip
def test_a_gate_that_names_nothing_real_is_refused(content: dict, says: str) -> None:
    with pytest.raises(UserError) as caught:
        check_gates(Gates.model_validate(content, strict=True), KINDS, DIMENSIONS, "x/gates.yaml")
    assert str(caught.value).startswith("x/gates.yaml: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["all", "device=mobile", "device=missing", "device=mobile, country=DE", 'device="a, b", country=c', "position <= 3",
     "user_age 18..25", "user_age below 18", "user_age from 65", "user_age missing",
     "user_id: unseen", "user_id: rare", "user_id: missing", "day=2026-11-08", "hour=13"],
)  # fmt: skip
def test_slices_of_every_form_are_known(name: str) -> None:
    check_gates(Gates(default=[Gate(metric="ne", max=1, slice=name)]), CLICK, DIMENSIONS, "x")
    if name != "all":
        with pytest.raises(UserError):
            check_gates(Gates(default=[Gate(metric="ne", max=1, slice=name)]), CLICK, {"os": None}, "x")


@pytest.mark.parametrize("pattern", ["*", "device", "device=*", "device, country", "device=*, country=DE", "user_id: *",
                                     "user_age *", "user_age 18..*", "user_id (cold start)", "day=2026-11-*", "hour=0*",
                                     "dev*", "*=mobile", "*=a, *", 'device="a, b", *', "position <= *"])  # fmt: skip
def test_patterns_and_dimensions_are_known(pattern: str) -> None:
    check_gates(Gates(default=[Gate(metric="ne", max=1, slices=pattern)]), CLICK, DIMENSIONS, "x")
    with pytest.raises(UserError):
        check_gates(Gates(default=[Gate(metric="ne", max=1, slices=pattern)]), CLICK, {}, "x")


@pytest.mark.parametrize(
    ("content", "task"),
    [
        ({}, "watch"),
        ({"default": [{"metric": "ne", "max": 1}]}, "watch"),
        ({"default": [{"metric": "rows", "min": 1}], "tasks": {"watch": {"default": False}}}, "watch"),
        ({"tasks": {"watch": [{"metric": "rows", "min": 1}], "click": {"allow_ne_above_one": True}}}, "click"),
    ],
)
def test_a_task_that_no_gate_judges_is_refused(content: dict, task: str) -> None:
    with pytest.raises(UserError, match=f"^x/gates.yaml: task {task} has no gate, .*: add one, such as .metric: n"):
        check_gates(Gates.model_validate(content, strict=True), KINDS, DIMENSIONS, "x/gates.yaml")
    check_gates(Gates(), CLICK, DIMENSIONS, "x/gates.yaml")  # NE below 1


def test_the_example_of_the_page_is_read_and_fits_a_run(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.+?)```", (ROOT / "pipeline/release/GATES.md").read_text(), re.DOTALL)
    gates = load_gates(written(tmp_path, text))
    assert gates.default
    assert gates.tasks
    check_gates(gates, dict.fromkeys(gates.tasks, "binary"), DIMENSIONS | {"country": None}, "GATES.md")


def test_the_default_gates_are_of_the_headline_metrics_of_the_tasks() -> None:
    found = default_gates(KINDS, 0.01)
    check_gates(found, KINDS, {}, "x")
    assert [str(gate) for gate in found.default] == ["ne worse by at most 0.01", "nrmse worse by at most 0.01"]
    assert [gate.metric for gate in default_gates({"click": "binary"}, 0.01).default] == ["ne"]


def test_a_missing_file_and_a_link_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gates.yaml is missing\."):
        load_gates(tmp_path / "gates.yaml")
    (tmp_path / "link.yaml").symlink_to(written(tmp_path, {}))
    with pytest.raises(UserError, match="link"):
        load_gates(tmp_path / "link.yaml")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("amount", [0, 9, 0.5, "1%"])
def test_gates_are_recorded_as_they_were_given(amount: float | str) -> None:
    gates = Gates.model_validate({"default": [{"metric": "ne", "change": {"worse_by_at_most": amount}}]})
    [gate] = json.loads(gates.model_dump_json())["default"]
    assert gate["change"]["worse_by_at_most"] == amount
