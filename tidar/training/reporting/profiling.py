"""Traces of training steps, from the PyTorch profiler."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from tidar.config import UserError
from tidar.config.options import Profiling


class StepTraces:
    """Writes a Chrome trace of one step in every profiling.profile_freq: step-<n>-rank-<r>.json.gz."""

    def __init__(self, options: Profiling, folder: Path, rank: int, steps_done: int):
        self.profiler: profile | None = None
        if not options.enable_profiling:
            return
        self.folder = folder / options.save_traces_folder
        self.rank = rank
        self.steps = steps_done
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            name = f"profiling.save_traces_folder = {options.save_traces_folder}"
            raise UserError(f"{name}: cannot be written ({error.strerror})") from None
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.profiler = profile(
            activities=activities,
            # the profiler's start is slow, so the step before is traced and discarded
            schedule=schedule(wait=options.profile_freq - 2, warmup=1, active=1),
            on_trace_ready=self._write,
        )

    def step(self) -> None:
        """After each step of the run."""
        if self.profiler:
            self.steps += 1
            self.profiler.step()

    def __enter__(self) -> "StepTraces":
        if self.profiler:
            self.profiler.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.profiler:
            self.profiler.stop()

    def _write(self, profiler: profile) -> None:
        # also called by the profiler's stop, in the middle of a cycle, with nothing traced
        if profiler.events():
            path = self.folder / f"step-{self.steps}-rank-{self.rank}.json.gz"
            path.unlink(missing_ok=True)  # a link would be followed
            profiler.export_chrome_trace(str(path))
