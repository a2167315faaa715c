"""What a run is made of, before its first step: world, data, model, optimizer, and the state to begin with."""

import math
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from tidar.config import (
    Config,
    UserError,
    make_dump_folder,
    print_lines,
    resolve_global_batch_size,
    to_toml,
)
from tidar.data import PackedRows, TrainingOrder, make_loader, make_rows
from tidar.distributed import (
    Pace,
    arithmetic_dtype,
    join_world,
    make_deterministic,
    parallelize,
    rank_zero_first,
)
from tidar.kernels import Sizes, choose_kernels, count_sms, make_mlps_float8
from tidar.losses.objective import Objective
from tidar.models import Decoder, MaskBuilder
from tidar.patterns import Pattern, checked_pattern, configured_pattern, loss_weights
from tidar.training.checkpoint.checkpointer import Checkpointer
from tidar.training.checkpoint.resume import about_checkpoint, check_model, check_options, compared_options
from tidar.training.compile_ahead import Compiler, Work
from tidar.training.first_weights import check_first_weights, set_first_weights
from tidar.training.inputs import load_inputs
from tidar.training.optim.updates import Updates
from tidar.training.outcome import Outcome
from tidar.training.progress import Progress
from tidar.training.reporting.throughput import Throughput
from tidar.training.run_lock import hold_folder
from tidar.training.stopping import StopRequests


class Run:
    """A run, made from its options and from its newest checkpoint if there is one."""

    def __init__(self, config: Config):
        """Raises UserError for options that this machine, the data or the dump folder cannot serve."""
        self.config = config
        self.folder = make_dump_folder(config)
        self.started = time.monotonic()
        self.world = join_world(config)
        self.device = self.world.device
        self.group, save_group = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=config.comm.save_timeout_seconds))
            for _ in range(2)
        )
        minutes = config.checkpoint.max_wall_minutes
        deadline = self.started + 60 * minutes if minutes else None
        self.stops = StopRequests(self.world, self.group, deadline, self.fail)
        try:
            self.lock = hold_folder(self.folder, self.world, self.group, self.log)
        except BaseException:
            self.stops.close()
            raise
        self.outcome = Outcome(self.folder)
        self.compiler: Compiler | None = None
        try:
            if self.world.rank == 0:
                self.outcome.begin()
            self.stops.listen()  # the outcome begins first, so that a signal finds it there to be ended
            self.prepare(save_group)
        except BaseException as error:
            self.fail(str(error) or type(error).__name__)
            self.stops.close()
            if self.compiler:
                self.compiler.stop()
            raise

    def prepare(self, save_group: dist.ProcessGroup) -> None:
        """Data, model, optimizer, and the state to begin with. save_group: of all ranks, on the CPU, for saving."""
        config = self.config
        make_deterministic(config)
        self.global_batch_size = resolve_global_batch_size(config, self.world.size)
        self.micro_batches = self.global_batch_size // (config.training.local_batch_size * self.world.size)
        self.dtype = dtype = arithmetic_dtype(config, self.device)
        choose_kernels(config, self.device, dtype)  # raises before data are prepared

        inputs = rank_zero_first(self.world, lambda is_first: load_inputs(config, prepares=is_first))
        self.spec = inputs.spec
        if inputs.warning:
            self.log(inputs.warning)
        self.training_rows, self.held_out_rows = make_rows(config, inputs.data)
        self.n_left_out = sum(corpus.meta.get("dropped", 0) for corpus in inputs.data.training)
        decoder = self.spec.decoder
        sizes = Sizes(decoder.dim, decoder.hidden_dim, decoder.head_dim, decoder.vocab_size)
        kernels = choose_kernels(config, self.device, dtype, sizes)
        for warning in kernels.warnings:
            self.log(warning)
        self.pattern = checked_pattern(config, self.spec.mask_token_id)
        self.validation_pattern = configured_pattern(config, self.spec.mask_token_id, training=False)
        self.mask_builder, self.validation_mask_builder = (
            MaskBuilder(pattern, kernels.attention) for pattern in (self.pattern, self.validation_pattern)
        )

        with torch.device("meta"):
            self.model = Decoder(decoder, kernels)
        if kernels.float8 != "off":
            make_mlps_float8(self.model, emulate=kernels.float8 == "emulated")
        self.parallel = parallelize(self.model, self.world, config, dtype, kernels.compile)
        self.engine = f"{self.device.type}, {dtype}, {kernels.describe()}"

        self.loss_weights = loss_weights(config, self.pattern)
        self.objective = Objective(self.loss_weights, config.training.loss_chunk_size, kernels)
        # one process for all of this machine's
        if (kernels.fused_matmul or kernels.loss_without_logits) and self.device.index == 0:
            work = Work(
                decoder,
                dtype,
                config.training.local_batch_size * self.pattern.model_positions(config.training.seq_len),
                config.training.loss_chunk_size,
                kernels,
                num_sms=count_sms(self.device),
                capability=torch.cuda.get_device_capability(self.device),
            )
            try:
                self.compiler = Compiler(work)
            except OSError as error:
                self.log(f"warning: no process can be started that compiles kernels ahead ({error.strerror})")
        copies = self.parallel.copies
        self.updates = Updates(self.model, copies, config, self.world, self.group, dtype, kernels, self.log)

        self.progress = Progress(len(self.training_rows), inputs.data.identity(config), self.device)
        self.checkpointer = Checkpointer(
            self.folder,
            config.checkpoint,
            self.model,
            self.updates.optimizer,
            self.progress.state | self.updates.state,
            self.world,
            self.group,
            save_group,
            self.write_assets,
            self.log,
        )
        self.pace = Pace(self.device)
        self.throughput = Throughput(self.model.config, self.device)
        restoring = time.perf_counter()
        self.checkpoint = self.checkpointer.newest() if config.checkpoint.enable else None
        if self.checkpoint:
            self.go_on()
            seconds = time.perf_counter() - restoring
            self.start = [f"goes on from {self.checkpoint}, checked and restored in {seconds:.1f} s"]
        else:
            rank_zero_first(self.world, lambda is_first: is_first and check_first_weights(config))
            self.start = set_first_weights(self.model, self.spec, config)
        self.val_losses: dict[int, float] = {}
        self.stop_reason: str | None = None
        self.steps = config.training.steps
        if config.training.epochs:
            samples_left = config.training.epochs * len(self.training_rows) - self.progress.samples
            self.steps = self.step + max(0, math.ceil(samples_left / self.global_batch_size))

    def go_on(self) -> None:
        """Restores the run from its newest checkpoint. Raises UserError where going on would mix up two runs."""
        check_model(self.folder, self.checkpoint, self.spec.decoder.vocab_size, self.spec.mask_token_id)
        found = check_options(self.checkpoint, compared_options(self.config, self.global_batch_size))
        self.checkpointer.load(self.checkpoint)
        found += self.progress.differences()
        if found and not self.config.checkpoint.allow_changes:
            raise UserError(
                f"{self.folder} was trained otherwise: {'; '.join(found)}",
                "go on with the same, allow it (checkpoint.allow_changes), or choose another job.dump_folder",
            )
        for difference in found:
            self.log(f"warning: goes on with other options: {difference}")
        self.updates.skipped.forgive()

    def about(self) -> dict[str, object]:
        """What a checkpoint says of the run. All ranks call it."""
        self.progress.count_time()
        # any rank's count may be the one that is saved, and some have started sooner
        dist.all_reduce(self.progress.state["seconds"], op=dist.ReduceOp.MAX, group=self.group)
        counts, val_loss = self.progress.counts(), self.val_losses.get(self.step)
        return about_checkpoint(self.config, self.global_batch_size, counts, self.world.size, val_loss)

    def training_order(self, first_sample: int) -> TrainingOrder:
        training, world = self.config.training, self.world
        n_rows = len(self.training_rows)
        return TrainingOrder(n_rows, training.seed, first_sample, training.local_batch_size, world.rank, world.size)

    def loader(self, rows: PackedRows, order, pattern: Pattern) -> DataLoader:
        options, pins = self.config, self.device.type == "cuda"
        return make_loader(rows, order, pattern, options.training.seed, options.data.num_workers, pins)

    def write_options(self) -> None:
        if self.world.rank == 0:
            partial = self.folder / "config.toml.partial"
            partial.write_text(to_toml(self.config), encoding="utf-8")
            os.replace(partial, self.folder / "config.toml")

    def write_assets(self, folder: Path) -> None:
        """What makes weights a model of Hugging Face's: config.json, tokenizer."""
        tidar = self.config.tidar
        self.spec.write(folder, {"pattern": tidar.pattern, "block_size": tidar.block_size})

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    def fail(self, reason: str) -> None:
        """Any rank, and any of its threads, may tell of it."""
        step = self.step if hasattr(self, "progress") else None
        self.outcome.end("failed", reason=f"rank {self.world.rank}: {reason}", step=step)

    def log(self, *lines: str) -> None:
        if self.world.logs:
            print_lines(*lines)
