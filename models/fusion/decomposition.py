"""Where trained models are cut into components: EMM, section III-A."""

# Shapes: M trained models, L levels.

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from features.errors import UserError


class TrainedModel(NamedTuple):
    """A multi-layer perceptron that was trained for one task.

    Attributes:
        name: for messages. task: index of its task.
        in_dim: width of what it reads. widths: of its layers with ReLU below the tower, which is where it may be cut.
        tower: widths of the hidden layers above those, below the one unit of its logit.
    """

    name: str
    task: int
    in_dim: int
    widths: Sequence[int]
    tower: Sequence[int] = ()


def common_widths(widths_M: Sequence[Sequence[int]]) -> list[int]:
    """The longest sequence of layer widths that all models have in this order; of several the one highest in the first model.

    The paper's intersection (Algorithm 1) is a set; kept in order it is a longest common subsequence.
    """

    @cache
    def longest(end_M: tuple[int, ...]) -> tuple[int, ...]:
        best: tuple[int, ...] = ()
        for width in dict.fromkeys(reversed(widths_M[0][: end_M[0]])):
            ends = zip(widths_M, end_M, strict=True)
            place_M = tuple(max((i for i in range(end) if widths[i] == width), default=-1) for widths, end in ends)
            if min(place_M) >= 0 and len(below := longest(place_M)) >= len(best):
                best = (*below, width)
        return best

    return list(longest(tuple(map(len, widths_M))))


def places(widths: Sequence[int], cut_L: Sequence[int]) -> list[int]:
    """The layers of a model after which it is cut, given their widths; each width occurs, in this order.

    The last is as high as possible: layers above it go to a tower, which serves one model only. Of the ways to choose the
    others it is the one whose components are closest to equal depth, by the sum of squares; of equal ones the lowest cuts.
    """
    ways: dict[int, tuple[int, list[int]]] = {-1: (0, [])}  # by the last cut so far
    for cut in cut_L:
        ways = {
            place: min(
                (squares + (place - last) ** 2, [*before, place])
                for last, (squares, before) in ways.items()
                if last < place
            )
            for place, width in enumerate(widths)
            if width == cut and place > min(ways)
        }
    return ways[max(ways)][1]


def decompose(models: Sequence[TrainedModel]) -> list[list[list[int]]]:
    """Cuts every model into as many components as there are layer widths common to all (EMM, section III-A, Algorithm 1).

    A component needs the width of its input from the level below and hands on that of its last layer, so a cut asks for
    the same width at the boundary and nothing of the layers between two: the paper's own models, three times 8-8 and three
    times 16-8 on Census-Income, three times 128-64 and three times 256-64 on the other data (widths from the authors' code),
    have no layer with the same width in and out, and three components each. Towers stay whole, as in Algorithm 2.

    Returns: for each model the widths of its component at every level, and last those of what is left above, the tower's
        among them. The paper's text counts that as a component too.
    Raises:
        UserError: there is no common width.
    """
    cut_L = common_widths([model.widths for model in models])
    if not cut_L:
        structures = "; ".join(f"{m.name} {'-'.join(map(str, m.widths))}" for m in models)
        raise UserError(
            "model.from: no layer below the towers has the same width in all models, to cut them at. Their widths, from the "
            f"first layer on: {structures}. Train models that share one, such as 128-64 and 256-64."
        )
    parts = []
    for model in models:
        ends = [0, *(place + 1 for place in places(model.widths, cut_L))]
        components = [list(model.widths[first:last]) for first, last in zip(ends, ends[1:], strict=False)]
        parts.append([*components, [*model.widths[ends[-1] :], *model.tower]])
    return parts
