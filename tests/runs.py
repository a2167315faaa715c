"""Training in the test's own process."""

from tidar.config import load_config
from tidar.distributed import leave_world
from tidar.training.hooks import Hooks
from tidar.training.trainer import Trainer

# a collection of the test process's many objects takes longer than a small run
NO_GC = ["--training.gc_freq", "0"]


def train_run(options: list[str], hooks: Hooks | None = None) -> Trainer:
    """Trains to the end, leaves the process group in any case, and returns the trainer."""
    try:
        trainer = Trainer(load_config([*NO_GC, *options]), hooks)
        trainer.train()
    finally:
        leave_world()
    return trainer
