"""The training loop: what happens in a step and after it, and how a run is restored, rolled back and ended."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from features.batch import Batch
from features.errors import Preempted, UserError
from features.schema.schema import Schema
from pipeline.dataset.dataset import Dataset
from pipeline.run import checkpoint
from pipeline.run.checkpoint import CheckpointManifest
from pipeline.run.checkpoint.writer import CheckpointWriter
from pipeline.run.owner import Owner
from pipeline.run.run import LostRunError, Run
from pipeline.run.tracking import registry as tracking
from pipeline.training.config import TrainConfig
from pipeline.training.faults.consensus import Consensus
from pipeline.training.faults.hang_watch import HangWatch, watch_ranks
from pipeline.training.faults.nonfinite import NonfiniteCheck
from pipeline.training.faults.preemption import PreemptionSignal
from pipeline.training.faults.rank_status import nodes, nodes_wait, restart_reason
from pipeline.training.faults.rollback import Rollbacks
from pipeline.training.learner import Learner, build_learner
from pipeline.training.loading import agreed, loader_of, why_gone
from pipeline.training.logging.meter import ThroughputMeter
from pipeline.training.logging.metrics_writer import MetricsWriter, tracked
from pipeline.training.logging.progressive import ProgressiveMetrics
from pipeline.training.observer import Observer
from pipeline.training.optim.dense import rate
from pipeline.training.parallel import process_group, shard
from pipeline.training.restore import emm_sources, resume, warm_start
from pipeline.training.state import TrainState
from pipeline.training.step import StepOutput

logger = logging.getLogger(__name__)
WRITE_TIMEOUT = timedelta(hours=2)  # a rank may wait that long for what another writes


class Trainer:
    """One rank's part of a run. Building one reads the dataset and places the model, and touches no run.

    Args:
        config: all settings, the sources of an EMM and the order of rows resolved. dataset: of the tasks that are trained.
        device: of the model. observers: called as the run proceeds.
    Attributes:
        state: how far the run has come. steps: of the whole run. build_learner: makes what takes the steps.
    """

    build_learner: Callable[..., Learner] = staticmethod(build_learner)

    def __init__(
        self, config: TrainConfig, dataset: Dataset, device: torch.device, observers: Sequence[Observer] = ()
    ) -> None:
        self.config, self.dataset, self.device, self.observers = config, dataset, device, observers
        self.settings = s = config.train
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.loader = loader_of(s, dataset, "train", self.rank, self.ranks, device)
        position = self.loader.start()
        self.epoch_steps = self.loader.steps(position)
        self.steps = min(s.epochs * self.epoch_steps, s.max_steps or s.epochs * self.epoch_steps)
        self.milestones = {max(1, round(share * self.steps)) for share in s.checkpoint_at}
        self.learner = self.build_learner(config, dataset, self.rank, device, self.steps, self.epoch_steps)
        self.state = TrainState(position, ProgressiveMetrics(dataset.schema.tasks, s.log_every, device))
        self.run = Run(config.run)
        self.nonfinite, self.rollbacks = NonfiniteCheck(s.nonfinite), Rollbacks(s.max_skipped)
        self.preemption = PreemptionSignal(log=self.rank == 0)
        self.consensus = Consensus(self._cpu_group(timedelta(seconds=2 * s.timeout)))
        self.sinks = tracking.Sinks()
        self.owner = Owner(self.run, s.keep, dataset.name, self.sinks)
        on_disk = self.owner.committed if self.rank == 0 else lambda *_: None
        group = self._cpu_group(WRITE_TIMEOUT)
        self.writer = CheckpointWriter(
            self.run.checkpoints, group, s.checkpoint_async, on_disk, self.owner.before_commit
        )
        self.metrics: MetricsWriter | None = None
        self.watch: HangWatch | None = None
        self.meter = ThroughputMeter(0, 0)

    def _cpu_group(self, timeout: timedelta) -> dist.ProcessGroup | None:
        return dist.new_group(backend="gloo", timeout=timeout) if self.ranks > 1 else None

    def restore(self, schema: Schema, pinned: ExitStack) -> None:
        """Resumes from the newest undamaged checkpoint, or begins the run.

        Args:
            schema: of the whole dataset. pinned: closed once the checkpoints of other runs are read.
        Raises:
            UserError: another trainer has the run, a checkpoint of another job, resume=never.
        """
        if self.rank == 0:
            self.owner.take()
            checkpoint.tidy(self.run.checkpoints)
        path = resume.newest(self.run)
        if path is not None and self.config.resume == "never":
            raise UserError(f"{self.run.path} has checkpoints. Choose another run=, or resume=auto to continue it.")
        config = self.config.model_dump(mode="json", by_alias=True)
        if path is not None:
            manifest = checkpoint.read(path)
            resume.check_compatible(path, manifest, self.manifest(0))
            self.load(path, manifest)
            ranks = f", written by {manifest.ranks} ranks" if manifest.ranks != self.ranks else ""
            self.log(f"resumed from {path}{ranks}")
            if changed := resume.changes(self.run.config(), config):
                self.log(f"changed since: {', '.join(changed)}")
        else:
            self.learner.init_tables()
            for line in emm_sources.load(self.learner.ranker, self.learner.state()["model"]):
                self.log(line)
            if self.settings.init_from:
                model, other = self.learner.state()["model"], Run(self.settings.init_from)
                self.log(warm_start.start(other, self.dataset, self.learner.ranker, model, pinned))
        dist.barrier()  # all have read the old configuration, and the checkpoints that the run starts from
        pinned.close()
        if self.rank == 0:
            self.run.create(config, schema)
            self.run.write_status("training", self.state.step, self.steps)
            reason = restart_reason() or ("resume" if path else "start")
            self.run.add_start(self.state.step, self.ranks, nodes(), reason)
            self.run.drop_lines_after(self.state.step)
        dist.barrier()
        self.meter = ThroughputMeter(self.state.rows_consumed(self.loader), self.state.step)

    def load(self, path: Path, manifest: CheckpointManifest) -> None:
        """Loads a checkpoint into state and learner."""
        self.state.take(manifest)
        self.state.progress.restore(path, manifest.rows, self.state.updates)
        self.learner.load(path, self.state.updates)

    def run_to_end(self) -> Run:
        """Trains to the last step, with metrics and checkpoints on the way."""
        with closing(self.owner):
            self._run_to_end()
        return self.run

    def _run_to_end(self) -> None:
        with self._session():
            for observer in self.observers:
                observer.on_start(self)
            if self.settings.nonfinite == "skip" and self.state.saved < 0:
                self.save()  # for a rollback before the first checkpoint
            while self.state.step < self.steps:
                self.train_segment()
                if self.state.step + 1 in self.state.skipped and self.state.step < self.steps:
                    self.advance()
                    self.after_step()
                if not self.loader.steps(self.state.position):
                    self.state.position = self.loader.start(self.state.position.epoch + 1)
            self.finish_writing()
        if self.metrics:
            self.metrics.close()
            self.run.write_status("finished", self.state.step, self.steps)

    def train_segment(self) -> None:
        """Trains to the end of the run or of the epoch, to the next batch that is skipped, or until a rollback."""
        state, learner = self.state, self.learner
        end = min([self.steps, *(step - 1 for step in state.skipped if step > state.step)])
        count = min(end - state.step, self.loader.steps(state.position))
        for batch in learner.feed(self._batches(count), count):
            output = learner.forward(batch, state.step)
            self.check_losses(output)
            norm = learner.backward()
            self.check_gradients(norm)
            learner.update()
            self.record(output)
            self.advance()
            for observer in self.observers:
                observer.on_step(self, output)
            if not self.after_step():
                return

    def after_step(self) -> bool:
        """Metrics, a checkpoint, and the end of a preempted run, where they are due. False after a rollback."""
        step, every, last = self.state.step, self.settings.checkpoint_every or self.epoch_steps, self.at_end()
        log_due = step % self.settings.log_every == 0 or step == 1 or last
        save_due = step % every == 0 or step in self.milestones or last
        check, read = partial(self.nonfinite.check, self.state.position.epoch), log_due or save_due
        ending = self.preemption.received or self.loader.gone is not None
        verdict = self.consensus.agree(ending, nodes_wait(), check, read, save_due)
        if verdict.bad_step is not None:
            self.rollback(verdict.bad_step)
            return False
        if log_due or save_due:
            self.owner.check()
        if log_due:
            self.write_metrics()
        if save_due:
            self.save()
        if verdict.stop and not last:
            self.stop()
        if save_due and verdict.joining and not last:
            self.let_nodes_join()
        return True

    def check_losses(self, output: StepOutput) -> None:
        """Checks a forward: on a CPU before the backward, which updates the tables; a GPU's is read when it arrives."""
        self.nonfinite.record_losses(self.state.step + 1, output)
        if self.device.type == "cpu":
            self.nonfinite.check(self.state.position.epoch)
        for observer in self.observers:
            observer.on_forward(self, output)

    def check_gradients(self, norm: torch.Tensor) -> None:
        """Checks a backward: on a CPU before the dense part is updated."""
        self.nonfinite.record_grad_norm(self.state.step + 1, norm)
        if self.device.type == "cpu":
            self.nonfinite.check(self.state.position.epoch)

    def record(self, output: StepOutput) -> None:
        """Adds a step to the progressive metrics."""
        self.state.progress.update(output)

    def advance(self) -> None:
        """Moves past a batch; at the end of a day or an epoch its progressive metrics are written."""
        state = self.state
        day = self.loader.day(state.position)
        state.step += 1
        state.position = self.loader.after(state.position)
        if self.loader.steps(state.position) and self.loader.day(state.position) == day:
            return
        figures, _ = state.progress.figures(state.progress.day_T3)
        state.progress.day_T3.zero_()
        record = {
            "epoch": state.position.epoch, "day": day, "step": state.step, "rows": state.progress.total_rows(),
        }  # fmt: skip
        if self.metrics:
            self.metrics.day(record | figures)

    def write_metrics(self) -> None:
        """Writes a record of the last steps. Every rank calls it."""
        state = self.state
        figures, sums_T3 = state.progress.figures(state.progress.window.sums_T3())
        rows = state.progress.total_rows()
        with shard.whole(self.learner.model):
            weight_T = self.learner.loss.weights().detach().cpu()
        if self.metrics is None:
            return
        consumed = state.rows_consumed(self.loader)
        rows_per_s, data_wait, step_s = self.meter.read(consumed, state.step)
        loss_T = sums_T3[:, 0] / sums_T3[:, 1].clamp(min=1e-30)
        self.metrics.log(
            {
                "step": state.step, "rows": rows, "left_out": consumed - rows,
                "epoch": state.position.epoch, "time": time.time(),
                "lr": rate(self.settings.dense, state.step - 1, self.learner.steps),
                "loss": float((loss_T * weight_T).sum()),
                "weight": dict(zip(self.dataset.schema.tasks, weight_T.tolist(), strict=True)),
                **figures,
                "rows_per_s": rows_per_s,
                "data_wait": data_wait,
                "seconds_left": step_s * (self.steps - state.step),
                **self.further_figures(),
            }
        )  # fmt: skip

    def further_figures(self) -> dict[str, object]:
        """What a record of the last steps has besides; rank 0 calls it."""
        return {}

    def rollback(self, bad_step: int) -> None:
        """Back to the newest checkpoint, from which the same steps are repeated without the batch of `bad_step`.

        To one before it if the run was rolled back to it already, and no batch could be trained on since.
        """
        self._enter("save")
        self.wait_for_writer()
        if self.nonfinite.bad and self.nonfinite.bad[0] == bad_step:
            logger.warning(self.nonfinite.bad[1])
        skipped = self.rollbacks.skip(bad_step, self.state.skipped)
        path = resume.newest(self.run, below=self.rollbacks.below(bad_step, self.state.skipped))
        if path is None:
            raise UserError(
                f"step {bad_step}: loss or gradient is not finite, and no undamaged checkpoint is left to roll back to. Lower "
                "train.dense.lr or train.tables.lr and start another run=."
            )
        self.load(path, checkpoint.read(path))
        self.rollbacks.tried.add(self.state.step)
        self.state.skipped |= skipped
        self.nonfinite.reset()
        self.consensus.collect()
        if self.metrics:
            self.owner.check(ask=True)
            self.run.drop_lines_after(self.state.step)
            self.metrics.roll_back(self.state.step)
            logger.warning(f"rolled back to step {self.state.step}, to skip the batch of step {bad_step}")
        self.meter = ThroughputMeter(self.state.rows_consumed(self.loader), self.state.step)

    def save(self) -> None:
        """Begins to write a checkpoint of this step, once the one before it is done."""
        self._enter("save")
        self.meter.pause()
        begin = time.perf_counter()
        self.wait_for_writer()
        state = self.learner.state() | {"progress": self.state.progress.state()}
        self.writer.save(state, self.manifest(self.state.progress.total_rows()))
        self.state.saved = self.state.step
        for observer in self.observers:
            observer.on_checkpoint(self, self.state.step, time.perf_counter() - begin)
        self.meter.resume()

    def manifest(self, rows: int) -> CheckpointManifest:
        """The manifest of a checkpoint of this step. rows: that all ranks have trained on."""
        return self.state.manifest(self.config, self.dataset, self.loader, self.ranks, rows)

    def wait_for_writer(self) -> bool:
        """Waits until nothing is being written; False, on all ranks, and a line where a checkpoint could not be written."""
        error = self.writer.wait()
        if isinstance(error, LostRunError):
            raise error
        if error and self.rank == 0:
            logger.warning(f"{error} Training continues, and retries with the next checkpoint.")
        return error is None

    def finish_writing(self) -> None:
        """Waits for the last checkpoint. Raises UserError where it cannot be written."""
        self._enter("save")
        if error := self.writer.wait():
            raise error

    def stop(self) -> None:
        """Ends a run that is preempted, or whose dataset's store is gone. Raises Preempted once its checkpoint is on disk."""
        if self.state.saved < self.state.step:
            self.save()
        self.finish_writing()
        if self.metrics:
            self.metrics.close()
            self.run.write_status("preempted", self.state.step, self.steps)
        path = checkpoint.folder(self.run.checkpoints, self.state.step)
        gone = why_gone(self.loader, self.consensus.group)
        why = "SIGTERM" if self.preemption.received else "another rank ends"
        raise Preempted(f"{gone} Saved {path}." if gone else f"{why}: saved {path}. Rerun the same command to resume.")

    def let_nodes_join(self) -> None:
        """Once the checkpoint is on disk, waits for the launcher to end this rank; at the next one if it cannot be written."""
        self._enter("save")
        if self.wait_for_writer():
            self.log(f"step {self.state.step}: saved, for nodes that wait to join")
            self.preemption.hold()

    def log(self, line: str) -> None:
        """A log line of rank 0."""
        if self.rank == 0:
            logger.info(line)

    @contextmanager
    def _session(self) -> Iterator[None]:
        """What runs beside the loop: metrics, the watch for hung ranks, the handler of SIGTERM."""
        own, self.watch = self.watch is None, self.watch or watch_ranks(self.settings.timeout)
        if self.ranks > 1:
            process_group.limit_waiting(2 * self.settings.timeout)  # the watch reports before it
        if self.at_end():
            self.log(f"{self.run.path} is at step {self.state.step} of {self.steps}: nothing to do")
        try:
            with self.preemption.handling(self.watch.expect_end), self._tracked():
                yield
        except BaseException as error:
            if isinstance(error, UserError) and not isinstance(error, LostRunError):
                self._enter("save")
                self.wait_for_writer()  # the other ranks are still there to write their parts
            if own:
                self.watch.stop(error)
            raise
        if own:
            self.watch.stop()

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        """Metrics of rank 0, and the sinks that get them."""
        if self.rank > 0:
            yield
            return
        writing = tracked(self.run, self.config, self.dataset, self.state.step, self.steps, self.sinks)
        with self.owner.writing(), writing as self.metrics:
            yield

    def at_end(self) -> bool:
        """Whether no step is left."""
        return self.state.step >= self.steps

    def _batches(self, count: int) -> Iterator[Batch]:
        """The next batches; the watch knows when they are waited for, and the meter how long."""
        batches = self.meter.timed(agreed(self.loader, self.state.position, count, self.consensus.group, self.stop))
        while True:
            self._enter("data")
            batch = next(batches, None)
            self._enter("step")
            if batch is None:
                return
            yield batch

    def _enter(self, phase: str) -> None:
        if self.watch:
            self.watch.enter(self.state.step + 1, phase)
