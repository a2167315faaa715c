"""What a run resumes from: weights, optimizer, counts, and the checkpoints that hold them."""

import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from tidar.config import Config, UserError, to_toml
from tidar.config.files import write_atomically
from tidar.distributed import OneDevice, Sharded, World, rank_zero_first
from tidar.models import Decoder
from tidar.models.huggingface import ModelSpec
from tidar.models.huggingface.manifest import read_manifest
from tidar.training.checkpoint.checkpointer import Checkpointer
from tidar.training.checkpoint.resume import (
    about_checkpoint,
    changed_data_options,
    changed_options,
    check_model,
    compared_options,
    rate_jump,
)
from tidar.training.first_weights import check_first_weights, set_first_weights
from tidar.training.optim.updates import Updates
from tidar.training.plan import RunPlan
from tidar.training.progress import Progress


class RunState:
    """The state of a run, restored from the newest checkpoint or else new, and its checkpoints.

    updates: the optimizer and what decides about steps. progress: counts. resumed_from: the checkpoint, if any.
    val_losses: by step.
    """

    config: Config
    plan: RunPlan
    spec: ModelSpec
    folder: Path
    world: World
    cpu_group: dist.ProcessGroup
    log: Callable[[str], None]
    model: Decoder
    updates: Updates
    progress: Progress
    checkpointer: Checkpointer
    resumed_from: Path | None
    val_losses: dict[int, float | None]

    def __init__(
        self,
        plan: RunPlan,
        spec: ModelSpec,
        folder: Path,
        world: World,
        groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
        model: Decoder,
        parallel: Sharded | OneDevice,
        progress: Progress,
        log: Callable[[str], None],
    ):
        """groups: of all ranks, on the CPU: one for the main thread, one for the thread that saves."""
        self.config, self.plan, self.spec = plan.config, plan, spec
        self.folder, self.world, self.log = folder, world, log
        self.cpu_group, save_group = groups
        self.model, self.progress = model, progress
        self.updates = Updates(
            model, parallel.copies, plan.config, world, self.cpu_group, plan.dtype, plan.kernels, log
        )
        self.checkpointer = Checkpointer(
            folder,
            plan.config.checkpoint,
            model,
            self.updates.optimizer,
            progress.state | self.updates.state,
            world,
            self.cpu_group,
            save_group,
            self.write_assets,
            log,
        )
        self.resumed_from = None
        self.val_losses = {}

    def restore_or_initialize(self) -> list[str]:
        """From the newest checkpoint, or else with the weights that the options name. Returns which, as log lines.

        Raises UserError where the folder holds another run, and for weights that are not the model's.
        """
        options, started = self.config.checkpoint, time.perf_counter()
        if not options.enable and any(self.folder.glob("checkpoint/step-*")):
            raise UserError(
                f"checkpoint.enable = false: {self.folder} holds the checkpoints of another run; choose another folder"
            )
        self.resumed_from = self.checkpointer.newest() if options.enable else None
        if not self.resumed_from:
            rank_zero_first(self.world, lambda is_first: check_first_weights(self.config) if is_first else None)
            return set_first_weights(self.model, self.spec, self.config)
        self._restore(self.resumed_from)
        seconds = time.perf_counter() - started
        step = self.progress.step
        return [f"resumed from step {step}: {self.resumed_from}, checked and restored in {seconds:.1f} s"]

    def _restore(self, checkpoint: Path) -> None:
        check_model(self.folder, checkpoint, self.spec.decoder, self.spec.mask_token_id)
        about = read_manifest(checkpoint)["about"]
        found = changed_options(about, compared_options(self.config, self.plan.global_batch_size))
        self.checkpointer.load(checkpoint)
        if differences := self.progress.differences():
            found += changed_data_options(about, self.config) + differences
        if found and not self.config.checkpoint.allow_changes:
            raise UserError(
                f"{self.folder} was trained with other options: {'; '.join(found)}",
                "resume with the same, allow it (checkpoint.allow_changes), or choose another job.dump_folder",
            )
        for difference in found:
            self.log(f"warning: resumes with other options: {difference}")
        self.val_losses[self.progress.step] = about.get("val_loss")  # for a save of this step that repeats
        self.updates.skipped.restart_count()
        done, skipped = self.progress.step, self.updates.skipped.total
        for warning in rate_jump(about, self.config, self._steps(), done, skipped):
            self.log(warning)

    def save(self) -> None:
        """All ranks call it. Returns once training may continue (see `Checkpointer.save`)."""
        self.updates.finish_step()
        self.progress.count_time()
        # any rank's count may be the one that is saved, and some have started sooner
        dist.all_reduce(self.progress.state["seconds"], op=dist.ReduceOp.MAX, group=self.cpu_group)
        step, counts = self.progress.step, self.progress.counts()
        about = about_checkpoint(
            self.config, self.plan.global_batch_size, counts, self.world.size, self.val_losses.get(step), self._steps()
        )
        self.checkpointer.save(step, about)

    def save_first_weights(self) -> None:
        """All that a run of no steps does. Raises UserError where checkpoints are disabled."""
        if not self.config.checkpoint.enable:
            raise UserError("training.steps = 0: only saves the first weights, which checkpoint.enable = false forbids")
        self.write_options()
        self.checkpointer.reserve()
        self.save()
        self.checkpointer.finish_last(0)
        self.log(f"saved the first weights in {self.checkpointer.folder / 'step-0'}")

    def is_saved(self) -> bool:
        """Whether a checkpoint of this step is whole. Waits for the save under way."""
        self.checkpointer.finish()
        return self.checkpointer.saved_step == self.progress.step

    def _steps(self) -> int:
        """Steps of the whole run."""
        return self.progress.steps_of(self.config.training, self.plan.global_batch_size)

    def write_options(self) -> None:
        """config.toml of the run's folder. Raises UserError where it cannot be written."""
        if self.world.rank == 0:
            path = self.folder / "config.toml"
            try:
                write_atomically(path, to_toml(self.config))
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror})") from None

    def write_assets(self, folder: Path) -> None:
        """All of a Hugging Face model but its weights: config.json, tokenizer."""
        tidar = self.config.tidar
        self.spec.write(folder, {"pattern": tidar.pattern, "block_size": tidar.block_size})
