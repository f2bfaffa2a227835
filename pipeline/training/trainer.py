"""The trainer: from a dataset and a configuration to a run directory, on any number of ranks."""

import os
import time
from collections.abc import Iterator
from itertools import islice
from math import isnan
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed import TrainPipelineSparseDist

from features.batch import Batch
from features.errors import UserError
from features.schema import Schema
from models.emm import build_ranker
from pipeline import checkpoint
from pipeline.dataset import open_dataset
from pipeline.evaluation.metrics import WindowedNE
from pipeline.loader import Loader, Position
from pipeline.run import Run, config_hash, keep_lines
from pipeline.training import distribution, initial, optimizer, sources, weighting
from pipeline.training.config import TrainConfig
from pipeline.training.report import Reporter
from pipeline.training.step import StepOutput, TrainStep


def train(config: TrainConfig, schema: Schema | None = None) -> Run:
    """Trains a run to its end, from its newest whole checkpoint where it has one.

    Args:
        config: all settings.
        schema: if given, the dataset must have been written for it.
    Raises:
        UserError: bad input, or a loss that is not finite.
    """
    device = distribution.start()
    trainer = None
    try:
        trainer = Trainer(config, schema, device)
        run = trainer.run_to_end()
        dist.destroy_process_group()
        return run
    except BaseException:
        if trainer is not None and trainer.rank == 0:
            trainer.run.say("failed", trainer.step, trainer.steps)
        if dist.get_world_size() == 1:
            dist.destroy_process_group()  # others would see the connection break before this rank has said why
        raise


class Trainer:
    """One rank's part of a run: dataset, model, optimisers and position, built in that order."""

    def __init__(self, config: TrainConfig, schema: Schema | None, device: torch.device) -> None:
        self.config, self.settings, self.device = config, config.train, device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(self.settings.threads or max(1, len(os.sched_getaffinity(0)) // local))
        whole = open_dataset(config.dataset, config.days)
        if schema is not None:
            whole.expect(schema.fingerprint, "the schema of this job")
        self.dataset = whole.only(config.tasks)
        self.schema, self.whole_schema = self.dataset.schema, whole.schema
        self.config = config = sources.resolved(config, self.dataset)
        s = self.settings
        self.loader = Loader(
            self.dataset, "train", s.batch_size, s.lanes, s.seed, self.rank, self.ranks, window=s.window
        )
        self.position = self.loader.start()
        self.step = 0
        self.steps = s.epochs * self.loader.steps(self.position)
        self.epoch_steps = self.steps // s.epochs
        self.steps = min(self.steps, s.max_steps or self.steps)
        self.milestones = {max(1, round(share * self.steps)) for share in s.checkpoint_at}
        self._build()
        self.run = Run(config.run)
        self._restore()

    def _build(self) -> None:
        s = self.settings
        torch.manual_seed(s.seed)  # the dense start is the same on every rank
        self.ranker = ranker = build_ranker(self.schema, self.dataset.encoders, self.config.model)
        self.loss = weighting.task_loss(s, self.schema.tasks)
        step = TrainStep(ranker, self.loss, bf16=s.precision == "bf16")
        tables = ranker.embeddings.embedding_bag_configs()
        self.model = distribution.shard(step, ranker, s, self.device)
        distribution.init_tables(ranker.embeddings, tables, s.seed, self.config.model.embedding_std)
        named = self.model.named_parameters()
        dense = [(n, p) for n, p in named if not n.startswith("ranker.embeddings.") and p.requires_grad]
        self.dense = optimizer.build(s.dense, dense, s.clip_norm)
        self.gradient_loss = self.loss if isinstance(self.loss, weighting.GradientLoss) else None
        if self.gradient_loss:
            self.gradient_loss.shared = weighting.shared_parameters(ranker, dense)

    def _state(self) -> dict[str, Any]:
        """Every tensor of a checkpoint, as views: loading fills them in place."""
        return {
            "model": {name.removeprefix("ranker."): value for name, value in self.model.state_dict().items()},
            "tables": self.model.fused_optimizer.state_dict()["state"],
            "dense": self.dense.state_dict()["state"],
        }

    def _restore(self) -> None:
        """Goes on from the newest checkpoint that is whole, as rank 0 sees it: ranks must not choose differently."""
        if self.rank == 0:
            self.lock = self.run.lock("train", "another trainer writes to it")
        choice = [self._newest() if self.rank == 0 else None]
        dist.broadcast_object_list(choice)
        if (step := choice[0]) is not None:
            path = checkpoint.folder(self.run.checkpoints, step)
            manifest = checkpoint.read(path)
            self._expect(manifest, path)
            checkpoint.load(path, self._state())
            self.step, self.position = manifest.step, Position(manifest.epoch, manifest.cursors)
            distribution.set_step(self.model, self.step)
            self._tell(f"goes on from {path}")
        else:
            for line in sources.load(self.ranker, self._state()["model"]):
                self._tell(line)
            if self.settings.init_from:
                self._start_from(Run(self.settings.init_from))
        if self.rank == 0:
            self.run.create(self.config.model_dump(mode="json", by_alias=True), self.whole_schema)
            self.run.say("training", self.step, self.steps)
            keep_lines(self.run.train_metrics, self.step)
        dist.barrier()

    def _start_from(self, run: Run) -> None:
        """Takes the weights of another run, of its optimisers and its task weighting nothing."""
        path = initial.newest(run, self.dataset, "train.init_from")
        weights = {n: t for n, t in self._state()["model"].items() if not n.startswith("loss.")}
        afresh = initial.load(path, weights)
        more = f" and {len(afresh) - 3} more" if len(afresh) > 3 else ""
        self._tell(f"starts from {path}" + (f"; not in it: {', '.join(afresh[:3])}{more}" if afresh else ""))

    def _newest(self) -> int | None:
        """The newest checkpoint whose files fit its manifest; says which ones do not."""
        found = checkpoint.steps(self.run.checkpoints)
        if found and self.config.resume == "never":
            raise UserError(f"{self.run.path} has checkpoints. Choose another run=, or resume=auto to go on with it.")
        for step in reversed(found):
            try:
                checkpoint.check(checkpoint.folder(self.run.checkpoints, step))
                return step
            except UserError as error:
                self._tell(f"skipped a checkpoint: {error}")
        return None

    def _expect(self, manifest: checkpoint.CheckpointManifest, path: os.PathLike) -> None:
        shape = config_hash(self.config.shape())
        for what, theirs, ours in (
            ("schema", manifest.fingerprint, self.schema.fingerprint),
            ("model and optimisers", manifest.config, shape),
            ("train.seed", manifest.seed, self.settings.seed),
            ("train.lanes", len(manifest.cursors), self.settings.lanes),
            ("train.window", manifest.window, self.settings.window),
            ("train.batch_size", manifest.batch_size, self.settings.batch_size),
            ("train rows", manifest.data, self._data()),
            ("encoders", manifest.encoders, self.dataset.encoders_id),
        ):
            if theirs != ours:
                raise UserError(f"{path} has {what} {theirs}, this job has {ours}. Use the same, or another run=.")

    def run_to_end(self) -> Run:
        """Steps until the last, with metrics and checkpoints on the way."""
        kinds = [(name, task.kind) for name, task in self.schema.tasks.items()]
        window = WindowedNE(kinds, self.settings.log_every, self.device)
        self.reporter = Reporter(self.run, list(self.schema.tasks), self.step, self.steps) if self.rank == 0 else None
        every = self.settings.checkpoint_every or self.epoch_steps
        meter = _Meter(self._rows(), self.step)
        while self.step < self.steps:
            batches = islice(self.loader.batches(self.position), self.steps - self.step)
            for output in self._outputs(meter.timed(batches)):
                self.step += 1
                self.position = self.loader.after(self.position)
                window.update(*output[:4])
                if self.step % self.settings.log_every == 0 or self.step in (1, self.steps):
                    self._check_finite(output, self.step)
                    self._log(window, meter)
                if self.step % every == 0 or self.step == self.steps or self.step in self.milestones:
                    self._check_finite(output, self.step)
                    meter.pause()
                    self._save()
                    meter.go_on()
            if not self.loader.steps(self.position):
                self.position = self.loader.start(self.position.epoch + 1)
        if self.reporter:
            self.reporter.close()
            self.run.say("finished", self.step, self.steps)
        return self.run

    def _outputs(self, batches: Iterator[Batch]) -> Iterator[StepOutput]:
        """Takes a step a batch: TorchRec's pipeline where there is a GPU to overlap with, a plain loop elsewhere."""
        pipelined = self.settings.pipelined
        if pipelined if pipelined is not None else self.device.type == "cuda" and not self.gradient_loss:
            pipeline = TrainPipelineSparseDist(self.model, self.dense, self.device, execute_all_batches=True)
            while True:
                self._prepare()
                try:
                    yield pipeline.progress(batches)
                except StopIteration:
                    return
        for batch in batches:
            self._prepare()
            self.dense.zero_grad()
            loss, output = self.model(batch.to(self.device) if self.device.type != "cpu" else batch)
            if self.device.type == "cpu":
                # Before the backward, which updates the tables: nothing is spoilt. A GPU would have to wait for the check.
                self._check_finite(output, self.step + 1)
            loss.backward()
            if self.gradient_loss:
                self.gradient_loss.after_backward(self.step)
            self.dense.step()
            yield output

    def _prepare(self) -> None:
        """Learning rate and random state of the step, both functions of its number."""
        torch.manual_seed((self.settings.seed * 1_000_003 + self.step) * 4099 + self.rank)
        for group in self.dense.param_groups:
            group["lr"] = optimizer.rate(self.settings.dense, self.step, self.steps)

    def _check_finite(self, output: StepOutput, step: int) -> None:
        # Unobserved labels too: a gradient of 0 times infinity is not 0.
        bad_B = ~output.loss_BT.isfinite().all(1)
        if bad_B.any():
            rows = output.row_id_B[bad_B]
            raise UserError(
                f"step {step}, epoch {self.position.epoch}: the loss of {len(rows)} rows of the batch is not finite, "
                f"row_id {', '.join(map(str, rows[:3].tolist()))}. Checkpoints before it are good. Lower train.dense.lr or "
                "train.tables.lr, set train.clip_norm, or mend these rows."
            )

    def _rows(self) -> int:
        return self.position.epoch * self.loader.rows + sum(self.position.cursors)

    def _log(self, window: WindowedNE, meter: "_Meter") -> None:
        sums_T3 = window.sums_T3()
        if self.ranks > 1:
            dist.all_reduce(sums_T3)
        if self.reporter is None:
            return
        sums_T3 = sums_T3.cpu()
        values = {n: None if isnan(v) else v for n, v in zip(self.schema.tasks, window.value(sums_T3), strict=True)}
        binary = {name for name, task in self.schema.tasks.items() if task.kind == "binary"}
        rows = self._rows()
        rows_per_s, data_wait, step_s = meter.read(rows, self.step)
        loss_T = sums_T3[:, 0] / sums_T3[:, 1].clamp(min=1e-30)
        weight_T = self.loss.weights().detach().cpu()
        self.reporter.log(
            {
                "step": self.step,
                "rows": rows,
                "epoch": self.position.epoch,
                "time": time.time(),
                "lr": optimizer.rate(self.settings.dense, self.step - 1, self.steps),
                "loss": float((loss_T * weight_T).sum()),
                "weight": dict(zip(self.schema.tasks, weight_T.tolist(), strict=True)),
                "ne": {name: value for name, value in values.items() if name in binary},
                "mse": {name: value for name, value in values.items() if name not in binary},
                "rows_per_s": rows_per_s,
                "data_wait": data_wait,
                "seconds_left": step_s * (self.steps - self.step),
            }
        )

    def _save(self) -> None:
        manifest = checkpoint.CheckpointManifest(
            step=self.step,
            rows=self._rows(),
            epoch=self.position.epoch,
            cursors=self.position.cursors,
            seed=self.settings.seed,
            window=self.settings.window,
            batch_size=self.settings.batch_size,
            data=self._data(),
            fingerprint=self.schema.fingerprint,
            encoders=self.dataset.encoders_id,
            config=config_hash(self.config.shape()),
        )
        checkpoint.save(self.run.checkpoints, self._state(), manifest)

    def _data(self) -> str:
        """What identifies the rows that are trained on, whatever the folder is called."""
        return config_hash([shard.sha256 for shard in self.loader.shards])

    def _tell(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


class _Meter:
    """Rows a second and the share of time spent waiting for data since the last reading; pauses do not count."""

    def __init__(self, rows: int, step: int) -> None:
        self.rows, self.step = rows, step
        self.seconds = self.waited = 0.0
        self.go_on()

    def go_on(self) -> None:
        self.begin = time.perf_counter()

    def pause(self) -> None:
        self.seconds += time.perf_counter() - self.begin

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def read(self, rows: int, step: int) -> tuple[float, float, float]:
        """Rows a second, share of time waited, seconds a step."""
        self.pause()
        seconds = max(self.seconds, 1e-9)
        reading = (rows - self.rows) / seconds, self.waited / seconds, seconds / max(step - self.step, 1)
        self.rows, self.step, self.seconds, self.waited = rows, step, 0.0, 0.0
        self.go_on()
        return reading
