"""KEY=VALUE words whose value Hydra's grammar cannot read as it stands, such as `out=/x/year=2026/d`, in quotes."""

import re
import shlex
from collections.abc import Sequence
from itertools import takewhile

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from features.errors import UserError
from features.printable import printable
from jobs.command_line import GROUPS
from pipeline.overrides import setting

# A list, a dict or a text in quotes: a fault in one is its writer's to mend. ${…} refers to another setting.
WRITTEN_FOR_HYDRA = re.compile(r"\s*[\[{'\"]|.*\$\{", re.S)
SIGNS = re.compile(r"([\[\]{},:])")  # of a list or dict, between its elements

PARSER = OverridesParser.create()


def quoted(words: Sequence[str]) -> list[str]:
    """A job's words, plain text in quotes where Hydra would refuse it or read it as something else.

    What Hydra reads stays as it is, with its types: numbers, booleans, null, lists, dicts and texts in quotes.

    Args:
        words: as `command_line.check` lets them pass, which bounds how deeply they are nested.

    Raises:
        UserError: a word that is no setting, with the form in which to type it.
    """
    _check_pieces(words)
    sweeps = bool({"--multirun", "-m"} & {*words})
    found, after_dir = list[str](), False
    for word in words:
        is_setting = "=" in word and not word.startswith(("-", "~")) and not after_dir
        found.append(_quoted(word, sweeps) if is_setting else word)
        after_dir = word in ("--config-dir", "-cd")
    return found


def refused(word: str, why: str) -> UserError:
    """The error for a word that Hydra's grammar cannot read.

    Args:
        why: what Hydra says.

    Returns:
        One with the form to type, where there is one.
    """
    key, equals, value = word.partition("=")
    shown = printable(word[:200])
    if not equals or key.strip() in ("", "+", "++", "~"):
        return UserError(f"{shown}: not KEY=VALUE. See --help.")
    if _is_key(key):
        return UserError(f"{shown}: {why}. {_forms(key, value)}.")
    bare = re.sub(r"^([+~]*)\s+", r"\1", key.strip())
    if bare != key and _is_key(bare):
        return UserError(f"{shown}: a key has no spaces around it. {_forms(bare, value.strip())}.")
    return UserError(
        f"{shown}: a key on a command line has ASCII letters, digits, _, -, $ and dots alone, no spaces. Correct it, or where "
        "it is a name of your own, write it into a YAML file (--config-dir=DIR)."
    )


def _forms(key: str, value: str) -> str:
    """What to type for a value: a text, and where it begins as a list or dict this one, its texts in quotes."""
    word = f"{key}={value}"
    if _reads(word) and (key.startswith("~") or quoted([word]) == [word]):
        return f"Type {_for_shell(word)}"
    text = typed(key, value)
    repaired = f"{key}={''.join(map(_element, SIGNS.split(value)))}"
    if WRITTEN_FOR_HYDRA.match(value) and repaired != word and _reads(repaired):
        return f"Type {_for_shell(repaired)}, or if all of it is one text {text}"
    return f"If it is a text, type {text}" if WRITTEN_FOR_HYDRA.match(value) else f"Type {text}"


def _element(text: str) -> str:
    """An element of a list or dict, in quotes where Hydra's grammar would refuse it for a =."""
    if "=" not in text or re.search(r"['\"\\]", text):
        return text
    return text[: len(text) - len(text.lstrip())] + f'"{text.strip()}"'


def _is_key(key: str) -> bool:
    """Whether a key, with + or ~ before it, is one that Hydra's grammar can read."""
    return key not in ("", "+", "++", "~") and _reads(f"{key}=0")


def _reads(word: str) -> bool:
    """Whether Hydra's grammar can read a word."""
    try:
        PARSER.parse_override(word)
    except HydraException:
        return False
    return True


def _check_pieces(words: Sequence[str]) -> None:
    """Raises UserError for a setting with spaces that a shell has split, such as `label=click`, `=`, `1`."""
    for first, word in enumerate(words[:-1]):
        rest = [*takewhile(_is_piece, words[first + 1 :])]
        if word.startswith(("-", "~", "=")) or not rest or not ("=" in word or rest[0].startswith("=")):
            continue
        if "=" in word and len(rest) > 1 and _is_key(rest[0]) and rest[1].startswith("="):
            continue  # such as `data=mine out = x`: it is the next setting that is split
        whole = " ".join([word, *rest])
        key, value = (part.strip() for part in whole.split("=", 1))
        if _is_key(key):
            raise UserError(f"{printable(whole[:200])}: is split at its spaces. {_forms(key, value)}.")


def _is_piece(word: str) -> bool:
    """Whether a word is neither a flag nor a setting."""
    return word != "" and not word.startswith(("-", "~")) and "=" not in word[1:]


def _quoted(word: str, sweeps: bool) -> str:
    key, _, value = word.partition("=")
    name = key.lstrip("+")
    if name in GROUPS or name == "hydra" or name.startswith(("hydra.", "hydra/")):
        return word
    if not _is_key(key):
        raise refused(word, "")
    try:
        read: Override = PARSER.parse_override(word)
    except HydraException:
        return word if WRITTEN_FOR_HYDRA.match(value) else setting(key, value, always=True)
    if read.is_sweep_override() and not sweeps:
        listed = f"{key}=[{value}]"
        as_list = f", or {_for_shell(listed)} for a list" if _reads(listed) else ""
        raise UserError(
            f"{printable(word[:200])}: with commas it stands for several values. Type {typed(key, value)} for one text"
            f"{as_list}."
        )
    # Spaces around a text are dropped, unless it is in quotes. A backslash is an escape.
    is_text = isinstance(read.value(), str) and not WRITTEN_FOR_HYDRA.match(value) and "\\" not in value
    return setting(key, value, always=True) if is_text and read.value() != value else word


def typed(key: str, value: str) -> str:
    """A setting with a text, quoted for Hydra and then for a shell: what is typed."""
    if "'" not in value and not re.search(r'["\\]', value):
        return f"'{key}=\"{value}\"'"
    return _for_shell(setting(key, value, always=True))


def _for_shell(word: str) -> str:
    """A word as a shell takes it, always in quotes: a full stop that follows is seen not to be part of it."""
    found = shlex.quote(word)
    return found if found != word else f"'{word}'"
