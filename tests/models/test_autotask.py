"""AutoTask against its reference (float64 loops), and what must hold of causal attention, blocks, orders and held-out tasks."""

# Shapes: B rows, T tasks, F features, D width of a token, W width of facet 2.

import math

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import Sizes, check, close, drawn_sizes, randomised, rows
from references import autotask as reference
from torch import Tensor, nn

from features.errors import UserError
from models.fusion import build_fusion
from models.fusion.autotask import AutoTask
from models.towers import SharedTower

sizes = drawn_sizes(
    F=st.integers(1, 4),
    heads=st.sampled_from([1, 2, 3]),
    W=st.integers(1, 3),
    task_id=st.sampled_from(["onehot", "embedding", "none"]),
    causal=st.booleans(),
    block=st.none() | st.integers(1, 3),
    held_out=st.sets(st.integers(0, 3), max_size=2),
)


def unseen(size: Sizes) -> list[int]:
    return [task for task in sorted(size.held_out) if task < size.T][: size.T - 1]


def autotask(size: Sizes, **changes: object) -> AutoTask:
    arguments = {
        "width": size.W * size.heads, "heads": size.heads, "task_id": size.task_id, "causal": size.causal,
        "block": size.block, "unseen": unseen(size),
    }  # fmt: skip
    return randomised(AutoTask(size.D, size.T, size.F, **(arguments | changes)), size.seed)


def plain(T: int = 3, **changes: object) -> AutoTask:
    return randomised(AutoTask(2, T, 4, **({"width": 6, "heads": 2} | changes)), 7)


def fields(B: int = 4) -> Tensor:
    return torch.randn(B, 4, 2, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def facets(size: Sizes, params: reference.Params, x_BFD: Tensor, blocks: list[list[reference.Example]]):
    ids = [reference.task_id(params, size.task_id, task, size.T, unseen(size)) for task in range(size.T)]
    return reference.facets(params, x_BFD, blocks, size.heads, size.causal, ids)


class With:
    """A module whose call takes more than x."""

    def __init__(self, module: nn.Module, further: Tensor) -> None:
        self.module, self.further, self.named_parameters = module, further, module.named_parameters

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x, self.further)


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_in_training_it_equals_its_reference_for_the_drawn_order_of_tasks(size):
    module = autotask(size)
    order_BT = torch.rand(size.B, size.T, generator=torch.Generator().manual_seed(size.seed))
    module._order = lambda *_: order_BT
    blocks = reference.task_blocks(order_BT.tolist(), size.block or size.T, unseen(size))

    def twin(params, x_BFD):
        return reference.stacked(facets(size, params, x_BFD, blocks)[0], size.B, size.T)

    check(module, twin, rows(size, size.F, size.D))


@settings(max_examples=examples(25), deadline=None)
@given(sizes)
def test_in_evaluation_it_equals_its_reference_in_the_schemas_order(size):
    module, x_BFD = autotask(size).eval(), rows(size, size.F, size.D)
    blocks = reference.task_blocks([list(range(size.T))] * size.B, size.block or size.T, unseen(size))
    h, weight = facets(size, dict(module.named_parameters()), x_BFD, blocks)
    close(module(x_BFD), reference.stacked(h, size.B, size.T))
    nothing = x_BFD.new_zeros(())
    weight_BTT = [
        [[weight[b, t].get((b, other), nothing) for other in range(size.T)] for t in range(size.T)]
        for b in range(size.B)
    ]
    close(
        module.gates(x_BFD)[0],
        torch.stack([torch.stack([torch.stack(weight_T) for weight_T in weight_TT]) for weight_TT in weight_BTT]),
    )


@pytest.mark.parametrize("kind", ["mixed", "rows"])
@settings(max_examples=examples(30), deadline=None)
@given(sizes, st.sampled_from([0.2, 0.5, 0.9, 1.0]))
def test_examples_of_what_is_observed_equal_their_reference(kind, size, share):
    module = autotask(size, examples=kind)
    rng = torch.Generator().manual_seed(size.seed)
    observed_BT = torch.rand(size.B, size.T, generator=rng) < share  # some rows of no task, some of several
    order_N = torch.rand(size.B * size.T, generator=rng)
    module._order = lambda _, length: order_N[None, :length]
    blocks = reference.row_blocks(observed_BT.tolist(), order_N.tolist(), size.block or size.T, unseen(size))

    def twin(params, x_BFD):
        h = facets(size, params, x_BFD, blocks)[0] or {(0, 0): 0 * x_BFD.new_zeros(module.out_dim)}
        return reference.stacked(h, size.B, size.T)

    if blocks:
        check(With(module, observed_BT), twin, rows(size, size.F, size.D))
    else:
        assert not module(rows(size, size.F, size.D), observed_BT).any()


@settings(max_examples=examples(25), deadline=None)
@given(sizes)
def test_a_block_of_one_is_single_task_inference(size):
    x_BFD = rows(size, size.F, size.D)
    alone = autotask(size, block=1)
    for module in (alone.train(), alone.eval(), autotask(size, examples="mixed").eval()):
        for task in range(size.T):
            close(module(x_BFD)[:, [task]], module.forward_tasks(x_BFD, [task]))
            close(module(x_BFD)[:, [task]], autotask(size).forward_tasks(x_BFD, [task]))


def test_any_tasks_can_be_served_in_any_order():
    module, x_BFD = plain(T=4).eval(), fields()
    close(module.forward_tasks(x_BFD, range(4)), module(x_BFD))
    close(module.forward_tasks(x_BFD, [2, 0]), module.forward_tasks(x_BFD, [2, 0, 3])[:, :2])
    differ(module.forward_tasks(x_BFD, [2, 0])[:, [1, 0]], module.forward_tasks(x_BFD, [0, 2]))


def differ(a: Tensor, b: Tensor) -> None:
    assert not torch.allclose(a, b)


@pytest.mark.parametrize("causal", [True, False])
def test_an_earlier_feature_does_not_hear_of_a_later_one(causal):
    module, x_BFD = plain(causal=causal, block=1).eval(), fields()
    changed = x_BFD.clone()
    changed[:, 2:] += 1
    width = 2 * module.position_FW.shape[1]  # of the first two features, as facet 1 leaves them
    before, after = module(x_BFD)[..., :width], module(changed)[..., :width]
    close(before, after) if causal else differ(before, after)
    differ(module(x_BFD)[..., width:-6], module(changed)[..., width:-6])


@pytest.mark.parametrize("causal", [True, False])
def test_an_earlier_task_does_not_hear_of_a_later_one_and_a_later_hears_of_an_earlier(causal):
    module, x_BFD = plain(task_id="embedding", causal=causal).eval(), fields()
    before = module(x_BFD)
    with torch.no_grad():
        module.id_TI[1] += 1
    after = module(x_BFD)
    close(before[:, 0], after[:, 0]) if causal else differ(before[:, 0], after[:, 0])
    differ(before[:, 1], after[:, 1])
    differ(before[:, 2], after[:, 2])
    close(before[:, 2, :-6], after[:, 2, :-6])  # facet 1 knows its own task only


def mixtures(module: AutoTask, observed_BT: Tensor) -> list[set[reference.Example]]:
    """Of each observed row and task, which others a change of their row's features reaches in facet 2: found by trying."""
    x_BFD, reached = fields(len(observed_BT)), []
    draw_N = torch.rand(int(observed_BT.sum()))
    module._order = lambda *_: draw_N[None]
    before = module(x_BFD, observed_BT)[..., -6:]
    for row in range(len(x_BFD)):
        changed = x_BFD.clone()
        changed[row] += 1
        moved_BT = ((module(changed, observed_BT)[..., -6:] - before).abs() > 1e-12).any(2)
        reached.append({(b, t) for b, t in moved_BT.nonzero().tolist()})
    return reached


def test_mixed_examples_are_cut_into_blocks_across_rows_and_all_of_them_once():
    module = plain(examples="mixed", block=4, causal=False)
    observed_BT = torch.rand(8, 3, generator=torch.Generator().manual_seed(2)) < 0.7
    reached = mixtures(module, observed_BT)
    every = {(b, t) for b, t in observed_BT.nonzero().tolist()}
    for row, of_row in enumerate(reached):
        own = {(b, t) for b, t in every if b == row}
        assert own <= of_row <= every
        assert len(of_row) <= 4 * len(own)  # blocks of 4
        assert {b for b, _ in of_row} > {row}
    sizes_of = [sum(example in of_row for of_row in reached) for example in sorted(every)]
    assert max(sizes_of) <= 4  # no more rows than the block has examples
    alone = mixtures(plain(examples="mixed", block=1), observed_BT)
    assert alone == [{(b, t) for b, t in every if b == row} for row in range(8)]


def test_in_evaluation_mixed_examples_do_not_know_other_rows_nor_what_is_observed():
    module, x_BFD = plain(examples="mixed", block=4).eval(), fields(6)
    h_BTD = module(x_BFD, torch.rand(6, 3) < 0.5)
    assert torch.equal(module(x_BFD, torch.zeros(6, 3, dtype=torch.bool)), h_BTD)
    close(torch.cat([module(x_1FD) for x_1FD in x_BFD.split(1)]), h_BTD)
    close(module.gates(x_BFD)[0], torch.eye(3).double().expand(6, 3, 3))


def test_every_order_of_mixed_examples_is_as_likely():
    module = plain(T=2, examples="mixed", block=2)
    observed_BT = torch.tensor([[True, False], [False, True], [True, False]])
    first = []
    for _ in range(150):
        h_BTD = module(fields(3), observed_BT)[..., -6:]
        alone = module.eval()(fields(3))[..., -6:]
        module.train()
        first.append(((h_BTD - alone)[observed_BT].abs() < 1e-12).all(1))  # those without another before them
    assert torch.stack(first).sum(1).tolist() == [2] * 150  # of a block of 2 and one of 1
    assert all(70 < count < 130 for count in torch.stack(first).sum(0).tolist())


def test_blocks_start_as_gpt2():
    module = AutoTask(29, 3, 40, 128)
    for name, value in module.named_parameters():
        if name.startswith("over_") and "norm" not in name:
            if name.endswith("bias"):
                assert not value.any()
            else:
                assert value.std().item() == pytest.approx(0.02, rel=0.12), name  # 5 standard errors of 1,024 numbers
                assert abs(value.mean().item()) < 0.1 / value.numel() ** 0.5, name
    assert module.position_FW.std().item() == pytest.approx(0.02, rel=0.15)


def test_an_earlier_row_of_a_block_does_not_hear_of_a_later_one_and_blocks_not_of_each_other():
    module, x_BFD = plain(examples="rows", block=3), fields(8)
    module._order = lambda _, length: torch.linspace(0, 1, length)[None]
    observed_BT = torch.eye(3).bool()[torch.arange(8) % 3]
    changed = x_BFD.clone()
    changed[4] += 1
    same_B = ((module(x_BFD, observed_BT) - module(changed, observed_BT)).abs() < 1e-12).all(2).all(1)
    assert same_B.tolist() == [True, True, True, True, False, False, True, True]


@pytest.mark.parametrize("causal", [True, False])
def test_rows_that_are_observed_for_no_task_disturb_nobody(causal):
    module, x_BFD = plain(examples="rows", block=3, causal=causal), fields(6)
    module._order = lambda _, length: torch.linspace(0, 1, length)[None]
    observed_BT = torch.eye(3).bool()[torch.tensor([0, 1, 2, 0, 1, 2])]
    h_BTD = module(x_BFD, observed_BT)
    padded = torch.cat([x_BFD[:2], torch.full((2, 4, 2), math.nan), x_BFD[2:]])
    rows_of = torch.tensor([0, 1, 4, 5, 6, 7])
    observed = observed_BT.new_zeros(8, 3).index_copy(0, rows_of, observed_BT)
    found = module(padded, observed)
    close(found[rows_of], h_BTD)
    assert not found[2:4].any()


def test_a_batch_of_padding_alone_gives_zeros_and_gradients_of_zero():
    module = plain(examples="rows")
    h_BTD = module(fields(), torch.zeros(4, 3, dtype=torch.bool))
    assert not h_BTD.any()
    h_BTD.sum().backward()
    assert not any(parameter.grad.any() for parameter in module.parameters())


def test_in_training_every_order_of_tasks_is_as_likely_and_follows_the_seed():
    module = plain()
    orders = module._order(6000, 3).argsort(1) @ torch.tensor([9, 3, 1])
    counts = orders.unique(return_counts=True)[1]
    assert len(counts) == 6
    assert counts.min() > 850
    assert counts.max() < 1150
    x_BFD = fields(20)
    torch.manual_seed(1)
    first, second = module(x_BFD), module(x_BFD)
    differ(first, second)
    torch.manual_seed(1)
    assert torch.equal(module(x_BFD), first)
    assert torch.equal(module.eval()(x_BFD), module(x_BFD))


@pytest.mark.parametrize("task_id", ["onehot", "embedding"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_task_held_out_has_no_id_is_alone_and_is_heard_by_nobody(task_id, mode):
    module = getattr(plain(T=4, task_id=task_id, unseen=[1]), mode)()
    module._order = lambda *_: torch.linspace(0, 1, 4)[None]
    x_BFD = fields()
    h_BTD = module(x_BFD)
    close(h_BTD[:, [0, 2, 3]], module.forward_tasks(x_BFD, [0, 2, 3]))
    close(h_BTD[:, [1]], module.forward_tasks(x_BFD, [1]))
    if task_id == "embedding":
        h_BTD.sum().backward()
        assert module.id_TI.grad.abs().sum(1).bool().tolist() == [True, False, True, True]


def test_labels_of_a_task_held_out_move_no_weight():
    module, tower = plain(unseen=[1]), SharedTower(3, 4 * 8 + 6, [5]).double()
    parameters = [*module.parameters(), *tower.tower.parameters()]
    logit_BT = module.detach_unseen(tower(module(fields())))[0]
    gradients = [torch.autograd.grad(logit_BT[:, t].sum(), parameters, retain_graph=True) for t in range(3)]
    assert [any(g.any() for g in of_task) for of_task in gradients] == [True, False, True]


def test_without_a_task_id_and_interaction_all_tasks_are_the_same():
    h_BTD = plain(task_id="none", block=1)(fields())
    close(h_BTD, h_BTD[:, :1].expand(-1, 3, -1))
    differ(plain(block=1)(fields())[:, 0], plain(block=1)(fields())[:, 1])


def test_arguments_that_cannot_be_are_refused():
    def build(**arguments):
        return build_fusion({"name": "autotask", "width": 8} | arguments, 4, ["a", "b"], list("vwxyz"))

    assert build(unseen=["b"]).unseen_T.tolist() == [False, True]
    for wrong, words in (
        ({"heads": 3}, r"model.fusion.width: 8 is not a multiple of heads, which is 3"),
        ({"unseen": ["c"]}, r"model.fusion.unseen: c is not one of a, b"),
        ({"unseen": ["a", "b"]}, r"model.fusion.unseen: holds out every task"),
        ({"task_id": "name"}, r"model.fusion.task_id"),
        ({"block": 0}, r"model.fusion.block"),
        ({"examples": "all"}, r"model.fusion.examples"),
    ):
        with pytest.raises(UserError, match=words):
            build(**wrong)
