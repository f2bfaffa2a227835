"""What a section of a page holds, in the words of its template: cards, drawings, tables, notes, settings."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from pipeline.evaluation.report.numbers import NOTHING


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text or drawing, what a click on the header sorts it by, and its class in page.css."""

    shown: str | Markup
    key: float | None = None
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A table that scrolls in its own box; lines past `first` can be opened below it.

    Attributes:
        header: of the columns; the first names its line, and so do `names` of them, the others hold numbers.
    """

    header: Sequence[str]
    lines: Sequence[Sequence[Cell]]
    title: str = ""
    names: int = 1
    first: int = 1000
    more: str = "more lines"

    @property
    def kind(self) -> str:
        """Which block of the template shows it."""
        return "table"

    def is_name(self, column: int) -> bool:
        """Whether a column holds words."""
        return column < self.names or any("name" in line[column].style for line in self.lines[:1])

    @property
    def parts(self) -> list[Sequence[Sequence[Cell]]]:
        """The lines that are shown, and those that are opened."""
        return [self.lines[: self.first], self.lines[self.first :]]


@dataclass(frozen=True)
class Drawing:
    """A drawing with its title above it and a line below it."""

    title: str
    svg: Markup
    caption: str = ""


@dataclass(frozen=True)
class Drawings:
    """Drawings side by side where there is room."""

    drawings: Sequence[Drawing]
    title: str = ""

    @property
    def kind(self) -> str:
        """Which block of the template shows it."""
        return "drawings"


@dataclass(frozen=True)
class Card:
    """One task: its headline number with the interval below, a drawing, and lines of names and texts."""

    title: str
    figure: str
    unit: str
    below: str
    svg: Markup
    lines: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Cards:
    """Cards side by side where there is room."""

    cards: Sequence[Card]

    @property
    def kind(self) -> str:
        """Which block of the template shows it."""
        return "cards"


@dataclass(frozen=True)
class Banner:
    """An outcome in large type: pass, fail or undecided, and why."""

    outcome: str
    text: str

    @property
    def kind(self) -> str:
        """Which block of the template shows it."""
        return "banner"


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str

    @property
    def kind(self) -> str:
        """Which block of the template shows it."""
        return "note"


@dataclass(frozen=True)
class Setting:
    """A line of a configuration; other: its value in the baseline, where it is another one."""

    name: str
    value: str
    other: str | None = None


@dataclass(frozen=True)
class Settings:
    """Lines of a configuration: those that differ first, the others to be opened."""

    differing: Sequence[Setting]
    same: Sequence[Setting]
    ours: str
    theirs: str = ""

    @property
    def kind(self) -> str:
        """Which block of the template shows it."""
        return "settings"


@dataclass(frozen=True)
class Facts:
    """Names and texts; a link is relative."""

    facts: Sequence[tuple[str, str]]
    links: Sequence[tuple[str, str, str]] = ()

    @property
    def kind(self) -> str:
        """Which block of the template shows it."""
        return "facts"


Block = Table | Drawings | Cards | Banner | Note | Settings | Facts


@dataclass(frozen=True)
class Section:
    """A question and its answer: id of its anchor, the question, a sentence, and what shows it."""

    id: str
    title: str
    lead: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def text(shown: str, style: str = "") -> Cell:
    """A cell of words."""
    return Cell(shown, None, style)


def number(shown: str, key: float | None, style: str = "") -> Cell:
    """A cell of a number, sorted by its value."""
    return Cell(shown, key, style if shown != NOTHING else "none")
