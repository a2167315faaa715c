"""The story of a run, from top to bottom."""

import gc
import time
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist

from tidar.config import UserError
from tidar.data import Batch, validation_order
from tidar.distributed import Watchdog, compile_seconds, shorten_timeout
from tidar.losses.objective import TokenScores
from tidar.losses.sums import LossSums, target_weights
from tidar.models import BatchMask
from tidar.patterns import LOSSES, ModelBatch
from tidar.training.epoch_export import export_parameters
from tidar.training.optim.skipping import TooManySkipped
from tidar.training.reporting.metrics import MetricWriter, validation_lines
from tidar.training.reporting.profiling import StepTraces
from tidar.training.reporting.reports import Reports
from tidar.training.reporting.summary import summarize
from tidar.training.run import Run
from tidar.training.stopping import Stopped
from tidar.training.validation import validate


class Trainer(Run):
    """Trains a run to its last step."""

    def train(self) -> None:
        try:
            self.tell_start()
            if self.step < self.steps or self.is_interrupted:
                self.run()
            elif not self.checkpoint:
                self.save_first_weights()
            else:
                if self.world.rank == 0:
                    self.checkpointer.clean_up()
                self.log(f"nothing to do: {self.folder} has all of its {self.steps} steps")
                self.log("to train anew, choose another job.dump_folder or remove this one")
            self.tell_end()
        except BaseException as error:
            self.fail(str(error) or type(error).__name__)
            raise
        finally:
            self.stops.close()
            self.checkpointer.close()
            if self.compiler:
                self.compiler.stop()
            if self.lock:
                self.lock.release()

    def tell_start(self) -> None:
        if not self.config.checkpoint.enable and any(self.folder.glob("checkpoint/step-*")):
            raise UserError(
                f"checkpoint.enable = false: {self.folder} holds the checkpoints of another run; choose another folder"
            )
        self.log(
            *summarize(
                self.config,
                self.model,
                self.pattern,
                self.training_rows,
                self.held_out_rows,
                self.world.size,
                self.micro_batches,
                self.steps,
                self.n_left_out,
                self.engine,
                self.dtype,
            )
        )
        self.log(*self.start)

    def run(self) -> None:
        """All steps that are left."""
        config = self.config
        if self.world.rank == 0:
            self.checkpointer.clean_up()
        self.checkpointer.reserve()
        self.write_options()
        first_step = self.step + 1
        self.metrics = MetricWriter(
            self.folder, first_step, self.world.rank == 0, self.log, validates_again=self.is_interrupted
        )
        self.reports = Reports(self.metrics, self.throughput, self.loss_weights, self.device, self.log)
        if config.training.gc_freq:
            # all ranks collect at the same steps, so that none waits for another; what is there now stays to the end
            gc.collect()
            gc.freeze()
            gc.disable()
        traces = StepTraces(config.profiling, self.folder, self.world.rank, self.step)
        self.throughput.restart()
        self.patience = config.comm.init_timeout_seconds
        self.watchdog = Watchdog(self.world, self.patience, self.fail)
        self.stops.begin()
        batches = self.training_batches()
        try:
            if self.is_interrupted:
                self.finish_step()
            while self.step < self.steps and not self.stop_reason:
                epoch = self.progress.epoch
                try:
                    self.train_step(batches)
                except Stopped as stopped:
                    self.stop_reason = str(stopped)
                    self.save_unless_saved()
                    break
                traces.step()
                if self.step == first_step:
                    self.end_first_step()
                if config.training.gc_freq and self.step % config.training.gc_freq == 0:
                    gc.collect()
                validates = config.validation.enable and self.is_due(config.validation.freq)
                self.progress.state["interrupted"][0] = validates
                self.progress.state["interrupted"][1] = self.epoch_to_export(epochs_before=epoch)
                self.finish_step()
                self.updates.skipped.check()
            self.passes("the checkpoint", config.comm.save_timeout_seconds)
            if config.checkpoint.enable:
                self.checkpointer.finish_last(self.step)
            self.wait_for_all("the end")
        except TooManySkipped as skipped:
            self.stop_for(skipped)
        finally:
            traces.stop()
            self.watchdog.stop()
            gc.enable()
            gc.unfreeze()
            self.metrics.close()

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step over `self.micro_batches` micro-batches of each rank."""
        config, number = self.config, self.step + 1
        self.passes(f"step {number}: data")
        wait_started = time.perf_counter()
        micro_batches = [next(batches) for _ in range(self.micro_batches)]
        self.throughput.count_step(micro_batches, data_wait=time.perf_counter() - wait_started)
        micro_batches = [batch.to(self.device) for batch in micro_batches]

        # the denominators of the losses: the targets of the whole step, over all ranks and micro-batches
        weights = torch.stack([target_weights(batch.rows.targets) for batch in micro_batches]).sum(dim=0)
        n_tokens = weights.new_full((1,), sum(batch.n_tokens for batch in micro_batches))
        counts = torch.cat([weights, n_tokens])
        dist.all_reduce(counts)
        denominators, n_tokens = dict(zip(LOSSES, counts)), counts[-1]
        sums = LossSums.zeros(self.device)
        for place, batch in enumerate(micro_batches, start=1):
            self.passes(f"step {number}: micro-batch {place}")
            with self.parallel.training(is_last=place == self.micro_batches):
                mask = self.mask_builder(batch.rows.documents)
                loss, scores = self.forward(batch.rows, mask, denominators)
                self.throughput.count_pairs(mask.allowed_pairs)
                self.updates.backward(loss)
            self.updates.skipped.note(batch.rows, scores)
            sums += LossSums.of(batch.rows.targets, scores)
            self.pace()
            # a step of many micro-batches may take longer than a launcher waits, so it is abandoned
            if place < self.micro_batches and (reason := self.stops.agreed(self.checkpointer.has_failed)):
                raise Stopped(reason)
        sums.all_reduce()

        self.passes(f"step {number}: optimizer")
        rows = partial(self.training_order(self.progress.samples).first_rows, self.micro_batches)
        self.checkpointer.before_update()
        grad_norm, lr = self.updates.apply(number, self.steps, sums, rows)

        epoch = self.progress.epoch
        self.progress.add_step(self.global_batch_size, n_tokens, sums)
        if self.progress.epoch > epoch:
            self.reports.epoch(self.step, self.progress.epoch, self.progress.take_epoch_sums())
        if self.is_due(config.metrics.log_freq):
            self.report_step(sums, grad_norm, lr)

    def report_step(self, sums: LossSums, grad_norm: torch.Tensor, lr: float) -> None:
        self.updates.settle()  # waits for the device
        scalars = {"train/lr": lr, "train/grad_norm": grad_norm.item()} | self.updates.scalars()
        scalars |= self.checkpointer.take_stall()
        self.reports.step(self.step, self.steps, sums, scalars)

    def forward(
        self, rows: ModelBatch, mask: BatchMask, denominators: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, TokenScores]]:
        """This micro-batch's share of the step's loss, and its scores. denominators: of each loss, scalars."""
        return self.model(
            rows.input_ids,
            rows.position_ids,
            mask.attention,
            head=lambda hidden, weight: self.objective(hidden, weight, rows.targets, denominators),
        )

    def finish_step(self) -> None:
        """Does what is due after a step, and saves. A request to stop interrupts it; the resumed run does it again.

        Validates and exports first: what a checkpoint says is done has been reported and written.
        """
        interrupted = self.progress.state["interrupted"]
        try:
            if interrupted[0] and self.config.validation.enable:
                self.validate()
            interrupted[0] = 0
            if interrupted[1]:
                self.export_epoch(int(interrupted[1]))
                interrupted[1] = 0
            self.stop_reason = self.stops.agreed(self.checkpointer.has_failed)
        except Stopped as stopped:
            self.stop_reason = str(stopped)
        options = self.config.checkpoint
        if options.enable and (self.stop_reason or self.is_due(options.interval)):
            self.save()

    @property
    def is_interrupted(self) -> bool:
        """Whether the last step's validation or export was interrupted, and is still to be done."""
        return bool(self.progress.state["interrupted"].any())

    def validate(self) -> None:
        config, world = self.config, self.world
        order = validation_order(
            len(self.held_out_rows), config.validation.steps, config.training.local_batch_size, world.rank, world.size
        )
        ones = dict.fromkeys(LOSSES, torch.ones((), device=self.device))

        def score(rows: ModelBatch) -> dict[str, TokenScores]:
            self.stops.check()
            scores = self.forward(rows, self.validation_mask_builder(rows.documents), ones)[1]
            self.pace()
            self.passes("validation")
            return scores

        # its first batch may have to be compiled
        self.passes("validation", config.comm.init_timeout_seconds)
        with self.throughput.paused(), self.parallel.validating():
            scalars = validate(
                self.loader(self.held_out_rows, order, self.validation_pattern),
                score,
                block_size=self.validation_pattern.block_size,
                loss_weights=self.loss_weights,
                device=self.device,
            )
        self.val_losses[self.step] = scalars["val/loss"]
        self.metrics.write(self.step, scalars)
        self.log(*validation_lines(scalars))

    def epoch_to_export(self, epochs_before: int) -> int:
        """Number of the epoch that the step has ended where checkpoint.export_epochs wants its export, 0 otherwise."""
        every = self.config.checkpoint.export_epochs
        number = self.progress.epoch // every * every if every else 0
        return number if number > epochs_before else 0

    def export_epoch(self, number: int) -> None:
        """Exports to export/epoch_<number>."""
        folder = self.folder / "export" / f"epoch_{number}"
        with self.throughput.paused():
            self.wait_for_all("the export")
            parameters, writes = self.checkpointer.parameters, self.world.rank == 0
            config, before_each = self.model.config, self.stops.check
            export_parameters(folder, parameters, config, self.write_assets, writes, before_each)
            self.wait_for_all("the export")
        self.log(f"exported {folder}")

    def save(self) -> None:
        self.updates.settle()
        self.passes("the checkpoint", self.config.comm.save_timeout_seconds)
        with self.throughput.paused():
            self.checkpointer.save(self.step, self.about())

    def save_unless_saved(self) -> None:
        """Where a step was given up: saves the state before it."""
        if self.config.checkpoint.enable:
            self.checkpointer.finish()
            if self.checkpointer.saved_step != self.step:
                self.save()

    def wait_for_all(self, place: str) -> None:
        """Before and after what only some ranks do, which may take long."""
        self.passes(place, self.config.comm.save_timeout_seconds)
        dist.barrier(self.group)

    def tell_end(self) -> None:
        saved = self.checkpointer.saved_path
        outcome, reason = "finished", "all steps are done"
        if self.step < self.steps or self.is_interrupted:
            outcome, reason = "stopped", self.stop_reason
            text = f"saved in {saved}, from which the same command goes on" if saved else "nothing is saved"
            self.log(f"stopped after step {self.step} by {reason}: {text}")
        if self.world.rank == 0:
            told = {"step": self.step, "steps": self.steps, "checkpoint": saved and str(saved)}
            self.outcome.end(outcome, reason=reason, **told)

    def stop_for(self, reason: TooManySkipped) -> None:
        """Ends the run with what it had before the steps that were skipped."""
        saved = []
        if self.config.checkpoint.enable:
            try:
                self.save_unless_saved()
                self.checkpointer.finish_last(self.step)
                saved = [f"the state before them is saved in {self.checkpointer.saved_path}"]
            except UserError as error:
                saved = [error.args[0]]
        raise UserError(f"{reason} (training.max_steps_skipped = {self.config.training.max_steps_skipped})", *saved)

    def save_first_weights(self) -> None:
        """All that a run of no steps does: it makes a checkpoint of what it would start from."""
        if not self.config.checkpoint.enable:
            raise UserError("training.steps = 0: only saves the first weights, which checkpoint.enable = false forbids")
        self.write_options()
        self.checkpointer.reserve()
        self.checkpointer.save(0, self.about())
        self.checkpointer.finish_last(0)
        self.log(f"saved the first weights in {self.checkpointer.folder / 'step-0'}")

    def training_batches(self) -> Iterator[Batch]:
        """This rank's micro-batches, from where the run stands, without an end."""
        return iter(self.loader(self.training_rows, self.training_order(self.progress.samples), self.pattern))

    def end_first_step(self) -> None:
        """Nothing slow is left to wait for: tells what was compiled, and lowers the timeouts."""
        if compilation := compile_seconds():
            self.log(f"compilation took {compilation:.1f} s of the first step")
        if self.compiler and (trouble := self.compiler.failure()):
            self.log(f"warning: step {self.step} was slow, for its kernels were not compiled ahead: {trouble}")
        shorten_timeout(self.config, self.world)
        self.patience = self.config.comm.train_timeout_seconds

    def passes(self, place: str, patience: int | None = None) -> None:
        """Tells the watchdog where this rank is, and how many seconds it may stay there."""
        self.watchdog.passes(place, patience or self.patience)

    def is_due(self, every: int) -> bool:
        """What happens every so many steps, if any, and after the last."""
        return self.step == self.steps or (every > 0 and self.step % every == 0)
