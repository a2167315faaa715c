"""A run, from its options to its last step."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from tidar.config import Config, UserError, make_dump_folder, print_first_error, print_lines
from tidar.data import Batch
from tidar.distributed import (
    OneDevice,
    Sharded,
    Watchdog,
    World,
    compile_seconds,
    determinism,
    join_world,
    shorten_timeout,
)
from tidar.evaluation.scores import validate
from tidar.losses.objective import Objective, TokenScores
from tidar.losses.sums import LossSums
from tidar.models import BatchMask, Decoder, MaskBuilder
from tidar.models.huggingface import ModelSpec, without_generate
from tidar.patterns import LOSSES, ModelBatch
from tidar.training.batches import Batches, count_targets
from tidar.training.build import build_mask_builders, build_model, build_objective
from tidar.training.checkpoint.checkpointer import Checkpointer
from tidar.training.compile_ahead import Compiler, start_compiler
from tidar.training.epoch_export import export_parameters
from tidar.training.hooks import Hooks
from tidar.training.host import HostThrottle, scheduled_gc
from tidar.training.inputs import Inputs, read_inputs
from tidar.training.optim.skipping import TooManySkipped
from tidar.training.optim.updates import Updates
from tidar.training.out_of_memory import explained_out_of_memory
from tidar.training.outcome import Outcome
from tidar.training.plan import RunPlan, plan_run
from tidar.training.progress import Progress
from tidar.training.reporting.profiling import StepTraces
from tidar.training.reporting.reports import Reports
from tidar.training.reporting.summary import summarize
from tidar.training.reporting.throughput import Throughput
from tidar.training.run_lock import hold_folder
from tidar.training.state import RunState
from tidar.training.stopping import Stopped, StopRequests
from tidar.training.validation import HeldOutPrompts


class Trainer:
    """A run: made from its options and from its newest checkpoint, if there is one, and trained to its last step."""

    # the run
    config: Config
    hooks: Hooks
    plan: RunPlan
    folder: Path
    steps: int  # of the whole run
    # the processes
    world: World
    device: torch.device
    cpu_group: dist.ProcessGroup  # all ranks, on gloo
    resources: ExitStack  # closed when the run ends, also by an error
    outcome: Outcome
    stops: StopRequests
    watchdog: Watchdog
    throttle: HostThrottle
    timeout: int  # seconds that a rank may stay in one phase
    # the model and its data
    inputs: Inputs
    spec: ModelSpec
    batches: Batches
    model: Decoder
    parallel: Sharded | OneDevice
    mask_builder: MaskBuilder
    validation_mask_builder: MaskBuilder
    prompts: HeldOutPrompts | None  # decoded by each validation
    objective: Objective
    compiler: Compiler | None  # compiles kernels ahead
    # progress
    state: RunState
    updates: Updates
    checkpointer: Checkpointer
    progress: Progress
    stop_reason: str | None
    # reports
    throughput: Throughput
    reports: Reports
    start: list[str]  # log lines: where its weights come from

    def __init__(self, config: Config, hooks: Hooks | None = None):
        """Joins the other processes, reads data and model, and restores the newest checkpoint or sets first weights.

        Raises UserError for options that this machine, the data or the dump folder cannot serve.
        """
        started = time.monotonic()
        self.config, self.hooks = config, hooks or Hooks()
        self.folder = make_dump_folder(config)
        self.world = world = join_world(config)
        self.device = world.device
        self.plan = plan_run(config, world.size, self.device)
        timeout = timedelta(seconds=config.comm.save_timeout_seconds)
        groups = tuple(dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
        self.cpu_group = groups[0]
        with ExitStack() as resources, explained_out_of_memory(lambda: self.plan, world.rank):
            deadline = started + 60 * (config.checkpoint.max_wall_minutes or math.inf)
            self.stops = StopRequests(world, self.cpu_group, deadline, self.record_failure)
            resources.callback(self.stops.close)
            lock = hold_folder(self.folder, world, self.cpu_group, self.log)
            if lock:
                resources.callback(lock.release)
            self.outcome = Outcome(self.folder)
            resources.push(self._record_error)
            if world.rank == 0:
                self.outcome.begin()
            self.stops.listen()  # after the outcome has begun, so that a signal can end it
            self.stop_reason = None

            resources.enter_context(determinism(config))
            self._read_inputs()
            self.model, self.parallel = build_model(self.plan, world)
            self.objective = build_objective(self.plan, world)
            self.mask_builder, self.validation_mask_builder = build_mask_builders(self.plan, world)
            self.compiler = start_compiler(self.plan, resources, self.log)
            n_rows, identity = len(self.batches.training_rows), self.inputs.data.identity(config)
            self.progress = Progress(n_rows, identity, self.device)
            self.state = RunState(
                self.plan, self.spec, self.folder, world, groups, self.model, self.parallel, self.progress, self.log
            )
            self.updates, self.checkpointer = self.state.updates, self.state.checkpointer
            self.prompts = HeldOutPrompts.of(self.plan, self.batches, self.inputs, self.state.write_assets, world)
            resources.callback(self.checkpointer.close)
            self.start = self.state.restore_or_initialize()
            self.steps = self.progress.steps_of(config.training, self.plan.global_batch_size)

            self.watchdog, self.timeout = Watchdog(world, self.record_failure), config.comm.init_timeout_seconds
            self.throttle = HostThrottle(self.device)
            self.throughput = Throughput(self.spec.decoder, self.device, world.cp_size, world.tp_size)
            weights, ranks = self.plan.loss_weights, (world, self.cpu_group)
            self.reports = Reports(config, self.folder, self.throughput, weights, self.model.layers, *ranks, self.log)
            self.resources = resources.pop_all()

    def _read_inputs(self) -> None:
        config = self.config
        self.inputs = read_inputs(config, self.world, self.cpu_group)
        if self.inputs.warning:
            self.log(self.inputs.warning)
        self.spec = self.inputs.spec
        self.plan = plan_run(config, self.world.size, self.device, self.spec.decoder, self.spec.mask_token_id)
        for warning in self.plan.kernels.warnings:
            self.log(warning)
        self.batches = Batches(self.plan, self.inputs.data, self.world)

    def train(self) -> None:
        """Trains to the last step, or until a request to stop. Closes the run's resources."""
        with self.resources, explained_out_of_memory(lambda: self.plan, self.world.rank):
            self.resources.push(self._record_error)
            self.log(*summarize(self.plan, self.batches, self.inputs.n_unusable, self.steps))
            self.log(*self.start)
            if self.step < self.steps or self.progress.is_interrupted:
                self._train_steps()
            else:
                self._end_without_steps()
            self._record_end()

    def _end_without_steps(self) -> None:
        if not self.state.resumed_from:
            self.state.save_first_weights()
        else:
            if self.world.rank == 0:
                self.checkpointer.clean_up()
            self.log(f"nothing to do: {self.folder} has all of its {self.steps} steps")
            self.log("for a new run choose another job.dump_folder, or remove this one")
        self.wait_for_all("the end")  # rank 0 may hold the store, and ends with it

    def _train_steps(self) -> None:
        """All steps that are left."""
        config, first_step = self.config, self.step + 1
        if self.world.rank == 0:
            self.checkpointer.clean_up()
        self.checkpointer.reserve()
        self.state.write_options()
        with ExitStack() as stack:
            stack.enter_context(self.reports.metrics.opened(first_step, validates_again=self.progress.validates_again))
            collect_garbage = stack.enter_context(scheduled_gc(config.training.gc_freq))
            stack.enter_context(self.watchdog.watching(self.timeout))
            traces = stack.enter_context(StepTraces(config.profiling, self.folder, self.world.rank, self.step))
            self.throughput.restart()
            self.stops.begin()
            batches = self.hooks.batches(self, self.batches.training(self.progress.samples))
            try:
                if self.progress.is_interrupted:
                    self.finish_step()
                while self.step < self.steps and not self.stop_reason:
                    epoch = self.progress.epoch
                    try:
                        self.train_step(batches)
                    except Stopped as stopped:
                        self.stop_reason = str(stopped)
                        self.save_unless_saved()
                        break
                    self.hooks.after_step(self)
                    traces.step()
                    if self.step == first_step:
                        self.end_first_step()
                    collect_garbage(self.step)
                    validates = config.validation.enable and self.progress.is_due(config.validation.freq, self.steps)
                    exports = self.progress.epoch_to_export(config.checkpoint.export_epochs, epochs_before=epoch)
                    self.progress.interrupt(validates, exports)
                    self.finish_step()
                    self.updates.skipped.check()
                self.heartbeat("the checkpoint", config.comm.save_timeout_seconds)
                if config.checkpoint.enable:
                    self.checkpointer.finish_last(self.step)
                self.wait_for_all("the end")
            except TooManySkipped as skipped:
                limit = f"training.max_steps_skipped = {config.training.max_steps_skipped}"
                raise UserError(f"{skipped} ({limit})", *self._save_before_skipped()) from None

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step over `plan.micro_batches` micro-batches of each rank. Raises Stopped between two."""
        plan, number = self.plan, self.step + 1
        self.heartbeat(f"step {number}: data")
        wait_started = time.perf_counter()
        micro_batches = [next(batches) for _ in range(plan.micro_batches)]
        self.throughput.count_step(micro_batches, data_wait=time.perf_counter() - wait_started)
        self.reports.slowness.watch(reports := self.progress.is_due(self.config.metrics.log_freq, self.steps, ahead=1))
        micro_batches = [batch.to(self.device) for batch in micro_batches]

        denominators, n_tokens = count_targets(micro_batches, self.world)
        sums = LossSums.zeros(self.device)
        for index, batch in enumerate(micro_batches, start=1):
            self.heartbeat(f"step {number}: micro-batch {index}")
            with self.parallel.training(is_last=index == plan.micro_batches):
                mask = self.mask_builder(batch.rows.documents, batch.rows.share)
                loss, scores = self.forward(batch.rows, mask, denominators)
                self.throughput.count_pairs(mask.allowed_pairs)
                self.updates.backward(loss)
            self.updates.skipped.record(batch.rows, scores)
            sums += LossSums.of(batch.rows.targets, scores)
            self.throttle.wait()
            # a step of many micro-batches may take longer than a launcher waits, so it is abandoned
            if index < plan.micro_batches and (reason := self.stops.agreed(self.checkpointer.has_failed)):
                raise Stopped(reason)
        sums.all_reduce(self.world.loss_group)

        self.heartbeat(f"step {number}: optimizer")
        rows = partial(self.batches.order(self.progress.samples).first_rows, plan.micro_batches)
        self.checkpointer.before_update()
        grad_norm, lr = self.updates.apply(number, self.steps, sums, rows)

        epoch = self.progress.epoch
        self.progress.add_step(plan.global_batch_size, n_tokens, sums)
        if self.progress.epoch > epoch:
            self.reports.epoch(self.step, self.progress.epoch, self.progress.take_epoch_sums())
        if reports and self.hooks.reports_step(self):
            self.updates.finish_step()  # waits for the device
            scalars = {"train/lr": lr, "train/grad_norm": grad_norm.item()} | self.updates.scalars()
            scalars |= self.checkpointer.take_stall()
            self.reports.step(self.step, self.steps, sums, scalars)

    def forward(
        self, rows: ModelBatch, mask: BatchMask, denominators: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, TokenScores]]:
        """This micro-batch's share of the step's loss, and its scores. denominators: of each loss, scalars."""
        loss, scores = self.model(
            rows.input_ids,
            rows.position_ids,
            mask.attention,
            head=lambda hidden, weight: self.objective(hidden, weight, rows.targets, denominators),
        )
        return self.hooks.on_micro_batch(self, rows, loss, scores), scores

    def finish_step(self) -> None:
        """Does what is due after a step, and saves. A request to stop interrupts it; the resumed run does it again.

        Validates and exports first: what a checkpoint says is done has been reported and written.
        """
        interrupted, options = self.progress.state["interrupted"], self.config.checkpoint
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
        if options.enable and (self.stop_reason or self.progress.is_due(options.interval, self.steps)):
            self.save()

    def validate(self) -> None:
        ones = dict.fromkeys(LOSSES, torch.ones((), device=self.device))

        def score(rows: ModelBatch) -> dict[str, TokenScores]:
            self.stops.check()
            scores = self.forward(rows, self.validation_mask_builder(rows.documents, rows.share), ones)[1]
            self.throttle.wait()
            self.heartbeat("validation")
            return scores

        # its first batch may have to be compiled
        self.heartbeat("validation", self.config.comm.init_timeout_seconds)
        with self.throughput.paused():
            with self.parallel.validating():
                block_size, weights = self.plan.validation_pattern.block_size, self.plan.loss_weights
                groups = self.world.cp_group, self.world.loss_group
                scalars = validate(self.batches.validation(), score, block_size, weights, self.device, *groups)
            calls = self.stops.check, partial(self.heartbeat, "decoding"), partial(self.wait_for_all, "decoding")
            decoded = self.prompts.decode(self.parallel, *calls) if self.prompts else None
        self.state.val_losses[self.step] = scalars.get("val/loss")
        self.reports.validation(self.step, scalars, decoded)

    def export_epoch(self, number: int) -> None:
        """Exports to export/epoch_<number>."""
        folder = self.folder / "export" / f"epoch_{number}"
        with self.throughput.paused():
            self.wait_for_all("the export")
            model = self.checkpointer.parameters, self.model, self.step, self.state.write_assets
            export_parameters(folder, *model, writes=self.world.rank == 0, before_each=self.stops.check)
            self.wait_for_all("the export")
        self.log(f"exported {folder}{without_generate(self.config.tidar.pattern)}")

    def save(self) -> None:
        self.heartbeat("the checkpoint", self.config.comm.save_timeout_seconds)
        with self.throughput.paused():
            self.state.save()

    def save_unless_saved(self) -> None:
        """Saves the state before an abandoned step."""
        if self.config.checkpoint.enable and not self.state.is_saved():
            self.save()

    def _save_before_skipped(self) -> list[str]:
        """Saves the state before the steps that were skipped. Returns a line that says where, or why not, if any."""
        if not self.config.checkpoint.enable:
            return []
        try:
            self.save_unless_saved()
            self.checkpointer.finish_last(self.step)
        except UserError as error:
            return list(error.args[:1])
        return [f"the state before them is saved in {self.checkpointer.saved_path}"]

    def _record_end(self) -> None:
        saved = self.checkpointer.saved_path
        outcome, reason = "finished", "all steps are done"
        if self.step < self.steps or self.progress.is_interrupted:
            outcome, reason = "stopped", self.stop_reason or ""
            text = f"saved in {saved}, from which the same command resumes" if saved else "nothing is saved"
            self.log(f"stopped after step {self.step} by {reason}: {text}")
        if self.world.rank == 0:
            progress = {"step": self.step, "steps": self.steps, "checkpoint": saved and str(saved)}
            self.outcome.end(outcome, reason=reason, **progress)

    def record_failure(self, reason: str) -> bool:
        """Writes the outcome of a run that failed. Any rank and thread may call it. Returns whether it is the first."""
        step = self.step if "progress" in vars(self) else None
        return self.outcome.end("failed", reason=f"rank {self.world.rank}: {reason}", step=step)

    def _record_error(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error and self.record_failure(str(error) or type(error).__name__):
            print_first_error(error)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    def end_first_step(self) -> None:
        """Reports the time of compilation, and lowers the timeouts."""
        if compilation := compile_seconds():
            self.log(f"compilation took {compilation:.1f} s of the first step")
        if self.compiler and (failure := self.compiler.failure()):
            self.log(f"warning: step {self.step} was slow because its kernels were not compiled ahead: {failure}")
        shorten_timeout(self.config, self.world)
        self.timeout = self.config.comm.train_timeout_seconds

    def heartbeat(self, phase: str, timeout: int | None = None) -> None:
        """Reports to the watchdog where this rank is, and how many seconds it may stay there."""
        self.watchdog.heartbeat(phase, timeout or self.timeout)

    def wait_for_all(self, phase: str) -> None:
        """A barrier before and after work of some ranks only, which may take long."""
        self.heartbeat(phase, self.config.comm.save_timeout_seconds)
        dist.barrier(self.cpu_group)

    def log(self, *lines: str) -> None:
        if self.world.logs:
            print_lines(*lines)
