"""How sure an architecture's choices are: the strength of each against the strongest alternative."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.search.record import SearchRecord

CLEAR = 1.05  # times the alternative's strength; a choice that leads by less is undecided


@dataclass(frozen=True)
class Choice:
    """A choice and what it was made against.

    Attributes:
        of: what was chosen: the interaction, a block, or the experts of a task.
        chosen, strength: the candidate; of a task the weakest of its experts.
        other, other_strength: the strongest of the others; None where there is none.
        place: numbers of the expert and of the block; None for the others.
    """

    of: str
    chosen: str
    strength: float
    other: str | None
    other_strength: float
    place: tuple[int, int] | None = None

    @property
    def ratio(self) -> float | None:
        """Of both strengths; None without another that has any."""
        return self.strength / self.other_strength if self.other is not None and self.other_strength > 0 else None

    @property
    def passed_over(self) -> bool:
        """Whether another one is stronger: a budget had no room for it."""
        return self.ratio is not None and self.ratio < 1

    @property
    def undecided(self) -> bool:
        """Whether it leads by too little."""
        return self.ratio is not None and 1 <= self.ratio < CLEAR


def choices(
    record: SearchRecord, interaction: Sequence[str], blocks: Sequence[str], tasks: Sequence[str]
) -> list[Choice]:
    """Those of a record's architecture: of the interaction, of each block of its used experts, of each task's experts."""
    found = record.architecture
    made = [_choice("interaction", found.interaction, interaction, record.interaction)]
    for number in found.used:
        for level, name in enumerate(found.experts[number - 1], 1):
            strengths, words = record.experts[number - 1][level - 1], f"expert {number}, block {level}"
            made.append(_choice(words, name, blocks, strengths, (number, level)))
    for task, weights in zip(tasks, record.tasks, strict=True):
        kept = found.tasks[task]
        last = min(kept, key=lambda number: weights[number - 1])
        left = [number for number in range(1, len(weights) + 1) if number not in kept]
        other = max(left, key=lambda number: weights[number - 1], default=None)
        against = (f"expert {other}", weights[other - 1]) if other is not None else (None, 0.0)
        made.append(Choice(f"experts of {task}", f"expert {last}", weights[last - 1], *against))
    return made


def _choice(
    of: str, chosen: str, names: Sequence[str], strengths: Sequence[float], place: tuple[int, int] | None = None
) -> Choice:
    by_name = dict(zip(names, strengths, strict=True))
    strength = by_name.pop(chosen)
    other = max(by_name, key=lambda name: by_name[name], default=None)
    return Choice(of, chosen, strength, other, by_name.get(other or "", 0.0), place)
