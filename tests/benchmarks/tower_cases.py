"""What towers.py times: for every model its config, and the matrix products that it and its towers cannot avoid.

Two experts a task everywhere; shared experts as in jobs/conf/model. Where experts are hidden from a gate, its mixture counts as
one over all of them, as zeros cost less than copies of what is visible.
"""

# Shapes: T tasks, B rows, F fields, W width of a token, E experts.

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from matrix_products import Product

from models.fusion.emm import TrainedModel

SHARED = 3
HEADS, HIDDEN, POINTS, GROUPS, SQUEEZE, CONDITION, WIDTH = 2, 64, 4, 2, 16, 8, 64  # as in jobs/conf/model


class Sizes(NamedTuple):
    tasks: int
    rows: int = 4096
    in_dim: int = 512
    wide: int = 256
    narrow: int = 128
    tower: int = 64
    fields: int = 32

    @property
    def token(self) -> int:
        return self.in_dim // self.fields


Case = tuple[dict[str, Any], list[Product]]


def network(count: int, rows: int, *dims: int) -> Iterator[Product]:
    """Of `count` multi-layer perceptrons with inputs of their own."""
    for inner, outer in zip(dims, dims[1:], strict=False):
        yield Product(count, rows, inner, outer)


def towers(s: Sizes, dim: int | None = None) -> Iterator[Product]:
    return network(s.tasks, s.rows, dim or s.narrow, s.tower, 1)


def shared_bottom(s: Sizes) -> Case:
    return {"widths": [s.wide, s.narrow]}, [*network(1, s.rows, s.in_dim, s.wide, s.narrow), *towers(s)]


def task_networks(s: Sizes) -> list[Product]:
    """A network a task, all on one input."""
    return [Product(1, s.rows, s.in_dim, s.tasks * s.wide), Product(s.tasks, s.rows, s.wide, s.narrow)]


def single_task(s: Sizes) -> Case:
    return {"widths": [s.wide, s.narrow]}, [*task_networks(s), *towers(s)]


def cross_stitch(s: Sizes) -> Case:
    stitches = [Product(1, s.tasks, s.tasks, s.rows * width) for width in (s.wide, s.narrow)]
    return {"levels": [[s.wide], [s.narrow]]}, [*task_networks(s), *stitches, *towers(s)]


def mmoe(s: Sizes) -> Case:
    experts = 2 * s.tasks
    products = [
        Product(1, s.rows, s.in_dim, experts * s.wide),
        Product(experts, s.rows, s.wide, s.narrow),
        Product(1, s.rows, s.in_dim, s.tasks * experts),  # gates
        Product(s.rows, s.tasks, experts, s.narrow),  # their mixtures
    ]
    return {"num_experts": experts, "levels": [[s.wide, s.narrow]]}, [*products, *towers(s)]


def ml_mmoe(s: Sizes) -> Case:
    experts = 2 * s.tasks
    config, products = mmoe(s)
    more = [Product(1, s.rows, s.in_dim, experts * experts), Product(s.rows, experts, experts, s.wide)]
    return config | {"levels": [[s.wide], [s.narrow]]}, products + more


def units(s: Sizes, shared: int, isolated: bool) -> Case:
    """PLE and AdaTT: units with two experts each, and a shared one."""
    experts, givers = 2 * s.tasks + shared, s.tasks + bool(shared)
    seen = 2 + shared if isolated else experts
    products = [
        Product(1, s.rows, s.in_dim, experts * s.wide),
        Product(1, s.rows, s.in_dim, s.tasks * seen + bool(shared) * experts),
        Product(s.rows, givers, experts, s.wide),
        Product(s.tasks, s.rows, s.wide, 2 * s.narrow),
        *([Product(1, s.rows, s.wide, shared * s.narrow)] if shared else []),
        Product(s.tasks, s.rows, s.wide, seen),
        Product(s.rows, s.tasks, experts, s.narrow),
    ]
    config = {"levels": [[s.wide], [s.narrow]], "task_experts": 2, "shared_experts": shared}
    return config, [*products, *towers(s)]


def cgc(s: Sizes) -> Case:
    experts = 2 * s.tasks + SHARED
    products = [
        Product(1, s.rows, s.in_dim, experts * s.wide),
        Product(experts, s.rows, s.wide, s.narrow),
        Product(1, s.rows, s.in_dim, s.tasks * (2 + SHARED)),
        Product(s.rows, s.tasks, experts, s.narrow),
    ]
    config = {"levels": [[s.wide, s.narrow]], "task_experts": 2, "shared_experts": SHARED}
    return config, [*products, *towers(s)]


def aitm(s: Sizes) -> Case:
    steps = s.tasks - 1
    transfer = [Product(steps, s.rows, s.narrow, s.narrow), Product(steps, 2 * s.rows, s.narrow, 3 * s.narrow)]
    return {"widths": [s.wide, s.narrow]}, [*task_networks(s), *transfer, *towers(s)]


def emm(s: Sizes) -> Case:
    """Two trained models a task, of two layers each."""
    count = 2 * s.tasks
    products = [
        Product(1, s.rows, s.in_dim, count * s.wide),
        Product(1, s.rows, s.in_dim, count + s.tasks * s.tasks),
        Product(s.tasks, s.rows, s.wide, 2 * s.narrow),
        Product(s.tasks, s.rows, s.wide, 2 + s.tasks),
    ]
    for width in (s.wide, s.narrow):
        products += [Product(s.rows, s.tasks, count, width), Product(s.tasks, 2 * s.rows, width, 3 * width)]
    models = [TrainedModel(f"model {m}", m // 2, s.in_dim, [s.wide, s.narrow]) for m in range(count)]
    return {"models": models, "one_input": True}, [*products, *towers(s)]


def autotask(s: Sizes) -> Case:
    inner = -(-(s.token + s.tasks) // 8) * 8
    products = [Product(1, s.rows, s.in_dim, WIDTH)]
    for width, sequences, length in ((inner, s.rows * s.tasks, s.fields), (WIDTH, s.rows, s.tasks)):
        products += attention(sequences, length, length, width)
        for outer in (3 * width, width, 4 * width):
            products.append(Product(1, sequences * length, width, outer))
        products.append(Product(1, sequences * length, 4 * width, width))
    tower = network(1, s.rows * s.tasks, s.fields * inner + WIDTH, s.tower, 1)
    return {"width": WIDTH}, [*products, *tower]


def attention(sequences: int, asking: int, asked: int, width: int) -> list[Product]:
    return [Product(sequences, asking, width, asked), Product(sequences, asking, asked, width)]


def multitab(s: Sizes) -> Case:
    products, every = [], s.tasks + s.fields
    for asking in (every, s.tasks):  # the second block renews the tasks' tokens only
        products += attention(s.rows * HEADS, asking, every, s.token // HEADS)
        products.append(Product(1, s.rows * every, s.token, 2 * s.token))
        products += 2 * [Product(1, s.rows * asking, s.token, s.token)]
        products += network(1, s.rows * asking, s.token, HIDDEN, s.token)
    return {"layers": 2, "heads": HEADS, "hidden": HIDDEN}, [*products, *towers(s, s.token)]


def excitation(count: int, s: Sizes) -> Iterator[Product]:
    return network(count, s.rows, s.fields, SQUEEZE, s.fields)


def dtrn(s: Sizes) -> Case:
    behaviours = list(range(0, s.fields, 4))
    products = [*network(1, s.tasks * s.rows * len(behaviours), s.token, 32, s.token), *excitation(s.tasks, s)]
    products += network(s.tasks, s.rows, s.in_dim, s.wide, s.narrow)
    config = {"widths": [s.wide, s.narrow], "behaviours": behaviours}
    return config | {"condition": CONDITION, "hidden": 32, "squeeze": SQUEEZE}, [*products, *towers(s)]


def apem(s: Sizes) -> Case:
    places = s.rows * s.fields
    products = [Product(GROUPS, places, s.token, outer) for outer in (POINTS, 2 * s.token, s.token)]
    products += network(GROUPS, places, s.token, 16, s.token)
    products.append(Product(GROUPS, s.rows * POINTS, s.token, 2 * s.token))
    products += [Product(GROUPS * s.rows, POINTS, s.fields, s.token)]
    products += attention(GROUPS * s.rows, s.fields, POINTS, s.token)
    products += [*excitation(GROUPS, s), Product(1, GROUPS * places, s.token, s.tasks)]
    products += network(s.tasks, s.rows, s.in_dim, s.wide, s.narrow)
    config = {"widths": [s.wide, s.narrow], "groups": GROUPS, "points": POINTS, "hidden": 16, "squeeze": SQUEEZE}
    return config, [*products, *towers(s)]


CASES: dict[str, Callable[[Sizes], Case]] = {
    "shared_bottom": shared_bottom,
    "single_task": single_task,
    "cross_stitch": cross_stitch,
    "mmoe": mmoe,
    "ml_mmoe": ml_mmoe,
    "cgc": cgc,
    "ple": lambda s: units(s, SHARED, isolated=True),
    "adatt_sp": lambda s: units(s, 0, isolated=False),
    "adatt": lambda s: units(s, SHARED, isolated=False),
    "aitm": aitm,
    "emm": emm,
    "autotask": autotask,
    "multitab": multitab,
    "apem": apem,
    "dtrn": dtrn,
}
