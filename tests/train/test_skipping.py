"""Steps whose loss or gradient is not finite, and the loss scale of float16."""

import random
import re
import shutil

import pytest
import torch
import torch.distributed as dist
from results import read_metrics, read_weights
from torch import nn

from tidar.config import load_config
from tidar.config.options import LossScale
from tidar.distributed import join_world, leave_world
from tidar.losses.sums import LossSums
from tidar.models.huggingface.checkpoint_files import CheckpointTensors
from tidar.patterns import ModelBatch
from tidar.training.optim.loss_scale import LossScaler
from tidar.training.optim.skipping import SkippedSteps

COMMON = """
    --training.seq_len 16 --training.local_batch_size 2 --validation.enable false --metrics.log_freq 1
    --lr_scheduler.warmup_steps 6
""".split()


def steps_of(folder) -> dict[int, dict]:
    lines = read_metrics(folder)
    return {line["step"]: line for line in lines if "train/lr" in line}


def test_overflow_on_one_rank_skips_the_step_on_all(tmp_path, ranks, small_model):
    """float16 on two ranks, step 3 overflows on rank 1: as if there had been no step 3, but for its data."""
    options = [*COMMON, *small_model.split(), "--training.mixed_precision_param", "float16", "--training.steps", "8"]
    options += ["--job.dump_folder", str(tmp_path), "--checkpoint.interval", "2", "--loss_scale.start", "256"]
    options += ["--loss_scale.hysteresis", "1", "--loss_scale.window", "3"]
    answers = ranks.run(2, *options, faults=[(1, 3, "loss")])
    printed = answers[0]["printed"]
    (found,) = re.findall(r"step 3 skipped: the gradient is not finite on rank 1, rows? ([\d, ]+)\n", printed)
    assert set(map(int, found.split(", "))) <= set(answers[1]["rows"][2])  # without those that have no targets
    assert "the loss scale goes from 256 to 128" in printed and "warning: training.mixed_precision_param" in printed
    lines = steps_of(tmp_path)
    assert [lines[step]["train/skipped_steps"] for step in range(1, 9)] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [lines[step]["train/loss_scale"] for step in range(1, 9)] == [256, 256, 128, 128, 128, 256, 256, 256]
    rates = [lines[step]["train/lr"] for step in range(1, 9)]
    assert rates[3] == rates[2] and rates[4] > rates[3] > rates[1]
    # the scale and the count go on from the checkpoint: the same curve again, from before the doubling
    for step in (6, 8):
        shutil.rmtree(tmp_path / "checkpoint" / f"step-{step}")
    ranks.run(2, *options)
    keys = ("train/batch_loss", "train/grad_norm", "train/lr", "train/loss_scale", "train/skipped_steps")
    again = steps_of(tmp_path)
    assert all(again[step][key] == lines[step][key] for step in range(1, 9) for key in keys)


def test_the_row_whose_loss_is_not_finite_is_named(tmp_path, ranks, small_model):
    """In both micro-batches of rank 1: the last row that has targets."""
    options = [*COMMON, *small_model.split(), "--training.steps", "3", "--job.dump_folder", str(tmp_path)]
    options += ["--training.seq_len", "64", "--training.global_batch_size", "8"]
    answers = ranks.run(2, *options, faults=[(1, 2, "row")])
    places = list(map(int, re.findall(r"row (\d+) of its micro-batch", answers[1]["printed"])))
    assert any(places)
    rows = [micro_batch[place] for micro_batch, place in zip(answers[1]["rows"][2:4], places, strict=True)]
    (found,) = re.findall(r"step 2 skipped: the loss is not finite on rank 1, rows? ([\d, ]+)", answers[0]["printed"])
    assert found == ", ".join(map(str, rows))
    assert steps_of(tmp_path)[2]["train/batch_loss"] is None and steps_of(tmp_path)[3]["train/batch_loss"] > 0


def test_a_sum_over_tokens_that_overflows_is_named():
    """In float16 the gradient of a weight may overflow where no token's own does."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding.from_pretrained(torch.full((4, 8), 300.0), freeze=False)
            self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False)])

        def forward(self, tokens):
            return self.layers[0](self.embed_tokens(tokens))

    join_world(load_config([]))
    try:
        printed: list[str] = []
        group = dist.new_group(backend="gloo")
        model = Model().half()
        skipped = SkippedSteps(3, group, printed.append)
        skipped.watch(model, weights=True)
        model.layers[0].weight.data.fill_(0.01)
        tokens = torch.zeros(2, 3, dtype=torch.long)
        rows = ModelBatch(tokens, tokens, None, {})
        for scale in (0.1, 100):
            (model(tokens).sum() * scale).backward()
            skipped.record(rows, {})
            finite = LossSums(torch.ones(3, 2))
            norm = model.layers[0].weight.grad.float().norm()
            skipped.decide(1, finite, norm, lambda: [17, 23])
            assert skipped.read_decision() == (scale == 100)
        assert printed == ["step 1 skipped: the sum of gradients over tokens is not finite on rank 0, rows 17, 23"]
    finally:
        leave_world()


def test_float16_reports_and_clips_as_float32(tmp_path, ranks, small_model):
    """Norms and weights do not show the scale of the loss."""
    norms, weights = [], []
    for dtype in ("float32", "float16"):
        options = [*COMMON, *small_model.split(), "--training.mixed_precision_param", dtype, "--training.steps", "3"]
        options += ["--job.dump_folder", str(tmp_path / dtype), "--loss_scale.start", "512", "--optimizer.eps", "1e-3"]
        ranks.run(2, *options, weights=tmp_path / "weights.pt")
        norms.append([line["train/grad_norm"] for line in steps_of(tmp_path / dtype).values()])
        weights.append(read_weights(tmp_path / "weights.pt"))
    assert min(norms[0]) > 1 and norms[1] == pytest.approx(norms[0], rel=2e-2)
    assert (weights[1] - weights[0]).norm() < 1e-3 * weights[0].norm()


def test_a_skipped_step_changes_nothing(tmp_path, ranks, small_model):
    """float32: weights after a skipped third step are those after the second, and the optimizer's state too."""
    options = [*COMMON, *small_model.split(), "--lr_scheduler.decay_type", "constant", "--checkpoint.enable", "false"]
    fault = [(0, 3, "loss")]
    for dtype in ("float32", "bfloat16"):
        results = []
        for name, steps, faults in (("two", 2, []), ("three", 3, fault), ("four", 4, fault)):
            run = ["--training.steps", str(steps), "--job.dump_folder", str(tmp_path / f"{dtype}-{name}")]
            run += ["--optimizer.state_dtype", dtype]
            ranks.run(2, *options, *run, weights=tmp_path / "weights.pt", faults=faults)
            results.append(read_weights(tmp_path / "weights.pt"))
        two, three, four = results
        assert torch.equal(two, three) and not torch.equal(three, four) and four.isfinite().all()


def test_a_step_without_targets_changes_nothing(tmp_path, ranks, small_model):
    """No parameter and no moment, in spite of weight decay; it counts as done, and reports no loss."""
    options = [
        *COMMON,
        *small_model.split(),
        "--lr_scheduler.decay_type",
        "constant",
        "--lr_scheduler.warmup_steps",
        "0",
    ]
    options += ["--optimizer.weight_decay", "0.5", "--validation.enable", "false", "--training.max_steps_skipped", "1"]
    states = []
    for name, steps, faults in (("two", 2, []), ("three", 3, [(rank, 3, "targets") for rank in (0, 1)])):
        folder = tmp_path / name
        answers = ranks.run(
            2, *options, "--training.steps", str(steps), "--job.dump_folder", str(folder), faults=faults
        )
        assert answers[0]["error"] is None
        tensors = CheckpointTensors(folder / "checkpoint" / f"step-{steps}")
        states.append({name: tensors.rows(name, 0, shape[0]) for name, shape in tensors.shapes.items() if shape})
    names = [name for name in states[0] if name.startswith(("model.", "optimizer."))]
    assert len(names) > 50 and all(states[0][name].equal(states[1][name]) for name in names)
    assert states[0]["progress.epoch_sums"].equal(states[1]["progress.epoch_sums"])
    line = steps_of(tmp_path / "three")[3]
    assert not any("loss" in name or "accuracy" in name for name in line) and line["train/skipped_steps"] == 0
    assert re.search("step 3/3  no targets  lr", answers[0]["printed"])


@pytest.mark.parametrize("log_freq", [1, 100])
def test_too_many_in_a_row_stop_the_run(tmp_path, ranks, small_model, log_freq):
    """Not those that are not in a row. The checkpoint is of the state before; the run can go on from it.

    log_freq: whether the host looks at each step at once, or while the next is computed.
    """
    options = [*COMMON, *small_model.split(), "--training.steps", "9", "--training.max_steps_skipped", "2"]
    options += ["--job.dump_folder", str(tmp_path), "--metrics.log_freq", str(log_freq)]
    answers = ranks.run(
        2,
        *options,
        weights=tmp_path / "weights.pt",
        faults=[(rank, step, "loss") for rank, step in ((0, 2), (1, 4), (1, 5))],
    )
    for answer in answers:
        assert "2 steps in a row were skipped, up to step 5 (training.max_steps_skipped = 2)" in answer["error"]
        assert f"is saved in {tmp_path / 'checkpoint' / 'step-5'}" in answer["error"]
        assert len(answer["error"].splitlines()) == 2
    before = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in before.values())
    answers = ranks.run(2, *options)
    assert answers[0]["error"] is None and "resumed from step 5" in answers[0]["printed"]
    assert sorted(steps_of(tmp_path)) == (list(range(1, 10)) if log_freq == 1 else [9])
    assert steps_of(tmp_path)[9]["train/skipped_steps"] == 3


def test_loss_scale_is_deepspeeds():
    """Against its rules, written out with iteration numbers as it has them."""
    rng = random.Random(0)
    for _ in range(50):
        options = LossScale(
            start=2.0 ** rng.randint(0, 8), window=rng.randint(1, 5), hysteresis=rng.randint(1, 3), minimum=0.5
        )
        scaler = LossScaler(options)
        scale, hysteresis, last_overflow = options.start, options.hysteresis, -1
        for iteration in range(60):
            overflow = rng.random() < 0.3
            scaler.update(overflow)
            if overflow:
                if hysteresis == 1:
                    scale = max(scale / 2, options.minimum)
                else:
                    hysteresis -= 1
                last_overflow = iteration
            elif (iteration - last_overflow) % options.window == 0:
                scale, hysteresis = scale * 2, options.hysteresis
            assert scaler.scale == scale
    constant = LossScaler(LossScale(dynamic=False, start=128.0, window=1))
    for overflow in (True, False):
        constant.update(overflow)
        assert constant.scale == 128
