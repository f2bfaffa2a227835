"""Rep-MTL: its two terms against matrices written out row by row, and second derivatives through the dense part."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from references import weightings as paper
from tiny_training import assert_close, configuration, last, model
from torch import Tensor
from two_ranks import trainer

from features.batch import PADDING, Batch
from features.errors import UserError
from models.layers import rectified
from models.losses import TaskLoss
from models.ranker import ModelConfig, Ranker
from models.row_losses import GivenConfig
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.training.optim.weighting.base import EmbeddingLoss
from pipeline.training.optim.weighting.rep_mtl import RepMTLLoss
from pipeline.training.step import TrainStep
from pipeline.training.train import prepare

pytestmark = pytest.mark.usefixtures("device")

# Shapes: B rows, T tasks, E width.


@st.composite
def saliencies(draw) -> tuple[Tensor, int]:
    """saliency_BTE, 0 where a task is not observed, and the rows of a group."""
    group, groups, tasks = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    value_BTE = torch.randn(group * groups, tasks, draw(st.integers(1, 4)), generator=rng, dtype=torch.float64)
    return value_BTE * (torch.rand(*value_BTE.shape[:2], 1, generator=rng) > 0.25), group


def a_batch(weight_BT: Tensor, observed_BT: Tensor, padded: bool = False) -> SimpleNamespace:
    row_id_B = torch.full((len(weight_BT),), 3)
    row_id_B[-1] = PADDING if padded else 3
    return SimpleNamespace(weight_BT=weight_BT, observed_BT=observed_BT, row_id_B=row_id_B)


def terms(saliency_BTE: Tensor, loss: RepMTLLoss, padded: bool = False) -> tuple[Tensor, Tensor]:
    """The terms of losses <s_bt, z_b>, whose saliencies are those given, and weight_B over its sum."""
    rows, tasks, width = saliency_BTE.shape
    weight_B = 1 + torch.arange(rows, dtype=torch.float64) % 3 / 2
    z_BE = torch.zeros(rows, width, dtype=torch.float64, requires_grad=True)
    loss_BT = (saliency_BTE * z_BE.unsqueeze(1)).sum(2)
    seen_BT = (saliency_BTE.detach().abs().sum(2) > 0).double()
    batch = a_batch(weight_B.unsqueeze(1).expand(rows, tasks), seen_BT, padded)
    total_T1 = torch.full((tasks + 1,), weight_B.sum().item(), dtype=torch.float64)
    return loss.from_embeddings(None, z_BE, loss_BT, batch, total_T1), weight_B / weight_B.sum()


@settings(max_examples=examples(60), deadline=None)
@given(saliencies(), st.sampled_from([0.3, 1.0]))
def test_the_terms_and_their_derivatives_are_those_of_the_equations(drawn, temperature):
    saliency_BTE, group = drawn
    loss = RepMTLLoss([1.0] * saliency_BTE.shape[1], 0.7, 0.4, temperature, group)
    one, other = (saliency_BTE.clone().requires_grad_() for _ in range(2))
    found, weight_B = terms(one, loss)
    wanted = paper.rep_mtl(other, weight_B, group, 0.7, 0.4, temperature)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    if wanted.requires_grad:
        found_BTE, wanted_BTE = (torch.autograd.grad(value, leaf)[0] for value, leaf in ((found, one), (wanted, other)))
        torch.testing.assert_close(found_BTE, wanted_BTE.nan_to_num(0.0), rtol=1e-7, atol=1e-10)


def test_the_alignment_prefers_rows_whose_tasks_agree_and_differ_from_other_rows():
    loss = RepMTLLoss([1.0] * 2, 0.0, 1.0, 0.5, 2)
    agree, differ = torch.zeros(2, 2, 2).double(), torch.zeros(2, 2, 2).double()
    agree[0, :, 0] = agree[1, :, 1] = 1.0
    differ[:, 0, 0] = differ[:, 1, 1] = 1.0
    assert terms(agree, loss)[0] < terms(differ, loss)[0]


def test_a_batch_that_its_lanes_do_not_fill_has_no_alignment():
    loss = RepMTLLoss([1.0] * 2, 0.0, 1.0, 0.5, 4)
    saliency_BTE = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    assert terms(saliency_BTE, loss)[0] != 0
    assert terms(saliency_BTE, loss, padded=True)[0] == 0


@pytest.mark.parametrize(("lane_rows", "group", "wanted"), [(512, 128, 128), (12, 8, 6), (7, 5, 1), (3, 128, 3)])
def test_a_group_is_the_largest_that_divides_a_lane(lane_rows: int, group: int, wanted: int) -> None:
    loss = RepMTLLoss([1.0], 1.0, 1.0, 0.5, group)
    loss.attach([], 4 * lane_rows, 4)
    assert loss.group_rows == wanted


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 8, 12, 24, 48, 64])
def test_ranks_that_would_cut_groups_of_rows_are_refused(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    loss = RepMTLLoss([1.0], 1.0, 1.0, 0.5, 4)
    cut = any(48 * rank % (4 * ranks) for rank in range(ranks))  # 48 rows over 4 lanes: groups begin at multiples of 4
    with pytest.raises(UserError, match=f"{ranks} ranks cannot share: .* divides 12$") if cut else nullcontext():
        loss.attach([], 48, 4)


# Second derivatives


@pytest.mark.parametrize(("inputs", "stack"), [(1, 3), (3, 3), (2, 4)])
def test_rectified_products_have_second_derivatives(inputs: int, stack: int) -> None:
    rng = torch.Generator().manual_seed(2)
    shapes = [(inputs, 3, 4), (stack, 4, 2), (stack, 2)]
    leaves = [torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradgradcheck(rectified, leaves)


def test_first_derivatives_are_the_same_with_and_without_a_graph_of_them() -> None:
    leaves = [torch.randn(shape).requires_grad_() for shape in ((2, 5, 4), (4, 4, 3), (4, 3))]
    total = (rectified(*leaves) + 1).square().sum()
    plain = torch.autograd.grad(total, leaves, retain_graph=True)
    for one, other in zip(plain, torch.autograd.grad(total, leaves, create_graph=True), strict=True):
        torch.testing.assert_close(one, other)


FUSIONS: dict[str, dict[str, Any]] = {
    "mmoe": {"name": "mmoe", "num_experts": 3, "levels": [[8], [4]]},
    "attention": {"name": "shared_bottom", "widths": [8]},
}


@pytest.mark.parametrize("name", FUSIONS)
def test_a_steps_gradient_is_that_of_its_loss_by_finite_differences(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Dataset(folder / "data")
    torch.manual_seed(3)
    interaction = {"name": "attention", "layers": 1} if name == "attention" else {"name": "concat"}
    config = ModelConfig(fusion=FUSIONS[name], interaction=interaction, tower=[8], embedding_std=0.5)
    ranker = Ranker(data.schema, data.encoders, config, device="cpu").double()
    step = TrainStep(ranker, RepMTLLoss([1.0] * 3, 0.9, 0.9, 0.5, 4).double(), bf16=False)
    loader = Loader(data, "train", 8, 2, 0)
    batch = next(loader.batches(loader.start()))
    batch = Batch(**(vars(batch) | {"dense_BD": batch.dense_BD.double()}))
    # Pooled embeddings are float32, too coarse for finite differences.
    embedding_BE = ranker.embedded(batch).detach().double().requires_grad_()
    monkeypatch.setattr(ranker, "embedded", lambda _: embedding_BE)
    plain = TrainStep(ranker, TaskLoss([1.0] * 3).double(), bf16=False)
    assert (step(batch)[0] - plain(batch)[0]).abs() > 0.05
    parameters = [embedding_BE, *(p for n, p in ranker.named_parameters() if not n.startswith("embeddings."))]
    rng = torch.Generator().manual_seed(4)
    direction = [torch.randn(p.shape, generator=rng, dtype=torch.float64) for p in parameters]
    gradients = torch.autograd.grad(step(batch)[0], parameters, materialize_grads=True, allow_unused=True)
    found = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
    sides = []
    for sign in (1, -2, 1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += sign * 1e-6 * d
        sides.append(step(batch)[0].item())
    assert found == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5)


class Repeated(EmbeddingLoss):
    """Keeps what the dense part gives on the embeddings once more."""

    def from_embeddings(self, run, embedding_BE, loss_BT, batch, total_T1) -> float:
        self.first_BT, self.again_BT = loss_BT.detach(), run([p.detach() for p in self.shared]).detach()
        self.other_BT = run([2 * p.detach() for p in self.shared]).detach()
        return 0.0


def test_the_dense_part_runs_again_with_the_same_draws_and_other_parameters(folder: Path) -> None:
    data = Dataset(folder / "data")
    config = ModelConfig(fusion=FUSIONS["mmoe"], tower=[8], dropout=0.5, input_dropout=0.5, embedding_std=0.5)
    ranker = Ranker(data.schema, data.encoders, config, device="cpu")
    loss, loader = Repeated([1.0] * 3), Loader(data, "train", 8, 2, 0)
    loss.shared = [p for n, p in ranker.named_parameters() if n.startswith("fusion.")]
    before = [p.clone() for p in loss.shared]
    torch.manual_seed(9)
    TrainStep(ranker, loss, bf16=False)(next(loader.batches(loader.start())))
    torch.testing.assert_close(loss.again_BT, loss.first_BT, rtol=0, atol=0)
    assert (loss.other_BT - loss.first_BT).abs().max() > 1e-3
    assert all(torch.equal(p, q) for p, q in zip(loss.shared, before, strict=True))


@pytest.mark.parametrize("name", ["observed", "esmm"])
def test_a_run_with_both_terms_off_is_one_of_fixed_weights_also_over_all_impressions(folder: Path, name: str) -> None:
    states = []
    for weighting in ({"name": "rep_mtl", "regulation": 0, "alignment": 0}, {"name": "fixed"}):
        path = folder / f"{name}-{weighting['name']}"
        config = configuration(folder / "data", path, weighting=weighting, max_steps=5)
        of_given = config.model.model_copy(update={"given": GivenConfig(name=name)})
        prepare(config.model_copy(update={"model": of_given}), None, torch.device("cpu")).run_to_end()
        states.append(model(last(path)))
    assert_close(*states)


def test_settings_of_a_run_reach_the_loss(folder: Path) -> None:
    made = trainer(folder, "reach", weighting={"name": "rep_mtl", "group": 3})
    assert made.learner.loss.group_rows == 2  # 32 rows over 4 lanes
