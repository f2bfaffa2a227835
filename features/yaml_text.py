"""Untrusted YAML: read as yaml.safe_load reads it, in bounded time and memory, without aliases."""

from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from features.errors import UserError
from features.printable import has_surrogates, printable
from features.regular_files import read_regular

MAX_BYTES = 4 << 20
MAX_VALUES = 100_000  # keys count, too
MAX_DEPTH = 30
MAX_SCALAR = 100  # characters of a number, a time or a word such as true; text may be as long as the file

_CORE = "tag:yaml.org,2002:"
_TAGS = {f"{_CORE}{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")}


class _Refused(yaml.MarkedYAMLError):
    """What YAML allows and `parse_yaml` does not."""


class _Loader(yaml.SafeLoader):
    """Without aliases, merge keys and other kinds of objects: nothing in a file stands for more than its own characters."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.values = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _fault("anchors and aliases (& and *) are not read: write the value out", event.start_mark)
        if event.tag is not None and event.tag not in _TAGS:
            raise _fault(f"the tag {_short(event.tag)[:60]} is not read: leave it out", event.start_mark)
        self.values += 1
        if self.values > MAX_VALUES:
            raise _fault(f"more than {MAX_VALUES:,} keys and values", event.start_mark)
        if self.depth == MAX_DEPTH:
            raise _fault(f"nested more than {MAX_DEPTH} deep", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        if isinstance(node, ScalarNode) and node.tag != f"{_CORE}str" and len(node.value) > MAX_SCALAR:
            raise _fault(f"a number of more than {MAX_SCALAR} characters: quote it if it is text", node.start_mark)
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, OverflowError) as error:  # such as the 45th of a month
            raise _fault(f"{_short(node.value)}: {error}", node.start_mark) from None
        if isinstance(value, str) and has_surrogates(value):
            raise _fault("half a surrogate pair is no character: write the character itself", node.start_mark)
        return value

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if key.tag == f"{_CORE}merge":
                raise _fault("merge keys (<<) are not read: write the values out", key.start_mark)
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            before: set[Any] = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if name in before:
                    raise _fault(f"the key {_short(str(name))} stands there twice", key.start_mark)
                before.add(name)
        return found


def parse_yaml(content: bytes, where: str) -> Any:
    """The one document of a YAML text as plain data: what yaml.safe_load makes of it.

    Args:
        where: names the text in errors.
    Raises:
        UserError: not UTF-8 or not YAML; anchors, aliases, merge keys, other tags, or a key that stands
            twice; more than MAX_BYTES, MAX_VALUES or MAX_DEPTH.
    """
    if len(content) > MAX_BYTES:
        raise UserError(f"{where} has {len(content):,} bytes, more than the {MAX_BYTES:,} that a YAML file may have")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}: line {line} is not UTF-8. Save the file as UTF-8.") from None
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        kind = "" if isinstance(error, _Refused) else "not YAML: "
        raise UserError(f"{where}: {place}{kind}{_short(error.problem or error.context or '')}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise UserError(f"{where}: not YAML: {_short(str(error))}") from None


def read_yaml(path: Path) -> Any:
    """As `parse_yaml`, of a regular file. Raises FileNotFoundError, and UserError where a link, a pipe or a device is there."""
    return parse_yaml(read_regular(path.parent, path.name, MAX_BYTES), str(path))


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def yaml_of(content: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads: what yaml.safe_dump writes, keys in their order, without aliases."""
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False))


def _fault(problem: str, mark: yaml.Mark) -> _Refused:
    return _Refused(problem=problem, problem_mark=mark)


def _short(text: Any) -> str:
    return printable(" ".join(str(text).split())[:200])
