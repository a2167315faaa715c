"""Training in the test's own process."""

from tidar.config import load_config
from tidar.distributed import leave_world
from tidar.training.hooks import Hooks
from tidar.training.trainer import Trainer


def train_run(options: list[str], hooks: Hooks | None = None) -> Trainer:
    """Trains to the end, leaves the process group in any case, and returns the trainer."""
    try:
        trainer = Trainer(load_config(options), hooks)
        trainer.train()
    finally:
        leave_world()
    return trainer
