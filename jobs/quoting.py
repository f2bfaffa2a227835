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


def quoted(words: Sequence[str]) -> list[str]:
    """A job's words, plain text in quotes where Hydra would refuse it or read it as something else.

    What Hydra reads stays as it is, with its types: numbers, booleans, null, lists, dicts and texts in quotes.

    Args:
        words: as `command_line.check` lets them pass, which bounds how deeply they are nested.

    Raises:
        UserError: a word that is no setting, with the form in which to type it.
    """
    _check_pieces(words)
    parser, sweeps = OverridesParser.create(), bool({"--multirun", "-m"} & {*words})
    found, after_dir = list[str](), False
    for word in words:
        is_setting = "=" in word and not word.startswith(("-", "~")) and not after_dir
        found.append(_quoted(word, parser, sweeps) if is_setting else word)
        after_dir = word in ("--config-dir", "-cd")
    return found


def _check_pieces(words: Sequence[str]) -> None:
    """Raises UserError for a setting with spaces that a shell has split, such as `label=click`, `=`, `1`."""
    for first, word in enumerate(words[:-1]):
        rest = [*takewhile(_is_piece, words[first + 1 :])]
        if "=" in word and not word.startswith(("-", "~", "=")) and rest:
            whole = " ".join([word, *rest])
            key, _, value = whole.partition("=")
            form = shlex.quote(whole) if WRITTEN_FOR_HYDRA.match(value) else typed(key, value)
            raise UserError(f"{printable(whole[:200])}: is split at its spaces. Type {form}.")


def _is_piece(word: str) -> bool:
    """Whether a word is neither a flag nor a setting."""
    return word != "" and not word.startswith(("-", "~")) and "=" not in word[1:]


def _quoted(word: str, parser: OverridesParser, sweeps: bool) -> str:
    key, _, value = word.partition("=")
    name = key.lstrip("+")
    if name in GROUPS or name == "hydra" or name.startswith(("hydra.", "hydra/")):
        return word
    try:
        read: Override = parser.parse_override(word)
    except HydraException:
        # A key that Hydra cannot read, either, gets Hydra's own message.
        return word if WRITTEN_FOR_HYDRA.match(value) else setting(key, value, always=True)
    if read.is_sweep_override() and not sweeps:
        raise UserError(
            f"{printable(word[:200])}: with commas it stands for several values. Type {typed(key, value)} for one text, or "
            f"{shlex.quote(f'{key}=[{value}]')} for a list."
        )
    # Spaces around a text are dropped, unless it is in quotes. A backslash is an escape.
    is_text = isinstance(read.value(), str) and not WRITTEN_FOR_HYDRA.match(value) and "\\" not in value
    return setting(key, value, always=True) if is_text and read.value() != value else word


def typed(key: str, value: str) -> str:
    """A setting with a text, quoted for Hydra and then for a shell: what is typed."""
    if "'" not in value and not re.search(r'["\\]', value):
        return f"'{key}=\"{value}\"'"
    return shlex.quote(setting(key, value, always=True))
