"""The page of an architecture search as a browser reads it: the drawing is the found network, the numbers are the records'."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hostile_text import HOSTILE, ORDINARY
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from pages_by_hand import Parsed, checked

from features.printable import has_surrogates, printable
from models.automtl.architecture import Strengths, derive
from pipeline.evaluation.report.numbers import significant
from pipeline.search import choices, history, page
from pipeline.search.config import Space
from pipeline.search.record import SearchRecord

FACTS = [("parameters", "412,880"), ("FLOPs a row", "801,312")]
FOUR = ["click", "cart", "favourite", "purchase"]


class Search(NamedTuple):
    records: list[SearchRecord]
    space: Space
    tasks: Sequence[str]

    def page(self, folder: Path, title: str = "a search", facts: Sequence[tuple[str, str]] = FACTS) -> Parsed:
        file = folder / "below" / "search.html"
        page.write(file, title, self.records, self.space.interaction, self.space.blocks, self.tasks, facts)
        return checked(file.read_text(encoding="utf-8"))


def search(experts: int, depth: int, tasks: Sequence[str], chosen: int, looks: int = 3, **further: Any) -> Search:
    """A search whose strengths sharpen from look to look; further: fields of its records."""
    rng = np.random.default_rng(experts + depth)
    space = Space(experts=experts, depth=depth, chosen=chosen, **further.pop("space", {}))
    sizes = [(len(space.interaction),), (experts, depth, len(space.blocks)), (len(tasks), experts)]
    logits = [rng.normal(size=size) for size in sizes]
    records = []
    for look in range(looks):
        noisy = [3 * (look + 1) / looks * (z + 0.3 * rng.normal(size=z.shape)) for z in logits]
        softmax = [torch.tensor(z).softmax(-1) for z in noisy]
        fields = {
            "step": 100 * (look + 1), "rows": 6400 * (look + 1), "valid_loss": 0.5 - 0.01 * look, "unchanged": 0,
            "alpha_entropy": 1 / (look + 1), "beta_entropy": 0.9, "interaction": softmax[0].tolist(),
            "experts": softmax[1].tolist(), "tasks": softmax[2].tolist(),
            "architecture": derive(Strengths(*softmax), space.named(list(tasks))),
        }  # fmt: skip
        records.append(SearchRecord.model_validate(fields | further))
    return Search(records, space, tasks)


class Mark(NamedTuple):
    """An element of the drawing with the words that stand in its title."""

    tag: str
    at: dict[str, str | None]
    words: str


class Drawn:
    """The found network of a page: its size, and its marks by the words in their titles."""

    def __init__(self, parsed: Parsed) -> None:
        self.parsed = parsed
        index = next(i for i, (_, at) in enumerate(parsed.elements) if at.get("class") == "network")
        self.width, self.height = map(float, (parsed.elements[index][1]["viewbox"] or "").split()[2:])
        end = next(
            (i for i, (tag, _) in enumerate(parsed.elements) if tag == "svg" and i > index), len(parsed.elements)
        )
        inside = parsed.elements[index + 1 : end]
        before = sum(tag == "title" for tag, _ in parsed.elements[:index])
        words = [text for tag, text in parsed.texts if tag == "title"][before:]
        self.marks, self.plain = [], []
        for mark, following in zip(inside, [*inside[1:], ("", {})], strict=True):
            if following[0] == "title":
                self.marks.append(Mark(*mark, words.pop(0)))
            elif mark[0] != "title":
                self.plain.append(mark)

    def box(self, mark: Mark) -> tuple[float, float, float, float]:
        x, y, width, height = (float(mark.at[key] or 0) for key in ("x", "y", "width", "height"))
        return x, y, x + width, y + height

    def boxes(self, pattern: str) -> dict[str, Mark]:
        found = [mark for mark in self.marks if mark.tag == "rect" and re.match(pattern, mark.words)]
        assert len({mark.words for mark in found}) == len(found)
        return {mark.words: mark for mark in found}

    def frames(self) -> list[tuple[float, float, float, float]]:
        """Of experts from the left; the last one is that of the features."""
        found = [Mark(tag, at, "") for tag, at in self.plain if tag == "rect" and at["class"] == "frame"]
        return [self.box(mark) for mark in found][:-1]


def assert_drawn(found: Search, parsed: Parsed) -> None:
    """Each line of the architecture is drawn once, from its expert to its task, and each block in its expert, in order."""
    record, drawn = found.records[-1], Drawn(parsed)
    architecture = record.architecture
    frames = dict(zip(architecture.used, drawn.frames(), strict=True))
    lines = [mark for mark in drawn.marks if mark.tag == "path"]
    wanted = {
        f"expert {n} → {printable(task)}: {significant(record.tasks[t][n - 1], 3)}": (n, task, record.tasks[t][n - 1])
        for t, (task, numbers) in enumerate(architecture.tasks.items()) for n in numbers
    }  # fmt: skip
    assert sorted(mark.words for mark in lines) == sorted(wanted)
    pills = {words: mark for words, mark in drawn.boxes("").items() if mark.at.get("rx") == "13"}
    assert [*pills] == [printable(task) for task in architecture.tasks]
    widths = {}
    for mark in lines:
        number, task, weight = wanted[mark.words]
        points = re.findall(r"([\d.]+),([\d.]+)", mark.at["d"] or "")
        (x1, y1), *_, (x2, y2) = [(float(x), float(y)) for x, y in points]
        left, top, right, _ = frames[number]
        assert left < x1 < right
        assert y1 == pytest.approx(top, abs=0.1)
        left, _, right, bottom = drawn.box(pills[printable(task)])
        assert left < x2 < right
        assert y2 == pytest.approx(bottom, abs=0.1)
        assert mark.at["stroke"] == pills[printable(task)].at["fill"]
        widths[weight] = float(mark.at["stroke-width"] or 0)
    assert widths == {weight: pytest.approx(0.8 + 4.2 * weight / max(widths), abs=0.01) for weight in widths}
    for number in architecture.used:
        left, top, right, bottom = frames[number]
        above = bottom
        for level, name in enumerate(architecture.experts[number - 1], 1):
            [mark] = [
                m
                for m in drawn.marks
                if re.fullmatch(rf"expert {number}, block {level}: {name}(, undecided)?", m.words)
            ]
            assert mark.tag == ("circle" if name == "skip" else "rect")
            if name == "skip":
                x, y = (float(mark.at[key] or 0) for key in ("cx", "cy"))
                assert (x, top < y < above) == (pytest.approx((left + right) / 2, abs=0.1), True)
                above = y
            else:
                x1, y1, x2, y2 = drawn.box(mark)
                assert left <= x1 < x2 <= right
                assert top < y1 < y2 < above
                above = y1
    assert sum(", block " in mark.words for mark in drawn.marks) == len(architecture.used) * len(
        architecture.experts[0]
    )
    assert_apart(drawn, [*frames.values(), *(drawn.box(mark) for mark in pills.values())])


def assert_apart(drawn: Drawn, boxes: Sequence[tuple[float, float, float, float]]) -> None:
    """No two boxes overlap, and all lie inside the drawing, texts too."""
    boxes = [*boxes, *(drawn.box(mark) for mark in drawn.boxes("interaction: ").values())]
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        assert 0 <= x1 < x2 <= drawn.width
        assert 0 <= y1 < y2 <= drawn.height
        for a1, b1, a2, b2 in boxes[:index]:
            assert x2 <= a1 or a2 <= x1 or y2 <= b1 or b2 <= y1
    for tag, at in drawn.plain:
        if tag == "text":
            assert 0 < float(at["x"] or 0) < drawn.width
            assert 0 < float(at["y"] or 0) < drawn.height


LONG = [f"the probability that a session ends with {n} orders" for n in range(20)]
WIDE = ["漢字" * 20, "MW" * 30, "a", "🙂"]


@pytest.mark.parametrize(("experts", "depth", "tasks", "chosen"), [
    (8, 3, FOUR, 4), (1, 1, ["click"], 1), (30, 3, LONG, 6), (30, 1, ["click"], 2), (2, 8, LONG, 1), (5, 2, WIDE, 3),
])  # fmt: skip
def test_the_drawing_has_each_block_of_each_used_expert_and_a_line_to_each_task_that_uses_it(
    tmp_path: Path, experts: int, depth: int, tasks: list[str], chosen: int
):
    found = search(experts, depth, tasks, chosen)
    parsed = found.page(tmp_path)
    assert_drawn(found, parsed)
    shown = parsed.shown()
    unused = [str(n) for n in range(1, experts + 1) if n not in found.records[-1].architecture.used]
    assert (f"No task uses expert{'s' * (len(unused) > 1)} {', '.join(unused)}." in shown) == bool(unused)


@pytest.mark.parametrize(
    "tasks", [FOUR, LONG, [WIDE[0]], [WIDE[1]], ["a" * 30], ["%@W_WM" * 3], ["Purchases_PER_user"]]
)
def test_a_name_fits_into_its_box(tmp_path: Path, tasks: list[str]):
    bold = FontProperties(family="DejaVu Sans", weight="bold", size=11)  # of common fonts the widest
    drawn = Drawn(search(2, 1, tasks, 1).page(tmp_path))
    names = [mark for mark in drawn.parsed.texts if mark[0] == "text"][: len(tasks)]
    pills = [mark for mark in drawn.marks if mark.at.get("rx") == "13"]
    for (_, name), pill in zip(names, pills, strict=True):
        han = sum(letter > "\u2e80" for letter in name)
        latin = "".join(letter for letter in name if letter <= "\u2e80")
        assert 11 * han + TextPath((0, 0), latin, prop=bold).get_extents().width < float(pill.at["width"] or 0) - 8


def test_tasks_have_colours_of_their_own(tmp_path: Path):
    drawn = Drawn(search(3, 1, LONG, 1).page(tmp_path))
    looks = [(mark.at["fill"], mark.at.get("stroke-dasharray")) for mark in drawn.marks if mark.at.get("rx") == "13"]
    assert len(set(looks)) == len(LONG)


def tips(parsed: Parsed, pattern: str) -> list[str]:
    return [text for tag, text in parsed.texts if tag == "title" and re.search(pattern, text)]


@pytest.mark.parametrize("looks", [1, 2, 24, 100])
def test_heat_maps_hold_the_numbers_of_the_records(tmp_path: Path, looks: int):
    found = search(5, 2, FOUR, 2, looks)
    parsed = found.page(tmp_path)
    last, seen = found.records[-1], history.thinned(found.records, 24)
    assert (len(seen), seen[0], seen[-1]) == (min(looks, 24), found.records[0], last)
    assert len({record.step for record in seen}) == len(seen)
    experts = [*enumerate(last.experts, 1)]
    assert tips(parsed, r"^expert \d, (?!block)") == [
        f"expert {n}, {name}: {significant(expert[level][o], 3)}"
        for level in range(2) for o, name in enumerate(found.space.blocks) for n, expert in experts
    ]  # fmt: skip
    assert tips(parsed, r"^\w+ ← expert") == [
        f"{task} ← expert {n}: {significant(value, 3)}"
        for task, row in zip(FOUR, last.tasks, strict=True) for n, value in enumerate(row, 1)
    ]  # fmt: skip
    of_blocks = [
        (f"{name} at step {r.step:,}", significant(sum(block[o] for expert in r.experts for block in expert) / 10, 3))
        for o, name in enumerate(found.space.blocks) for r in seen
    ]  # fmt: skip
    of_interaction = [
        (f"{name} at step {r.step:,}", significant(r.interaction[i], 3))
        for i, name in enumerate(found.space.interaction) for r in seen
    ]  # fmt: skip
    of_tasks = [
        (f"expert {n} at step {r.step:,}", significant(r.tasks[t][n - 1], 3))
        for t in range(4) for n in range(1, 6) for r in seen
    ]  # fmt: skip
    over_time = [f"{words}: {value}" for words, value in (*of_interaction, *of_blocks, *of_tasks)]
    assert tips(parsed, r"^[a-z]\w+( \d)? at step [\d,]+: ") == over_time


def test_the_table_of_experts_says_strengths_and_tasks(tmp_path: Path):
    found = search(6, 2, FOUR, 2)
    cells = [text for tag, text in found.page(tmp_path).texts if tag == "td"]
    last = found.records[-1]
    for n, names in enumerate(last.architecture.experts):
        at = cells.index(str(n + 1))
        strengths = [
            f"{name} {significant(last.experts[n][level][found.space.blocks.index(name)], 3)}"
            for level, name in enumerate(names)
        ]
        assert cells[at + 1 : at + 3] == strengths
        weights = {t: row[n] for t, row in zip(FOUR, last.tasks, strict=True) if n + 1 in last.architecture.tasks[t]}
        ordered = sorted(weights.items(), key=lambda item: -item[1])
        assert cells[at + 3] == (", ".join(f"{task} {significant(weight, 3)}" for task, weight in ordered) or "none")


def with_strengths(found: Search, block: Sequence[float]) -> Search:
    """The search with other strengths of one expert's first block, its architecture left as it is."""
    last = found.records[-1]
    number = last.architecture.used[0]
    experts = [[list(strengths) for strengths in expert] for expert in last.experts]
    experts[number - 1][0] = list(block)
    return found._replace(records=[*found.records[:-1], last.model_copy(update={"experts": experts})])


@pytest.mark.parametrize(
    ("lead", "outcome"), [(1.0, "undecided"), (1.04, "undecided"), (1.06, ""), (0.5, "not the strongest")]
)
def test_a_choice_that_leads_by_less_than_5_percent_is_undecided(tmp_path: Path, lead: float, outcome: str):
    found = search(4, 1, ["click"], 1, space={"blocks": ["mlp_16", "mlp_32", "skip"]})
    name = found.records[-1].architecture.experts[found.records[-1].architecture.used[0] - 1][0]
    other = 0.3 / lead
    strengths = [0.3 if candidate == name else other for candidate in found.space.blocks]
    strengths[-1 if name != "skip" else 0] = 0.01
    found = with_strengths(found, strengths)
    [runner_up] = [c for c, s in zip(found.space.blocks, strengths, strict=True) if c != name and s > 0.02]
    number = found.records[-1].architecture.used[0]
    parsed = found.page(tmp_path)
    shown = parsed.shown()
    words = f"expert {number}, block 1 ({name} or {runner_up})"
    assert (words in shown) == (outcome == "undecided")
    assert (f"expert {number}, block 1 ({name}, not {runner_up})" in shown) == (outcome == "not the strongest")
    [mark] = [mark for mark in Drawn(parsed).marks if f"expert {number}, block 1: " in mark.words]
    assert mark.words.endswith("undecided") == (outcome == "undecided")
    assert ("even" in (mark.at["class"] or "").split()) == (outcome == "undecided")
    cells = [text for tag, text in parsed.texts if tag == "td"]
    at = cells.index(f"expert {number}, block 1")
    assert cells[at + 1 : at + 6] == [name, "0.300", runner_up, significant(other, 3), f"×{significant(lead, 3)}"]


def test_the_experts_of_a_task_are_as_sure_as_the_weakest_of_them():
    found = search(3, 1, ["a"], 2)
    last = found.records[-1]
    record = last.model_copy(
        update={
            "tasks": [[0.34, 0.33, 0.33]],
            "architecture": last.architecture.model_copy(update={"tasks": {"a": [1, 3]}}),
        }
    )
    *_, of_a = choices.choices(record, found.space.interaction, found.space.blocks, ["a"])
    assert (of_a.chosen, of_a.other, of_a.ratio, of_a.undecided) == ("expert 3", "expert 2", 1.0, True)
    everything = record.model_copy(
        update={"architecture": last.architecture.model_copy(update={"tasks": {"a": [1, 2, 3]}})}
    )
    *_, of_a = choices.choices(everything, found.space.interaction, found.space.blocks, ["a"])
    assert (of_a.chosen, of_a.other, of_a.ratio, of_a.undecided) == ("expert 2", None, None, False)


def test_whatever_the_names_are_they_are_text(tmp_path: Path):
    wild = [name for name in HOSTILE if not has_surrogates(name)]
    names = [*wild, *ORDINARY, "{{ 7 * 7 }}", '"><svg onload=x()>', "</style><script>x()</script>", "</title><b>"]
    found = search(3, 2, names, 2)
    parsed = found.page(tmp_path, names[-1], [(name, name) for name in names])
    assert sum(tag == "script" for tag, _ in parsed.elements) == 1
    shown = parsed.shown()
    assert all(printable(name) in shown for name in names)


def test_a_loss_is_drawn_where_it_was_measured(tmp_path: Path):
    found = search(3, 2, FOUR, 2, looks=4)
    first, *rest = found.records
    partly = found._replace(records=[first.model_copy(update={"valid_loss": None}), *rest])
    points = tips(partly.page(tmp_path), r"^0\.4\d+ at step ")
    assert points == ["0.4900 at step 200", "0.4800 at step 300", "0.4700 at step 400"]
    nothing = search(3, 2, FOUR, 2, looks=1, valid_loss=None).page(tmp_path).shown()
    assert "No validation loss was measured." in nothing
    assert "Validation loss" not in nothing
    assert "One evaluation of the architecture, at step 100 after 6,400 rows." in nothing


def test_entropies_are_those_of_the_records(tmp_path: Path):
    parsed = search(3, 2, FOUR, 2, looks=2).page(tmp_path)
    assert tips(parsed, r"^blocks: ") == ["blocks: 1.000 at step 100", "blocks: 0.5000 at step 200"]
    assert tips(parsed, r"^selection: ") == ["selection: 0.9000 at step 100", "selection: 0.9000 at step 200"]


@pytest.mark.parametrize(("order", "words"), [
    ("bbb", "It has been the same since the first, at step 100."),
    ("abb", "It last changed at step 200; the one after it found the same."),
    ("abbb", "It last changed at step 200; the 2 evaluations after it found the same."),
    ("bab", "It last changed at step 300, the last evaluation: it might have changed further."),
    ("bbabb", "It last changed at step 400; the one after it found the same."),
])  # fmt: skip
def test_the_page_says_when_the_architecture_last_changed(tmp_path: Path, order: str, words: str):
    found = search(3, 2, FOUR, 2, looks=len(order))
    architecture = {"b": found.records[-1].architecture}
    other = "gating" if architecture["b"].experts[0][0] == "skip" else "skip"
    changed = [[other, *architecture["b"].experts[0][1:]], *architecture["b"].experts[1:]]
    architecture["a"] = architecture["b"].model_copy(update={"experts": changed})
    records = [
        r.model_copy(update={"architecture": architecture[o]}) for r, o in zip(found.records, order, strict=True)
    ]
    assert words in found._replace(records=records).page(tmp_path).shown()


def test_a_page_has_its_facts_and_its_sections_in_order(tmp_path: Path):
    found = search(3, 2, FOUR, 2)
    parsed = found.page(tmp_path)
    assert [text for tag, text in parsed.texts if tag == "h2"] == [
        "What was found?", "How did it come about?", "What did it cost?"
    ]  # fmt: skip
    values = [text for tag, text in parsed.texts if tag in ("dt", "dd")]
    assert values == [text for fact in FACTS for text in fact]
    assert "Nothing was measured." in found.page(tmp_path, facts=()).shown()


def test_a_search_without_a_look_has_a_page(tmp_path: Path):
    nothing = Search([], Space(), FOUR).page(tmp_path)
    assert "The search has not evaluated its architecture yet." in nothing.shown()
    assert "412,880" in nothing.shown()


def test_candidates_without_an_alternative_have_no_lead(tmp_path: Path):
    found = search(2, 1, ["click"], 2, space={"blocks": ["skip"], "interaction": ["skip"]}, alpha_entropy=0.0)
    parsed = found.page(tmp_path)
    assert "Every choice leads the next by 5% or more." in parsed.shown()
    assert_drawn(found, parsed)
