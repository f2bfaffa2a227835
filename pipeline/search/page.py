"""search.html: what an architecture search found, how it came about and what it cost, as one self-contained page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.evaluation.report import page
from pipeline.evaluation.report.blocks import Block, Cell, Drawing, Drawings, Facts, Note, Section, Table, number, text
from pipeline.evaluation.report.numbers import NOTHING, count, significant
from pipeline.search import history, network
from pipeline.search.choices import CLEAR, Choice, choices
from pipeline.search.record import SearchRecord
from pipeline.storage.files import make_folder, write_text

NAMED = 12  # undecided choices in a sentence; the table has them all
OF_TASKS = "The experts of a task: the weakest that it uses, and next the strongest that it does not use."
DEFINITIONS = (
    "AutoMTL: the architecture of a multi-task model is learnt by gradient descent. Strength: softmax of alpha over the "
    "candidates of a block. Selection weight: softmax of beta over the experts, of each task. Entropy: mean over the choices, "
    "divided by that of an even choice."
)


def write(
    file: Path,
    title: str,
    records: Sequence[SearchRecord],
    interaction: Sequence[str],
    blocks: Sequence[str],
    tasks: Sequence[str],
    facts: Sequence[tuple[str, str]],
) -> None:
    """Writes the page of a search, whose last record has the architecture that was found.

    Args:
        interaction, blocks, tasks: names of candidates and tasks, in the order of the records' lists.
        facts: names and texts of what the search and its network cost.
    """
    costs: list[Block] = [Facts(facts)] if facts else []
    cost = Section("cost", "What did it cost?", "" if facts else "Nothing was measured.", costs)
    if records:
        last = records[-1]
        about, sections = f"Step {count(last.step)}, after {count(last.rows)} training rows.", [
            _found(last, interaction, blocks, tasks),
            history.section(records, interaction, blocks, tasks),
            cost,
        ]  # fmt: skip
    else:
        about, sections = (
            "",
            [Section("found", "What was found?", "The search has not evaluated its architecture yet."), cost],
        )
    make_folder(file.parent)
    write_text(file, page.sections_page("Architecture search", title, about, sections, DEFINITIONS))


def _found(record: SearchRecord, interaction: Sequence[str], blocks: Sequence[str], tasks: Sequence[str]) -> Section:
    """The network, its experts, and how sure each choice is."""
    found, made = record.architecture, choices(record, interaction, blocks, tasks)
    weights = {
        task: {number: row[number - 1] for number in found.tasks[task]}
        for task, row in zip(tasks, record.tasks, strict=True)
    }
    places = [choice.place for choice in made if choice.place and choice.undecided]
    drawn = Drawing("Found network", network.drawing(found, weights, places), _caption(record, bool(places)))
    even = f"An even choice would have strength {significant(1 / len(blocks), 3)} among {len(blocks)} candidates of a block"
    of_experts = len(record.experts)
    shown: list[Block] = [
        Drawings([drawn]),
        Table(
            ["expert", *(f"block {level}" for level in range(1, len(found.experts[0]) + 1)), "tasks that use it"],
            _experts(record, blocks, weights, set(places)), "Experts", first=30, more="more experts",
        ),
        Note(f"{even}, and weight {significant(1 / of_experts, 3)} among {of_experts} {_plural('expert', of_experts)}."),
        Table(
            ["choice", "chosen", "strength", "next", "its strength", "lead", ""],
            [_line(choice) for choice in sorted(made, key=_surety)], "How sure is each choice? The least sure first",
            first=12, more="surer choices",
        ),
    ]  # fmt: skip
    shown += [Note(words) for words in (*_doubts(made), OF_TASKS)]
    used, operations = found.used, sum(name != network.SKIP for n in found.used for name in found.experts[n - 1])
    lead = (
        f"Interaction {found.interaction}, then {count(operations)} {_plural('block', operations)} in {count(len(used))} of "
        f"{count(of_experts)} {_plural('expert', of_experts)} for {count(len(tasks))} {_plural('task', len(tasks))}. "
        f"{_sureness(made)}"
    )
    return Section("found", "What was found?", lead, shown)


def _caption(record: SearchRecord, undecided: bool) -> str:
    found = record.architecture
    unused = [str(number) for number in range(1, len(found.experts) + 1) if number not in found.used]
    parts = [
        "A line from an expert to a task is as wide as its selection weight is large. A ring is a block that is skipped."
    ]
    parts += ["A dashed edge marks an undecided block."] if undecided else []
    parts += [f"No task uses {_plural('expert', len(unused))} {', '.join(unused)}."] if unused else []
    return " ".join(parts)


def _experts(
    record: SearchRecord,
    blocks: Sequence[str],
    weights: Mapping[str, Mapping[int, float]],
    undecided: set[tuple[int, int]],
) -> list[list[Cell]]:
    lines = []
    for n, names in enumerate(record.architecture.experts, 1):
        of = sorted(((row[n], task) for task, row in weights.items() if n in row), key=lambda item: -item[0])
        quiet = "" if of else " quiet"
        cells = [Cell(str(n), float(n), quiet.strip())]
        for level, name in enumerate(names, 1):
            strength = record.experts[n - 1][level - 1][blocks.index(name)]
            style = " undecided" if (n, level) in undecided else quiet
            cells.append(text(f"{name} {significant(strength, 3)}", f"name{style}"))
        tasks = ", ".join(f"{task} {significant(weight, 3)}" for weight, task in of)
        lines.append([*cells, text(tasks or "none", f"name{quiet}")])
    return lines


def _line(choice: Choice) -> list[Cell]:
    ratio = choice.ratio
    state = "undecided" if choice.undecided else "not the strongest" if choice.passed_over else ""
    return [
        text(choice.of), text(choice.chosen, "name"), number(significant(choice.strength, 3), choice.strength),
        text(NOTHING if choice.other is None else choice.other, "name"),
        number(NOTHING if choice.other is None else significant(choice.other_strength, 3), choice.other_strength),
        number(NOTHING if ratio is None else f"×{significant(ratio, 3)}", ratio),
        text(state, "name undecided" if choice.undecided else "name quiet"),
    ]  # fmt: skip


def _surety(choice: Choice) -> float:
    return float("inf") if choice.ratio is None else choice.ratio


def _sureness(made: Sequence[Choice]) -> str:
    doubtful = sum(choice.undecided for choice in made)
    if not doubtful:
        return "Every choice leads the next by 5% or more." if not any(c.passed_over for c in made) else ""
    return f"{count(doubtful)} of {count(len(made))} choices {'is' if doubtful == 1 else 'are'} undecided."


def _doubts(made: Sequence[Choice]) -> list[str]:
    """Sentences that name the choices that another seed might make otherwise, and those that a budget made."""
    found = []
    if undecided := [f"{c.of} ({c.chosen} or {c.other})" for c in made if c.undecided]:
        percent = round(100 * (CLEAR - 1))
        found.append(f"Undecided, as the chosen one leads the next by less than {percent}%: {_listed(undecided)}.")
    if passed := [f"{c.of} ({c.chosen}, not {c.other})" for c in made if c.passed_over]:
        found.append(f"Not the strongest, as a budget chose what is cheaper: {_listed(passed)}.")
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {count(len(names) - NAMED)} more" if len(names) > NAMED else ""
    return "; ".join(names[:NAMED]) + more


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"
