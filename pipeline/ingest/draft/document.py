"""The YAML of a draft: keys and values with a comment on each guess, names of columns quoted."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from features.printable import printable

PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "nan", "inf"}
WIDTH, INDENT = 110, 2


@dataclass
class Document:
    """Lines of YAML as they are added."""

    lines: list[str] = field(default_factory=list)

    def remark(self, depth: int, text: str) -> None:
        """A comment of its own, over as many lines as it needs."""
        start, words = " " * INDENT * depth + "#", printable(text).split()
        line = start
        for word in words:
            if len(line) + len(word) >= WIDTH and line != start:
                self.lines.append(line)
                line = f"{start}  "
            line += f" {word}"
        self.lines.append(line)

    def suggestion(self, depth: int, key: str, value: Any) -> None:
        """An entry that is commented out, on one line."""
        self.lines.append(f"{' ' * INDENT * depth}# {scalar(key)}: {flow(value)}")

    def section(self, depth: int, key: str, why: str | None = None) -> None:
        """A key whose content follows, deeper."""
        self._line(depth, f"{scalar(key)}:", why)

    def entry(self, depth: int, key: str, value: Any, why: str | None = None) -> None:
        """A key with its value on one line, or where that is too long the keys of the value on lines of their own."""
        text = flow(value)
        if len(text) > WIDTH and isinstance(value, Mapping):
            self.section(depth, key, why)
            for below, content in value.items():
                self.entry(depth + 1, below, content)
        elif len(text) > WIDTH and isinstance(value, list):
            self._line(depth, f"{scalar(key)}: [", why)
            line = inside = " " * INDENT * (depth + 1)
            for item in map(flow, value):
                if len(line) + len(item) > WIDTH and line != inside:
                    self.lines.append(line.rstrip())
                    line = inside
                line += f"{item}, "
            self.lines += [line.rstrip(), f"{' ' * INDENT * depth}]"]
        else:
            self._line(depth, f"{scalar(key)}: {text}", why)

    def _line(self, depth: int, text: str, why: str | None) -> None:
        line = " " * INDENT * depth + text
        comment = printable(" ".join(why.split())) if why else ""
        if comment and len(line) + len(comment) > WIDTH:
            self.remark(depth, comment)
            comment = ""
        self.lines.append(f"{line}  # {comment}" if comment else line)

    def text(self) -> str:
        """The file's content."""
        return "\n".join([*self.lines, ""])


def scalar(text: str) -> str:
    """A text as YAML: plain where it can be nothing else, else in double quotes."""
    if PLAIN.fullmatch(text) and text.lower() not in WORDS:
        return text
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\x7f")


def flow(value: Any) -> str:
    """Plain data on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(key)}: {flow(content)}" for key, content in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str):
        return scalar(value)
    return re.sub(r"^(-?\d+)e", r"\1.0e", json.dumps(value))  # YAML's numbers with an exponent have a point
