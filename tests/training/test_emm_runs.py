"""EMM from single-task runs to a fused one: what is taken over, what is trained, what is kept, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from tiny_training import (
    SCHEMA,
    assert_close,
    assert_identical,
    last,
    losses,
    make_dataset,
    model,
    tensors,
    torchrun,
    write_checkpoint,
)
from torch import Tensor
from two_ranks_emm import SOURCES, STEPS, STOP, fused, source, stopped

from features.errors import UserError
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.scorer import Scorer
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.training.restore import emm_sources

pytestmark = pytest.mark.usefixtures("device")

CONF = Path(__file__).parents[2] / "jobs" / "conf"
ONE_EACH = ("click-b", "conversion", "dwell")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Path:
    """A dataset with a coded number and the trained single-task models."""
    path = tmp_path_factory.mktemp("emm")
    age = {"missing_flag": True, "piecewise": 4}
    make_dataset(path / "data", dense=SCHEMA["dense"] | {"age": age})
    for name in SOURCES:
        source(path, name).run_to_end()
    return path


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> Path:
    fused(folder, "one", train={"checkpoint_every": STOP}).run_to_end()
    fused(folder, "one-tuned", train={"checkpoint_every": STOP}, tables="tuned").run_to_end()
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Path:
    torchrun(str(Path(__file__).with_name("two_ranks_emm.py")), str(folder)).check_returncode()
    return folder


def start(folder: Path, name: str, **options: object) -> dict[str, Tensor]:
    """The weights before the first step."""
    write_checkpoint(fused(folder, name, **options))
    return model(last(folder / name))


def logits(folder: Path, name: str, split: str = "valid") -> Tensor:
    """What the scorer's model makes of a split in the run's newest checkpoint."""
    run = Run(folder / name)
    scorer = Scorer(run, Dataset(folder / "data"), split, 64)
    checkpoint.load(
        checkpoint.folder(run.checkpoints, checkpoint.steps(run.checkpoints)[-1]),
        {"model": scorer.ranker.state_dict()},
        alone=True,
    )
    with torch.no_grad():
        return torch.cat([scorer.ranker(batch) for batch in scorer.batches()])


def from_sources(name: str) -> bool:
    """Whether a tensor is one that a trained model brought and that is frozen."""
    return "@" in name or name.startswith("readers.") or ".components." in name


def test_one_model_a_task_without_the_merge_predicts_what_that_model_predicts(folder: Path) -> None:
    write_checkpoint(fused(folder, "alike", of=ONE_EACH, merge=False))
    found = logits(folder, "alike")
    scale = Dataset(folder / "data").encoders.labels["dwell"]
    assert (scale.mean, scale.std) != (
        0,
        1,
    )  # a regression source is learnt standardised, and answers in its label's unit
    for task, name in enumerate(ONE_EACH):
        torch.testing.assert_close(found[:, task], logits(folder, name)[:, 0], rtol=1e-5, atol=1e-6)


def test_networks_of_one_expert_a_level_can_be_fused_with_others(folder: Path) -> None:
    one_expert = {"levels": [[20], [32, 16]], "task_experts": 1, "shared_experts": 0}
    kinds = {
        "conversion-ple": {"name": "ple", **one_expert},
        "dwell-adatt": {"name": "adatt", "native": False, **one_expert},
        "click-mmoe-1": {"name": "mmoe", "num_experts": 1, "levels": [[32], [16]]},
    }
    for name, fusion in kinds.items():
        source(folder, name, {"fusion": fusion, "tower": [5]}, max_steps=3).run_to_end()
    write_checkpoint(fused(folder, "one-expert", of=tuple(kinds), merge=False))
    found = logits(folder, "one-expert")
    for name in kinds:
        task = ["click", "conversion", "dwell"].index(name.split("-")[0])
        torch.testing.assert_close(found[:, task], logits(folder, name)[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", ["esmm", "ipw", "dr"])
def test_conversions_may_be_learnt_over_all_impressions(folder: Path, given: str) -> None:
    towers = "new" if given == "dr" else "own"
    options = {"model": {"given": {"name": given}}, "towers": towers, "train": {"max_steps": 2}}
    fused(folder, given, **options).run_to_end()
    before, after = start(folder, f"start-{given}", **options), model(last(folder / given))
    assert {name for name, value in after.items() if torch.equal(value, before[name])} == set(
        filter(from_sources, after)
    )


@pytest.mark.parametrize("merge", [True, False])
def test_linear_projections_train(folder: Path, merge: bool) -> None:
    fused(folder, f"linear-{merge}", projection="linear", merge=merge, train={"max_steps": 2}).run_to_end()
    after = model(last(folder / f"linear-{merge}"))
    assert any(name.endswith("merge.project.weight_SDH") for name in after) == merge
    assert not any(name.endswith("merge.project.bias_SH") for name in after)


def test_each_source_brings_its_tables_its_codes_its_interaction_and_its_layers(folder: Path) -> None:
    found = start(folder, "start")
    for m, name in enumerate(SOURCES):
        theirs = model(last(folder / name))
        assert_identical(
            {key: value for key, value in found.items() if f"@{m}." in key},
            {
                key.replace(".weight", f"@{m}.weight"): value
                for key, value in theirs.items()
                if key.startswith("embeddings.")
            },
        )
        assert_identical(
            {key.removeprefix(f"readers.{m}."): v for key, v in found.items() if key.startswith(f"readers.{m}.")},
            {key: value for key, value in theirs.items() if key.startswith(("numbers.", "interaction."))},
        )
        layers = [v for key, v in theirs.items() if "layers." in key and not key.startswith("interaction.")]
        ours = [value for key, value in found.items() if f".components.{m}." in key]
        if name != "click-b":  # the second model of its task: what is above its last cut is not used
            task = ["click", "conversion", "dwell"].index(name.split("-")[0])
            ours += [value for key, value in found.items() if key.startswith(f"towers.tasks.{task}.hidden")]
            for part in ("weight_SDH", "bias_SH"):
                assert torch.equal(found[f"towers.tasks.{task}.out.{part}"], theirs[f"towers.out.{part}"])
            assert len(ours) == len(layers)
        for our, their in zip(ours, layers, strict=False):
            assert torch.equal(our, their)


def test_what_is_frozen_stays_to_the_last_bit_and_all_else_moves(folder: Path, one_rank: Path) -> None:
    before, after = start(folder, "start-again"), model(last(one_rank / "one"))
    assert any(from_sources(name) for name in after)
    for name, value in after.items():
        if from_sources(name):
            assert torch.equal(value, before[name]), name
        else:
            assert not torch.equal(value, before[name]), name


def test_tuned_tables_move_and_components_do_not(folder: Path, one_rank: Path) -> None:
    before, after = start(folder, "start-tuned", tables="tuned"), model(last(one_rank / "one-tuned"))
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (".components." in name), name


def test_new_tables_are_one_set_for_all_models(folder: Path) -> None:
    of = ("click-a", "conversion-plain", "dwell-plain")
    for name in of[1:]:
        source(folder, name, SOURCES["click-a"]).run_to_end()
    fused(folder, "new", of, tables="new").run_to_end()
    before, after = start(folder, "start-new", of=of, tables="new"), model(last(folder / "new"))
    assert not any("@" in name for name in after)
    still = {n for n, value in after.items() if torch.equal(value, before[n])}
    # With one model a task, its gate has nothing to choose.
    assert still == {n for n in after if ".components." in n or (n.endswith("gate.weight_SDH") and ".merge." not in n)}


@pytest.mark.parametrize("towers", ["own", "new"])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_every_ablation_trains_and_without_trained_weights_nothing_is_frozen(
    folder: Path, trained: bool, merge: bool, towers: str
) -> None:
    name = f"ablation-{trained}-{merge}-{towers}"
    before = start(folder, f"start-{name}", trained=trained, merge=merge, towers=towers)
    fused(folder, name, trained=trained, merge=merge, towers=towers, train={"max_steps": 3}).run_to_end()
    after = model(last(folder / name))
    assert any(".merge." in n for n in after) == merge
    still = {n for n, value in after.items() if torch.equal(value, before[n])}
    assert still == ({n for n in after if from_sources(n)} if trained else set())


def test_the_scorer_needs_no_source(folder: Path, one_rank: Path) -> None:
    wanted = logits(one_rank, "one")
    for name in SOURCES:
        (folder / name).rename(folder / f"away-{name}")
    try:
        assert torch.equal(logits(one_rank, "one"), wanted)
        scorer = Scorer(Run(folder / "one"), Dataset(folder / "data"), "valid", 64)
        assert scorer.evaluate(STOP)["metrics"]["click"]["auc"] is not None
    finally:
        for name in SOURCES:
            (folder / f"away-{name}").rename(folder / name)


def test_a_run_goes_on_without_its_sources_as_if_it_had_not_stopped(folder: Path, one_rank: Path) -> None:
    stopped(folder, "one", "resumed")
    for name in SOURCES:
        (folder / name).rename(folder / f"away-{name}")
    try:
        fused(folder, "resumed", train={"checkpoint_every": STOP}).run_to_end()
    finally:
        for name in SOURCES:
            (folder / f"away-{name}").rename(folder / name)
    assert_identical(last(folder / "resumed"), last(one_rank / "one"))


def test_a_source_that_goes_on_does_not_delete_what_is_fused_before_it_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint.folder(shutil.copytree(folder / "click-a", tmp_path / "click-a") / "checkpoints", STEPS)
    load, removed = emm_sources.load, []

    def pruned(*arguments: object) -> list[str]:
        removed.append(checkpoint.remove(path))
        return load(*arguments)

    monkeypatch.setattr(emm_sources, "load", pruned)
    fused(folder, str(tmp_path / "run"), of=(str(tmp_path / "click-a"),), tasks=["click"])
    assert removed == [False]
    assert checkpoint.remove(path)  # nobody holds it any more


def test_a_source_may_be_an_earlier_checkpoint(folder: Path) -> None:
    source(folder, "click-twice", SOURCES["click-a"], checkpoint_every=STOP).run_to_end()
    found = start(folder, "early", of=(f"click-twice@{STOP}",), tasks=["click"])
    early = model(tensors(checkpoint.folder(folder / "click-twice" / "checkpoints", STOP)))
    assert torch.equal(found["embeddings.embedding_bags.user@0.weight"], early["embeddings.embedding_bags.user.weight"])


@pytest.mark.system
@pytest.mark.parametrize("placement", ["table_wise", "row_wise"])
@pytest.mark.parametrize("kind", ["", "-tuned"])
def test_two_ranks_train_what_one_rank_trains(two_ranks: Path, one_rank: Path, kind: str, placement: str) -> None:
    other = two_ranks / f"two{kind}-{placement}"
    assert losses(other) == pytest.approx(losses(one_rank / f"one{kind}"), rel=1e-3)
    assert_close(last(other), last(one_rank / f"one{kind}"), rtol=5e-3, atol=5e-4)


@pytest.mark.system
def test_two_ranks_share_the_reading_of_the_checkpoints_that_they_are_fused_from(two_ranks: Path) -> None:
    checked = [json.loads((two_ranks / f"checked.{rank}.json").read_text()) for rank in range(2)]
    files = [
        f"{name}/checkpoints/step-{STEPS:08d}/{file}" for name in SOURCES for file in ("rank-00000.bin", "tensors.json")
    ]
    assert checked == [files[::2], files[1::2]]


@pytest.mark.system
def test_two_ranks_start_from_the_same_weights_resume_and_run_pipelined(two_ranks: Path, one_rank: Path) -> None:
    assert_identical(model(last(two_ranks / "two-start")), start(two_ranks, "one-start"))
    assert_identical(last(two_ranks / "two-resumed"), last(two_ranks / "two-table_wise"))
    assert_close(last(two_ranks / "two-pipelined"), last(two_ranks / "two-table_wise"), rtol=1e-4, atol=1e-5)


def test_the_recipe_of_the_papers_experiments_leaves_tables_and_towers_of_the_sources_behind(folder: Path) -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        paths = [f"dataset={folder / 'data'}", f"run={folder / 'paper'}"]
        sources = compose("train", [*paths, "model=single_task", "recipe=emm_census_sources"])
        whole = compose("train", [*paths, "model=emm", "model.from=[a]", "recipe=emm_census"])
    fusion = {"name": "emm", "trained": True, "merge": True, "projection": "linear", "tables": "new", "towers": "new"}
    assert whole.model.fusion == fusion
    assert whole.train == sources.train
    assert whole.model.tower == sources.model.tower == [8]
    assert whole.train.dense.weight_decay == 1e-6


@pytest.mark.system
def test_the_command_line_does_all_of_it(folder: Path, tmp_path: Path) -> None:
    emm_sources = ",".join(str(folder / name) for name in SOURCES)
    command = [
        sys.executable, "-m", "jobs.train", f"dataset={folder / 'data'}", "model=emm", f"model.from=[{emm_sources}]",
        f"run={tmp_path / 'run'}", "train.max_steps=2", "train.batch_size=32", "train.lanes=4", "train.threads=1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "fuses 4 models in 2 levels:" in done.stderr
    assert "click-b (click), step 20: 24-32 | 16-16 | 5" in done.stderr


REFUSED = {
    "no source": ((), {}, r"model.from: no model of click, conversion, dwell among"),
    "a task without one": (("click-a", "dwell"), {}, r"no model of conversion among .* leave the task out with tasks"),
    "no run": (("nothing",), {}, r"nothing: no run"),
    "no checkpoint of that step": (("click-a@7",), {}, r"has no checkpoint of step 7"),
    "several tasks": (("several",), {}, r"was trained for click, dwell; a source has one task"),
    "another fusion": (
        ("click-mmoe",),
        {},
        r"fusion mmoe; a source is a plain chain .*with one expert",
    ),
    "tokens": (("click-apem",), {}, r"has fusion apem; a source is a plain chain of layers"),
    "calibration": (("click-calibrated",), {}, r"has calibration monotone; a source has none"),
    "layers of another kind": (
        ("click-gelu",),
        {},
        r"has experts {activation: gelu}; a source's layers are linear and ReLU",
    ),
    "a task that is not trained": (("dwell",), {"tasks": ["click"]}, r"was trained for dwell, which is none of"),
    "nothing in common": (
        ("click-a", "conversion", "dwell-small"),
        {},
        r"no layer below .*dwell-small",
    ),
    "an interaction of its own": (ONE_EACH, {"model": {"interaction": {"name": "dot"}}}, r"the trained models bring"),
    "a tower of one more number": (
        ONE_EACH,
        {"model": {"given": {"name": "dr"}}},
        r"needs a number of conversion's tower",
    ),
    "an unknown projection": (ONE_EACH, {"projection": "tanh"}, r"model.fusion.projection: Input should be 'relu' or"),
    "an unknown setting": (ONE_EACH, {"depth": 3}, r"model.fusion.depth: Extra inputs"),
}


@pytest.fixture(scope="module")
def odd_sources(folder: Path) -> Path:
    """Runs that cannot be fused, with a checkpoint of the start."""
    plain = SOURCES["click-a"]
    write_checkpoint(source(folder, "click-mmoe", {"fusion": {"name": "mmoe", "num_experts": 2, "levels": [[32, 16]]}}))
    write_checkpoint(source(folder, "click-apem", {"fusion": {"name": "apem", "widths": [16]}}))
    write_checkpoint(source(folder, "click-calibrated", plain | {"calibration": "monotone"}))
    gelu = plain["fusion"] | {"experts": {"activation": "gelu", "dropout": 0.1}}
    write_checkpoint(source(folder, "click-gelu", plain | {"fusion": gelu}))
    write_checkpoint(
        source(folder, "dwell-small", plain | {"fusion": {"name": "single_task", "widths": [4]}, "tower": []})
    )
    write_checkpoint(source(folder, "click-several", plain))
    (folder / "click-several").rename(folder / "several")
    (folder / "several" / "config.yaml").write_text(
        (folder / "several" / "config.yaml").read_text().replace("- click\n", "- click\n- dwell\n")
    )
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fused_is_refused_in_one_line(odd_sources: Path, tmp_path: Path, case: str) -> None:
    of, options, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as refused:
        fused(odd_sources, str(tmp_path / "refused"), of, **options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "refused" / "config.yaml").exists()


def test_models_of_another_dataset_are_refused(folder: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", rows=400)
    write_checkpoint(source(tmp_path, "click-a"))
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(folder / "data", tmp_path / "data")
    with pytest.raises(UserError, match=r"was trained on rows of encoders .* its ids mean something else"):
        fused(tmp_path, "other", ("click-a",), tasks=["click"])


def test_other_fusions_take_no_trained_models(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.from: only fusion emm is made of other runs"):
        fused(folder, str(tmp_path / "run"), model={"fusion": {"name": "shared_bottom", "widths": [8]}})
