"""Every pattern trains on the embedded data, and what is reported of it is right."""

from pathlib import Path

import pytest
import torch
from reference import expected_mask, pattern_mask
from results import read_metrics
from runs import train_run

from tidar.models.flops import useful_flops
from tidar.patterns import PATTERNS
from tidar.training.hooks import Hooks
from tidar.training.trainer import Trainer

COMMON = """
    --training.seq_len 64 --training.local_batch_size 4 --training.steps 30 --optimizer.lr 6e-3 --metrics.log_freq 1
    --lr_scheduler.warmup_steps 5 --validation.steps 2 --checkpoint.enable false --data.num_workers 0
""".split()
EXPERIMENTS = f"--tidar.block_sizes 2 16 --tidar.random_block_offset --tidar.place_weights {'1 .5 ' * 8}"
CASES = {name: name for name in PATTERNS} | {
    "tidar, all experiments": f"tidar {EXPERIMENTS} --tidar.diffusion_share 0.5",
    "tidar_split, experiments": f"tidar_split {EXPERIMENTS} --tidar.clean_ratio 0.3",
}


class Recorded(Hooks):
    """Keeps the rows of the last step."""

    def on_micro_batch(self, trainer, rows, loss, scores):
        if torch.is_grad_enabled():
            self.rows = rows
        return loss


@pytest.fixture(scope="module")
def embedded_data(tmp_path_factory) -> list[str]:
    """Options for the embedded data, prepared once."""
    folder = tmp_path_factory.mktemp("embedded")
    train(folder, ["--training.steps", "0", "--checkpoint.enable", "true"])
    return ["--data.source", "prepared", "--data.paths", str(folder / "data" / "training")]


def train(folder: Path, options: list[str]) -> Trainer:
    return train_run([*COMMON, "--job.dump_folder", str(folder), *options], Recorded())


@pytest.mark.parametrize("case", CASES)
def test_losses_fall_and_flops_are_those_of_the_mask(case, tmp_path, embedded_data, smaller_debug):
    name, *options = CASES[case].split()
    trainer = train(tmp_path, [*embedded_data, "--tidar.pattern", name, *options])
    *steps, validation = read_metrics(tmp_path)
    losses = trainer.plan.pattern.losses
    for loss in ("ar", "diffusion"):
        curve = [line.get(f"train/batch_{loss}_loss") for line in steps]
        assert (loss in losses) == all(value is not None for value in curve) == (f"val/{loss}_loss" in validation)
        if loss in losses:
            assert sum(curve[-5:]) / 5 < curve[0] - 1
    assert ("train/batch_accuracy" in steps[0], "train/batch_accuracy_diff" in steps[0]) == (
        "ar" in losses,
        "diffusion" in losses,
    )
    mean = sum(steps[-1][f"train/batch_{loss}_loss"] for loss in losses) / len(losses)
    assert steps[-1]["train/batch_loss"] == pytest.approx(mean, rel=1e-6)
    # blocks of 8 in the validation, whatever was trained
    by_place = {int(key.split("/")[-1]) for key in validation if key.startswith("val/diffusion_loss_at/")}
    assert by_place == (set(range(8)) if "diffusion" in losses else set())

    rows, documents = trainer.hooks.rows, trainer.hooks.rows.documents
    masks = []
    for row in range(4):
        ends = [*(documents.position[row] == 0).nonzero().flatten().tolist(), 64]
        lengths = [end - start for start, end in zip(ends, ends[1:])]
        if documents.blocks is None:
            masks.append(pattern_mask(name, lengths, 8))
        else:
            masks.append(expected_mask(name, trainer.plan.pattern, documents, row, lengths))
    scored = sum(len(targets.labels) for targets in rows.targets.values())
    pairs = int(sum(mask.sum() for mask in masks))
    assert rows.input_ids.shape[1] == len(masks[0])
    flops_per_token = useful_flops(trainer.model.config, rows.input_ids.numel(), scored, pairs) / (4 * 64)
    found = steps[-1]["perf/tflops"] * 1e12 / steps[-1]["perf/tokens_per_second"]
    assert found == pytest.approx(flops_per_token, rel=1e-6)
