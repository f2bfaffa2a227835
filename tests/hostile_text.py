"""Text that would control a terminal or a page, text that only looks odd, and what may be left of either where it is shown."""

from html.parser import HTMLParser

from features.printable import has_controls

CONTROLS = [
    "\x1b]0;owned\x07",
    "\x9b31m",
    "a\u202eb",
    "a\rb",
    "a\nb",
    "a\0b",
    "a\x7f",
    "\ufeffid",
    "\ud800",
]
HOSTILE = [*CONTROLS, "<script>x()</script>", "$x_{$", "a|b"]
ORDINARY = ["é", "漢字", "🙂", "عربى", "two words", "C:\\x1b"]


def assert_tame(text: str, keep: str = "\n\t") -> None:
    assert not has_controls(text.translate({ord(character): None for character in keep})), repr(text)


class Page(HTMLParser):
    """The tags of a page, their attributes, and the texts between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())
