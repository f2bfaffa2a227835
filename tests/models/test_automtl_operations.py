"""Operations, interactions and blocks of AutoMTL against their reference."""

import itertools

import pytest
import torch
from automtl_sizes import BLOCKS, INTERACTIONS, automtl_sizes, columns, some
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import Sizes, check, close, drawn_sizes, load, randomised, rows, same
from references import automtl as reference
from torch import Tensor, nn

from features.errors import UserError
from models.automtl.blocks import ChosenBlock, ExpertBlock, InteractionBlock, check_names
from models.automtl.interactions import INTERACTIONS as ALL_INTERACTIONS
from models.automtl.interactions import Fields
from models.automtl.operations import MLP, OPERATIONS
from models.layers import linear, rectified

# Shapes: B rows, S experts, D width in, F features, W width of a token, H width out, O candidates, C sizes.
IN_BLOCK = automtl_sizes(names=some(BLOCKS), shared=st.booleans())
OF_INTERACTION = automtl_sizes(names=some(INTERACTIONS))


def inputs(size: Sizes) -> Tensor:
    """x_SBH of N experts, or x_1BH of all."""
    x_BSH = rows(size, 1 if size.shared else size.N, size.H)
    return x_BSH.transpose(0, 1).contiguous().requires_grad_()


def weights(size: Sizes, *shape: int) -> Tensor:
    """Any numbers, not only those of a softmax."""
    rng = torch.Generator().manual_seed(size.seed + 2)
    return torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()


def one_hot(choice: list[int], candidates: int) -> Tensor:
    return nn.functional.one_hot(torch.tensor(choice), candidates).double()


def expert_block(size: Sizes) -> ExpertBlock:
    return randomised(ExpertBlock(size.names, size.N, size.H, size.nested), size.seed)


def interaction_block(size: Sizes) -> InteractionBlock:
    block = InteractionBlock(size.names, columns(size), size.D, size.W, size.H, size.nested)
    return randomised(block, size.seed)


def each_expert(size: Sizes, x_SBH: Tensor, apply) -> Tensor:
    """y_SBH of apply(expert, x_H), row by row."""
    return torch.stack([torch.stack([apply(s, x_H) for x_H in x_SBH[0 if size.shared else s]]) for s in range(size.N)])


@settings(max_examples=examples(60), deadline=None)
@given(automtl_sizes(names=some(BLOCKS, 9), shared=st.booleans()))
def test_each_operation_of_every_expert_equals_its_reference(size):
    block, x_SBH = expert_block(size), inputs(size)
    for name, operation in [(n, block.kinds[reference.kind(n)]) for n in size.names]:
        index = [n for n in size.names if reference.kind(n) == reference.kind(name)].index(name)
        params = dict(operation.named_parameters())

        def twin(s: int, x_H: Tensor, name: str = name, params: dict[str, Tensor] = params) -> Tensor:
            return reference.operation(params, "", size.names, name, s, size.nested, x_H)

        same(operation.one(x_SBH, index), each_expert(size, x_SBH, twin), {"x": x_SBH, **params})


@settings(max_examples=examples(60), deadline=None)
@given(IN_BLOCK)
def test_a_block_of_experts_is_the_weighted_sum_of_its_candidates(size):
    block, x_SBH, weight_SO = expert_block(size), inputs(size), weights(size, size.N, len(size.names))
    params = dict(block.named_parameters())
    expected = each_expert(
        size, x_SBH, lambda s, x_H: reference.block(params, "", size.names, s, size.nested, weight_SO[s], x_H)
    )
    same(block(x_SBH, weight_SO), expected, {"x": x_SBH, "weight": weight_SO, **params})


@settings(max_examples=examples(60), deadline=None)
@given(IN_BLOCK, st.data())
def test_a_path_through_a_block_is_one_candidate_an_expert_times_its_weight(size, data):
    block, x_SBH, weight_SO = expert_block(size), inputs(size), weights(size, size.N, len(size.names))
    choice_S = data.draw(st.lists(st.integers(0, len(size.names) - 1), min_size=size.N, max_size=size.N))
    params, hot_SO = dict(block.named_parameters()), one_hot(choice_S, len(size.names))
    given = {"x": x_SBH, "weight": weight_SO, **params}
    same(block.path(x_SBH, weight_SO, choice_S), block(x_SBH, weight_SO * hot_SO), given)

    def twin(s: int, x_H: Tensor) -> Tensor:
        name = size.names[choice_S[s]]
        prefix = f"kinds.{reference.kind(name)}."
        y_H = reference.operation(params, prefix, size.names, name, s, size.nested, x_H)
        return weight_SO[s, choice_S[s]] * y_H

    same(block.path(x_SBH, weight_SO, choice_S), each_expert(size, x_SBH, twin), given)


@settings(max_examples=examples(60), deadline=None)
@given(automtl_sizes(N=st.integers(1, 6), shared=st.booleans()), st.data())
def test_a_block_of_chosen_operations_gives_each_expert_its_own_whatever_their_order(size, data):
    names = data.draw(st.lists(st.sampled_from(BLOCKS), min_size=size.N, max_size=size.N))
    module = randomised(ChosenBlock(names, size.H, size.shared), size.seed)

    def twin(params: dict[str, Tensor], x_SBH: Tensor) -> Tensor:
        def apply(s: int, x_H: Tensor) -> Tensor:
            prefix, place = f"operations.{names[s]}.", names[:s].count(names[s])
            return reference.operation(params, prefix, [names[s]], names[s], place, True, x_H)

        return each_expert(size, x_SBH, apply)

    check(module, twin, inputs(size).detach())


def test_experts_with_the_same_operation_are_one_stack():
    block = ChosenBlock(["mlp_4", "conv_3", "mlp_4", "skip", "gating", "mlp_2", "mlp_4"], 5, shared_input=False)
    assert {name: tuple(p.shape) for name, p in block.named_parameters()} == {
        "operations.mlp_4.hidden.weight_SDH": (3, 5, 4), "operations.mlp_4.hidden.bias_SH": (3, 4),
        "operations.mlp_4.out.weight_SDH": (3, 4, 5), "operations.mlp_4.out.bias_SH": (3, 5),
        "operations.mlp_2.hidden.weight_SDH": (1, 5, 2), "operations.mlp_2.hidden.bias_SH": (1, 2),
        "operations.mlp_2.out.weight_SDH": (1, 2, 5), "operations.mlp_2.out.bias_SH": (1, 5),
        "operations.conv_3.kernel_SCK": (1, 1, 3), "operations.conv_3.bias_SC": (1, 1),
        "operations.gating.gate.weight_SDH": (1, 5, 5), "operations.gating.gate.bias_SH": (1, 5),
    }  # fmt: skip


@pytest.mark.parametrize("nested", [True, False])
def test_narrow_mlps_are_columns_of_the_widest_or_have_their_own(nested):
    mlp = MLP(2, 3, ["4", "1", "2"], nested)
    assert mlp.hidden.weight_SDH.shape == (2, 3, 4 if nested else 7)
    assert [list(range(7))[k] for k in mlp.columns] == (
        [[0, 1, 2, 3], [0], [0, 1]] if nested else [[0, 1, 2, 3], [4], [5, 6]]
    )


@settings(max_examples=examples(40), deadline=None)
@given(drawn_sizes(H=st.integers(1, 9), N=st.integers(1, 2), kernel=st.sampled_from([1, 3, 5, 7, 11])))
def test_a_convolution_is_that_of_torch(size):
    size.shared = False
    module = randomised(OPERATIONS["conv"](size.N, size.H, ["1", str(size.kernel)]), size.seed)
    x_SBH, half = inputs(size), max(module.sizes) // 2
    taken = slice(half - size.kernel // 2, half + size.kernel // 2 + 1)
    y_SBH = [
        nn.functional.conv1d(x_BH.unsqueeze(1), kernel_K[None, None, taken], bias, padding=size.kernel // 2).squeeze(1)
        for x_BH, kernel_K, bias in zip(x_SBH, module.kernel_SCK[:, 1], module.bias_SC[:, 1:], strict=True)
    ]
    close(module.one(x_SBH, 1), torch.stack(y_SBH).relu())


@settings(max_examples=examples(60), deadline=None)
@given(automtl_sizes(names=some(INTERACTIONS, 12)))
def test_each_interaction_equals_its_reference(size):
    block, x_BD = interaction_block(size), rows(size).requires_grad_()
    params = dict(block.named_parameters())
    for choice, name in enumerate(size.names):
        expected = [
            reference.interaction(params, "", size.names, name, columns(size), size.nested, x_D) for x_D in x_BD
        ]
        same(block.one(x_BD, choice), torch.stack(expected), {"x": x_BD, **params})


@settings(max_examples=examples(60), deadline=None)
@given(OF_INTERACTION)
def test_the_interaction_block_is_the_weighted_sum_of_its_candidates(size):
    block, x_BD, weight_O = interaction_block(size), rows(size).requires_grad_(), weights(size, len(size.names))
    params = dict(block.named_parameters())
    expected = torch.stack([
        sum(
            weight * reference.interaction(params, "", size.names, name, columns(size), size.nested, x_D)
            for weight, name in zip(weight_O, size.names, strict=True)
        )
        for x_D in x_BD
    ])  # fmt: skip
    same(block(x_BD, weight_O), expected, {"x": x_BD, "weight": weight_O, **params})


@settings(max_examples=examples(40), deadline=None)
@given(OF_INTERACTION)
def test_one_interaction_is_the_mixture_with_all_weight_on_it_and_skip_that_of_its_name(size):
    block, x_BD = interaction_block(size), rows(size).requires_grad_()
    params = dict(block.named_parameters())
    for choice in range(len(size.names)):
        (weight_O,) = one_hot([choice], len(size.names))
        same(block.one(x_BD, choice), block(x_BD, weight_O), {"x": x_BD, **params})
    if "skip" in size.names:
        assert torch.equal(block.skip(x_BD), block.one(x_BD, size.names.index("skip")))
    else:
        assert block.skip(x_BD) is None


def test_features_become_tokens_only_where_a_candidate_reads_them():
    for name in INTERACTIONS:
        block = InteractionBlock([name], [[0], [1, 2]], 3, 4, 5)
        assert (block.tokens is None) == (not name.startswith(("product", "attention"))), name


@settings(max_examples=examples(40), deadline=None)
@given(drawn_sizes(C=st.integers(1, 3), K=st.integers(1, 4)), st.integers(0, 3))
def test_relu_of_a_product_takes_parts_of_weights_that_are_not_contiguous(size, first):
    rng = torch.Generator().manual_seed(size.seed)
    whole = torch.randn(size.C, size.D, first + size.K + 2, generator=rng, dtype=torch.float64).requires_grad_()
    bias = torch.randn(size.C, first + size.K + 2, generator=rng, dtype=torch.float64).requires_grad_()
    taken = slice(first, first + size.K)
    for count in {1, size.C}:
        x_UBD = rows(size, count, size.D).transpose(0, 1).requires_grad_()
        expected = [
            torch.stack([(bias[s, k] + x_UBD[s % count] @ whole[s, :, k]).relu() for k in range(first, taken.stop)], 1)
            for s in range(size.C)
        ]
        part_SBK = rectified(x_UBD, whole[:, :, taken], bias[:, taken])
        same(part_SBK, torch.stack(expected), {"x": x_UBD, "weight": whole, "bias": bias})


@pytest.mark.parametrize("layer", [linear, rectified])
def test_single_precision_takes_sliced_weights_too(layer):
    whole_SDH, bias_SH, x_1BD = torch.randn(3, 6, 9), torch.randn(3, 9), torch.randn(1, 4, 6)
    part_SDH, part_SH = whole_SDH[:, :, 2:7], bias_SH[:, 2:7]
    expected = layer(x_1BD.double(), part_SDH.double(), part_SH.double())
    torch.testing.assert_close(layer(x_1BD, part_SDH, part_SH).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stack", [1, 2])
@pytest.mark.parametrize("layer", [linear, rectified])
def test_single_precision_takes_a_bias_that_is_one_number_for_all_or_every_other_of_more(layer, stack):
    x_1BD, weight_SDH = torch.randn(1, 4, 6), torch.randn(stack, 6, 5)
    for bias_SH in (torch.randn(stack, 1).expand(-1, 5), torch.randn(stack, 10)[:, ::2]):
        expected = layer(x_1BD.double(), weight_SDH.double(), bias_SH.double())
        torch.testing.assert_close(layer(x_1BD, weight_SDH, bias_SH).double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=examples(30), deadline=None)
@given(automtl_sizes(names=some(BLOCKS), shared=st.booleans()))
def test_single_precision_gives_what_double_precision_gives(size):
    block, x_SBH, choice = expert_block(size), inputs(size).detach(), [size.seed % len(size.names)] * size.N
    weight_SO = weights(size, size.N, len(size.names)).detach()
    calls = [lambda x, w: block(x, w), lambda x, w: block.path(x, w, choice)]
    wanted = [call(x_SBH, weight_SO) for call in calls]
    block.float()
    for call, y_SBH in zip(calls, wanted, strict=True):
        torch.testing.assert_close(call(x_SBH.float(), weight_SO.float()).double(), y_SBH, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("single", [True, False])
def test_half_precision_runs_in_every_operation_and_interaction(single):
    size = Sizes(B=4, D=6, T=1, seed=1, H=5, F=3, W=4, N=3, nested=True, shared=False, names=BLOCKS)
    block, x_SBH = expert_block(size), inputs(size)
    weight_SO = weights(size, 3, len(BLOCKS)).softmax(1)
    with torch.no_grad():
        pairs = [(block(x_SBH, weight_SO), lambda: block.float()(x_SBH.float(), weight_SO.float()))]
        if single:
            choice = [1, 5, 0]
            wanted = block.double().path(x_SBH, weight_SO, choice)
            pairs = [(wanted, lambda: block.float().path(x_SBH.float(), weight_SO.float(), choice))]
        size.names = INTERACTIONS
        interaction, x_BD, weight_O = interaction_block(size), rows(size), weights(size, len(INTERACTIONS)).softmax(0)
        pairs.append((interaction(x_BD, weight_O), lambda: interaction.float()(x_BD.float(), weight_O.float())))
        for wanted, low in pairs:
            with torch.autocast("cpu", torch.bfloat16):
                found = low()
            assert (found - wanted).norm() <= 0.05 * wanted.norm()


@settings(max_examples=examples(30), deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=4, unique=True), st.integers(0, 999))
def test_operations_start_as_layers_of_torch_do(kernels, seed):
    torch.manual_seed(seed)
    sizes = [2 * half + 1 for half in kernels]
    conv = OPERATIONS["conv"](40, 4, [str(size) for size in sizes])
    for c, size in enumerate(sizes):
        for start in (conv.kernel_SCK[:, c], conv.bias_SC[:, c]):
            assert 0.7 * size**-0.5 < start.abs().max() <= size**-0.5 + 1e-6
    cross = ALL_INTERACTIONS["cross"](Fields(25, 2, 4), 4, ["2"])
    assert 0.7 * 25**-0.5 < cross.weight_LD.abs().max() <= 25**-0.5
    assert not cross.bias_LD.any()


@pytest.mark.parametrize(("names", "kinds", "says"), [
    (["mlp_4", "dense_4"], OPERATIONS, "here: dense_4 is not one of gating, mlp, conv, skip, most with a size, as in mlp_64"),
    (["mlp"], OPERATIONS, "here: mlp: it needs a size after an underscore, a whole number from 1 to 65536"),
    (["mlp_0"], OPERATIONS, "mlp_0: it needs a size"), (["mlp_65537"], OPERATIONS, "mlp_65537: it needs a size"),
    (["mlp_-4"], OPERATIONS, "mlp_-4: it needs a size"), (["mlp_4_4"], OPERATIONS, "mlp_4_4: it needs a size"),
    (["conv_4"], OPERATIONS, "conv_4: a kernel needs an odd size"), (["conv_x"], OPERATIONS, "conv_x: it needs a size"),
    (["gating_2"], OPERATIONS, "gating_2: it has no size: leave _2 out"), (["skip_1"], OPERATIONS, "it has no size"),
    ([""], OPERATIONS, "here:  is not one of"), (["cross"], ALL_INTERACTIONS, "cross: it needs a size"),
    (["product"], ALL_INTERACTIONS, "product: after an underscore it has inner or outer"),
    (["product_3"], ALL_INTERACTIONS, "product_3: after an underscore it has inner or outer"),
    (["skip_2"], ALL_INTERACTIONS, "skip_2: after an underscore it has nothing"),
    (["conv_3"], ALL_INTERACTIONS, "here: conv_3 is not one of product, cross, attention, mlp, skip"),
    (["mlp_" + "9" * 5000], OPERATIONS, "it needs a size"), (["cross_" + "9" * 5000], ALL_INTERACTIONS, "it needs a size"),
])  # fmt: skip
def test_a_name_that_no_operation_has_is_said_with_its_place(names, kinds, says):
    with pytest.raises(UserError) as caught:
        check_names(names, kinds, "here")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_name_of_the_papers_table_is_known():
    check_names([*BLOCKS, *(f"mlp_{1 << n}" for n in range(4, 11))], OPERATIONS, "")
    check_names([*INTERACTIONS, "cross_4", "attention_8", "mlp_1024"], ALL_INTERACTIONS, "")


@pytest.mark.parametrize(("heads", "width"), itertools.product((2, 3), (4, 6, 7)))
def test_heads_that_do_not_divide_a_token_are_refused(heads, width):
    if width % heads == 0:
        InteractionBlock([f"attention_{heads}"], [[0]], 1, width, 2)
        return
    with pytest.raises(UserError, match=f"^attention_{heads}: token_dim {width} is not a multiple of {heads}$"):
        InteractionBlock(["attention_1", f"attention_{heads}"], [[0]], 1, width, 2)


@settings(max_examples=examples(30), deadline=None)
@given(automtl_sizes())
def test_a_chosen_mlp_has_the_columns_of_the_widest_of_a_nested_block(size):
    """What a search shares between widths, written into a network of its own, gives the same numbers."""
    wide, x_SBH = randomised(MLP(size.N, size.H, ["2", "4"]), size.seed), rows(size, size.N, size.H).transpose(0, 1)
    state = wide.state_dict()
    own = {
        "hidden.weight_SDH": state["hidden.weight_SDH"][:, :, :2], "hidden.bias_SH": state["hidden.bias_SH"][:, :2],
        "out.weight_SDH": state["out.weight_SDH"][:, :2], "out.bias_SH": state["out.bias_SH"],
    }  # fmt: skip
    close(load(MLP(size.N, size.H, ["2"]), own).one(x_SBH, 0), wide.one(x_SBH, 0))
