"""Text of data on a terminal or a page: characters that would control it are shown as escapes."""

import re

# C0 and C1 controls, DEL, what turns the direction of text, breaks lines or marks up text, and halves of characters.
# A line break and a tab are controls, too. What joins letters (U+200C, U+200D) is not: Persian and emoji need it.
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    r"""The text with each control character as an escape such as \\x1b or \\u202e, so that it moves no cursor.

    Args:
        keep: controls that stay as they are, such as "\\n".
    """
    return _CONTROLS.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def has_controls(text: str) -> bool:
    """Whether a text has a character that `printable` would change."""
    return _CONTROLS.search(text) is not None


def has_surrogates(text: str) -> bool:
    """Whether a text has halves of characters, which cannot be written as UTF-8."""
    return _SURROGATES.search(text) is not None


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
