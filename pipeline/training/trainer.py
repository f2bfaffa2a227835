"""The training loop: what happens at which step, and how a run ends, goes back, or goes on."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from features.batch import Batch
from features.errors import Preempted, UserError
from features.schema.schema import Schema
from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.loader import Loader, Position
from pipeline.run import checkpoint, retention
from pipeline.run.checkpoint import CheckpointManifest
from pipeline.run.checkpoint.writer import Saver
from pipeline.run.run import Run, config_hash, keep_lines
from pipeline.training.config import TrainConfig
from pipeline.training.faults.consensus import Agreement, Verdict
from pipeline.training.faults.hang_watch import Watch
from pipeline.training.faults.nonfinite import Finite
from pipeline.training.faults.preemption import Notice
from pipeline.training.learner import Learner
from pipeline.training.logging.meter import Meter
from pipeline.training.logging.metrics_writer import Reporter
from pipeline.training.logging.progressive import Progress
from pipeline.training.optim import dense
from pipeline.training.parallel import process_group, shard
from pipeline.training.restore import emm_sources, resume, warm_start
from pipeline.training.step import StepOutput

WRITING = timedelta(hours=2)  # a rank may wait that long for what another writes


def train(config: TrainConfig, schema: Schema | None = None) -> Run:
    """Trains a run to its end, from its newest whole checkpoint where it has one.

    Args:
        config: all settings.
        schema: if given, the dataset must have been written for it.
    Raises:
        UserError: bad input, a loss that is not finite, or another rank that is gone.
        Preempted: told to end by SIGTERM, after a checkpoint.
    """
    device = process_group.start()
    trainer = None
    try:
        trainer = Trainer(config, schema, device)
        run = trainer.run_to_end()
        dist.destroy_process_group()
        return run
    except BaseException as error:
        if trainer is not None and trainer.rank == 0 and not isinstance(error, (Preempted, SystemExit)):
            trainer.run.write_status("failed", trainer.step, trainer.steps)
        if dist.get_world_size() == 1 or isinstance(error, (Preempted, SystemExit)):
            dist.destroy_process_group()  # others would see the connection break before this rank has said why
        elif isinstance(error, RuntimeError) and (met := process_group.lost_contact(error)):
            where = f"step {trainer.step + 1}" if trainer else "at the start"
            raise UserError(
                f"{where}: contact with another rank was lost ({met}). If it failed, it says why. "
                "torchrun --max-restarts=N goes on from the newest checkpoint."
            ) from None
        raise


class Trainer:
    """One rank's part of a run: dataset, model, optimisers and position, built in that order."""

    def __init__(self, config: TrainConfig, schema: Schema | None, device: torch.device) -> None:
        self.settings, self.device = config.train, device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(self.settings.threads or max(1, len(os.sched_getaffinity(0)) // local))
        whole = open_dataset(config.dataset, config.days)
        if schema is not None:
            whole.check_compatible(schema.fingerprint, "the schema of this job")
        self.dataset = whole.only(config.tasks)
        self.schema, self.whole_schema = self.dataset.schema, whole.schema
        self.held = ExitStack()  # checkpoints of other runs that this one starts from
        self.config = emm_sources.resolved(config, self.dataset, self.held)
        s = self.settings
        self.loader = Loader(
            self.dataset, "train", s.batch_size, s.lanes, s.seed, self.rank, self.ranks, window=s.window,
            max_corrupt=s.max_corrupt if s.corrupt == "skip" else 0,
        )  # fmt: skip
        self.position = self.loader.start()
        self.step, self.saved = 0, -1
        self.epoch_steps = self.loader.steps(self.position)
        self.steps = min(s.epochs * self.epoch_steps, s.max_steps or s.epochs * self.epoch_steps)
        self.milestones = {max(1, round(share * self.steps)) for share in s.checkpoint_at}
        self.learner = Learner(self.config, self.dataset, self.rank, device, self.steps)
        self.progress = Progress(self.schema.tasks, s.log_every, device)
        self.run = Run(config.run)
        self.skipped: set[int] = set()
        self.finite = Finite()
        self.bad: tuple[int, str] | None = None  # the first step that cannot be learnt from, and why
        self.tried: set[int] = set()  # checkpoints that the run has gone back to
        limit = timedelta(seconds=2 * s.timeout)
        control = dist.new_group(backend="gloo", timeout=limit) if self.ranks > 1 else None
        writing = dist.new_group(backend="gloo", timeout=WRITING) if self.ranks > 1 else None
        self.agreement, self.notice = Agreement(control), Notice(self.rank == 0)
        prune = partial(retention.prune, self.run, s.keep, self.dataset.name) if self.rank == 0 else lambda _: None
        self.saver = Saver(self.run.checkpoints, writing, s.checkpoint_async, prune)
        self.reporter: Reporter | None = None
        self.watch: Watch | None = None
        self._restore()
        self.meter = Meter(self._passed(), self.step)

    def _restore(self) -> None:
        """Goes on from the newest checkpoint that is whole, or begins."""
        if self.rank == 0:
            self.lock = self.run.lock("train", "another trainer writes to it")
            checkpoint.tidy(self.run.checkpoints)
        path = resume.newest(self.run, self._tell)
        if path is not None and self.config.resume == "never":
            raise UserError(f"{self.run.path} has checkpoints. Choose another run=, or resume=auto to go on with it.")
        config = self.config.model_dump(mode="json", by_alias=True)
        if path is not None:
            manifest = checkpoint.read(path)
            resume.check_compatible(path, manifest, self._manifest(0))
            self._load(path, manifest)
            ranks = f", written by {manifest.ranks} ranks" if manifest.ranks != self.ranks else ""
            self._tell(f"goes on from {path}{ranks}")
            if changed := resume.changes(self.run.config(), config):
                self._tell(f"changed since: {', '.join(changed)}")
        else:
            for line in emm_sources.load(self.learner.ranker, self.learner.state()["model"]):
                self._tell(line)
            if self.settings.init_from:
                model, other = self.learner.state()["model"], Run(self.settings.init_from)
                self._tell(warm_start.start(other, self.dataset, model, self.held))
        dist.barrier()  # all have read the old configuration, and what the run starts from
        self.held.close()
        if self.rank == 0:
            self.run.create(config, self.whole_schema)
            self.run.write_status("training", self.step, self.steps)
            self._forget()
        dist.barrier()

    def _load(self, path: Path, manifest: CheckpointManifest) -> None:
        self.step, self.position = manifest.step, Position(manifest.epoch, manifest.cursors)
        self.saved, self.skipped = self.step, set(manifest.skipped)
        updates = self.step - sum(step <= self.step for step in self.skipped)
        self.progress.restore(path, manifest.rows, updates)
        self.learner.load(path, updates)

    def _forget(self) -> None:
        """Takes the lines of steps back that will be taken again."""
        for lines in (self.run.train_metrics, self.run.progressive):
            keep_lines(lines, self.step)

    def run_to_end(self) -> Run:
        """Steps until the last, with metrics and checkpoints on the way."""
        if self.rank == 0:
            self.reporter = Reporter(self.run, list(self.schema.tasks), self.step, self.steps)
        if self.ranks > 1:
            self.watch = Watch(process_group.store(), self.rank, self.ranks, self.settings.timeout)
            process_group.limit_waiting(2 * self.settings.timeout)  # the watch speaks before it
        if self.step >= self.steps:
            self._tell(f"{self.run.path} is at step {self.step} of {self.steps}: nothing to do")
        try:
            with self.notice.taken():
                if self.settings.nonfinite == "skip" and self.saved < 0:
                    self.save()  # what to go back to
                while self.step < self.steps:
                    self._learn()
                    if self.step + 1 in self.skipped and self.step < self.steps:
                        self._advance()
                        self._conclude()
                    if not self.loader.steps(self.position):
                        self.position = self.loader.start(self.position.epoch + 1)
                self._finish_saving()
        except UserError:
            self._settle_saving()  # the other ranks are still there to write their parts
            raise
        finally:
            if self.watch:
                self.watch.end()
        if self.reporter:
            self.reporter.close()
            self.run.write_status("finished", self.step, self.steps)
        return self.run

    def _learn(self) -> None:
        """Steps to the end of the run or the epoch, to the next batch that is left out, or until the run goes back."""
        end = min([self.steps, *(step - 1 for step in self.skipped if step > self.step)])
        for output in self._outputs(self._watched(islice(self.loader.batches(self.position), end - self.step))):
            self.progress.update(output)
            self._advance()
            if not self._conclude():
                return

    def _conclude(self) -> bool:
        """What follows a step: metrics, a checkpoint, the end of a run that was told to end. False if the run goes back."""
        every, last = self.settings.checkpoint_every or self.epoch_steps, self.step == self.steps
        logs = self.step % self.settings.log_every == 0 or self.step == 1 or last
        saves = self.step % every == 0 or self.step in self.milestones or last
        if logs or saves:
            self._find_bad()
        verdict = self.agreement.exchange(self.notice.given, self.bad[0] if self.bad else None)
        if saves or verdict.stop:
            verdict = Verdict(verdict.stop, self.agreement.settle().bad or verdict.bad)
        if verdict.bad is not None:
            self._go_back(verdict.bad)
            return False
        if logs:
            self._log()
        if saves or verdict.stop:
            self.save()
        if verdict.stop and not last:
            self._end_early()
        return True

    def _outputs(self, batches: Iterator[Batch]) -> Iterator[StepOutput]:
        return self.learner.outputs(batches, self.step, self._look, self._feel)

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; who waits for them, and how long, is noted."""
        batches = self.meter.timed(batches)
        while True:
            self._at("data")
            batch = next(batches, None)
            self._at("step")
            if batch is None:
                return
            yield batch

    def _at(self, phase: str) -> None:
        if self.watch:
            self.watch.at(self.step + 1, phase)

    def _advance(self) -> None:
        """Goes past a batch; where a day or an epoch ends with it, says how well that was foreseen."""
        day = self.loader.day(self.position)
        self.step += 1
        self.position = self.loader.after(self.position)
        if self.loader.steps(self.position) and self.loader.day(self.position) == day:
            return
        figures, _ = self.progress.figures(self.progress.day_T3)
        self.progress.day_T3.zero_()
        record = {"epoch": self.position.epoch, "day": day, "step": self.step, "rows": self.progress.total_rows()}
        if self.reporter:
            self.reporter.day(record | figures)

    def _look(self, output: StepOutput) -> None:
        self.finite.look(self.step + 1, output)
        if self.device.type == "cpu":
            # Before the backward, which updates the tables. A GPU would have to wait for the check.
            self._find_bad()

    def _feel(self, step: int, largest: Tensor) -> None:
        self.finite.feel(step, largest)
        if self.device.type == "cpu":
            self._find_bad()

    def _find_bad(self) -> None:
        """Stops at a step that cannot be learnt from, or keeps the first one in mind."""
        if (found := self.finite.first_bad()) is None or self.bad:
            return
        step, what = found
        line = f"step {step}, epoch {self.position.epoch}: {what}."
        if self.settings.nonfinite == "stop":
            raise UserError(
                f"{line} Checkpoints of earlier steps stay. Lower train.dense.lr or train.tables.lr, set train.clip_norm, mend "
                "these rows, or leave such batches out with train.nonfinite=skip."
            )
        self.bad = step, line

    def _go_back(self, bad: int) -> None:
        """To the newest checkpoint, from which the same steps are taken again without the batch of step `bad`.

        To one before it if it was gone back to already, and not one batch could be learnt from since.
        """
        self._at("save")
        self._settle_saving()
        if self.bad and self.bad[0] == bad:
            self._say(self.bad[1])
        skipped = self.skipped | {bad}
        if len(skipped) > self.settings.max_skipped:
            raise UserError(
                f"step {bad}: loss or gradient is not finite, and {len(self.skipped)} batches were left out already "
                "(train.max_skipped). Checkpoints of earlier steps stay. Lower train.dense.lr or train.tables.lr, or set "
                "train.clip_norm."
            )
        poor = {step for step in self.tried if all(between in self.skipped for between in range(step + 1, bad))}
        path = resume.newest(self.run, self._tell, below=min(poor, default=None))
        if path is None:
            raise UserError(f"step {bad}: loss or gradient is not finite, and there is no checkpoint to go back to")
        self._load(path, checkpoint.read(path))
        self.tried.add(self.step)
        self.skipped |= skipped
        self.bad = None
        self.finite.forget()
        self.agreement.settle()
        if self.reporter:
            self._forget()
            self.reporter.back_to(self.step)
            self._say(f"goes back to step {self.step}, to leave the batch of step {bad} out")
        self.meter = Meter(self._passed(), self.step)

    def _passed(self) -> int:
        """Rows that the position lies behind."""
        return self.position.epoch * self.loader.rows + sum(self.position.cursors)

    def _log(self) -> None:
        figures, sums_T3 = self.progress.figures(self.progress.window.sums_T3())
        learnt = self.progress.total_rows()
        with shard.whole(self.learner.model):
            weight_T = self.learner.loss.weights().detach().cpu()
        if self.reporter is None:
            return
        rows_per_s, data_wait, step_s = self.meter.read(self._passed(), self.step)
        loss_T = sums_T3[:, 0] / sums_T3[:, 1].clamp(min=1e-30)
        self.reporter.log(
            {
                "step": self.step,
                "rows": learnt,
                "left_out": self._passed() - learnt,
                "epoch": self.position.epoch,
                "time": time.time(),
                "lr": dense.rate(self.settings.dense, self.step - 1, self.steps),
                "loss": float((loss_T * weight_T).sum()),
                "weight": dict(zip(self.schema.tasks, weight_T.tolist(), strict=True)),
                **figures,
                "rows_per_s": rows_per_s,
                "data_wait": data_wait,
                "seconds_left": step_s * (self.steps - self.step),
            }
        )

    def save(self, wait: bool = False) -> None:
        """Begins to write a checkpoint of this step, once the one before it is done.

        Args:
            wait: until it is on disk.
        Raises:
            UserError: waiting, where it cannot be written.
        """
        self._at("save")
        self.meter.pause()
        self._settle_saving()
        self.saver.save(
            self.learner.state() | {"progress": self.progress.state()}, self._manifest(self.progress.total_rows())
        )
        self.saved = self.step
        if wait:
            self._finish_saving()
        self.meter.go_on()

    def _manifest(self, rows: int) -> CheckpointManifest:
        return CheckpointManifest(
            step=self.step,
            rows=rows,
            left_out=self._passed() - rows,
            skipped=sorted(self.skipped),
            epoch=self.position.epoch,
            cursors=self.position.cursors,
            ranks=self.ranks,
            seed=self.settings.seed,
            window=self.settings.window,
            batch_size=self.settings.batch_size,
            data=config_hash([shard.sha256 for shard in self.loader.shards]),  # whatever the folder is called
            fingerprint=self.schema.fingerprint,
            encoders=self.dataset.encoders_id,
            config=config_hash(self.config.shape()),
        )

    def _settle_saving(self) -> None:
        if (error := self.saver.wait()) and self.rank == 0:
            self._say(f"{error} Training goes on, and tries again with the next checkpoint.")

    def _finish_saving(self) -> None:
        """Waits for the last checkpoint. Raises UserError where it cannot be written."""
        self._at("save")
        if error := self.saver.wait():
            raise error

    def _end_early(self) -> None:
        self._finish_saving()
        if self.reporter:
            self.reporter.close()
            self.run.write_status("preempted", self.step, self.steps)
        raise Preempted(
            f"told to end: {checkpoint.folder(self.run.checkpoints, self.step)} is written, the same command goes on from it"
        )

    def _say(self, line: str) -> None:
        """A line in the midst of a run, by the rank that has something to say."""
        if self.reporter:
            self.reporter.say(line)
        else:
            print(f"rank {self.rank}: {line}", flush=True)

    def _tell(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)
