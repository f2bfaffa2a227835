"""Random changes of a JSON document: values dropped, replaced, inserted, or its bytes damaged."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 10**15, 2**62, 2**63, 10**30, -(2**63), 0.5, -0.5, 1e308, -1e308, 1e-300,
    float("nan"), float("inf"), "", "a", "1", "../a", "/dev/zero", "a\x1b[31m", "\ud800", "x" * 10_000, [], {}, [[]],
    [1, 2], [None], {"a": 1}, {"": {}}, "train", "valid", "click", "price", "city",
]  # fmt: skip


def _places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, inner in items for place in _places(inner, (*here, key)))]


@st.composite
def mutated(draw: st.DrawFn, content: Any) -> bytes:
    """The text of a document after one to three changes."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from(_places(content)[1:] or [(0,)]))
        holder = content
        for step in path:
            holder = holder[step]
        if not isinstance(holder, (dict, list)) or not holder:
            continue
        how = draw(st.sampled_from(["drop", "replace", "replace", "insert", "swap"]))
        odd = copy.deepcopy(draw(st.sampled_from(ODD)))
        if how == "drop":
            del holder[key]
        elif how == "replace":
            holder[key] = odd
        elif how == "insert" and isinstance(holder, list):
            holder.insert(key, draw(st.sampled_from([odd, copy.deepcopy(holder[key])])))
        elif how == "insert":
            holder[draw(st.sampled_from(["a", "", "click", "../a", "train", "price", "\x1b"]))] = odd
        else:
            other = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
            holder[key], holder[other] = holder[other], holder[key]
    text = json.dumps(content).encode()
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(text) - 1))
        text = text[:place] + draw(st.binary(max_size=4)) + text[place + draw(st.integers(0, 4)) :]
    return text
