"""Same numbers however the work is cut: ranks, sharding, activation checkpointing, gradient accumulation."""

import itertools
import re
import shutil
from pathlib import Path

import pytest
import torch
from results import read_metrics, read_weights

ROWS = 16
COMMON = f"""
    --validation.enable false --checkpoint.enable false --training.seq_len 16 --tidar.block_size 3 --metrics.log_freq 1
    --training.global_batch_size {ROWS}
""".split()
SHARDING = {
    "ZeRO-2": "--parallelism.fsdp_reshard_after_forward never",
    "ZeRO-3": "--parallelism.fsdp_reshard_after_forward always",
    "replicate": "--parallelism.data_parallel_replicate_degree -1 --parallelism.data_parallel_shard_degree 1",
    "HSDP 2x2": "--parallelism.data_parallel_replicate_degree 2",
    "cp 2": "--parallelism.context_parallel_degree 2",
    "cp 4": "--parallelism.context_parallel_degree 4 --parallelism.fsdp_reshard_after_forward never",
    "2 x cp 2": "--parallelism.context_parallel_degree 2 --parallelism.data_parallel_replicate_degree 2",
}
# ranks that share each row
SHARING = {"cp 2": 2, "cp 4": 4, "2 x cp 2": 2}
MODES = ("none", "full", "selective")
# ranks, sharding, activation checkpointing, micro-batches, gradients reduced after each
CUTS = [
    (1, "ZeRO-2", "selective", 4, "step"),
    (2, "ZeRO-3", "full", 4, "micro_batch"),
    (2, "replicate", "selective", 4, "step"),
    (4, "HSDP 2x2", "full", 1, "micro_batch"),
    (4, "ZeRO-2", "none", 4, "step"),
    (2, "cp 2", "none", 1, "micro_batch"),
    (4, "cp 4", "full", 4, "step"),
    (4, "2 x cp 2", "selective", 2, "micro_batch"),
]


def all_cuts():
    for ranks, sharding, mode, micro_batches in itertools.product((2, 4), SHARDING, MODES, (1, 4)):
        for reduced in ("micro_batch", "step"):
            # refused, and the same with one micro-batch
            senseless = reduced == "step" and (sharding == "ZeRO-3" or micro_batches == 1)
            if not senseless and not (ranks == 2 and sharding in ("HSDP 2x2", "cp 4", "2 x cp 2")):
                yield ranks, sharding, mode, micro_batches, reduced


@pytest.mark.parametrize(
    "cuts, steps, warmup_steps",
    [(CUTS, 4, 0), pytest.param(list(all_cuts()), 30, 20, marks=pytest.mark.long)],
    ids=["some", "all"],
)
def test_same_numbers_however_it_is_sharded(tmp_path, ranks, small_model, cuts, steps, warmup_steps):
    """Some steps in float32 against one process with one micro-batch, printed as a table."""
    one = (1, "ZeRO-3", "none", 1, "micro_batch")
    print(f"\nranks {'sharding':9} checkpoints micro-batches {'reduced':11}     loss     norm  weights")
    targets = []
    for number, cut in enumerate((one, *cuts)):
        size, sharding, mode, micro_batches, reduced = cut
        folder, weights = tmp_path / str(number), tmp_path / "weights.pt"
        options = f"{small_model} {SHARDING[sharding]} --activation_checkpoint.mode {mode} --job.dump_folder {folder}"
        options += " --activation_checkpoint.layers 2" if mode == "full" else ""
        dp_size = size // SHARING.get(sharding, 1)
        options += f" --training.local_batch_size {ROWS // dp_size // micro_batches} --training.steps {steps}"
        options += f" --parallelism.gradient_reduction {reduced} --lr_scheduler.warmup_steps {warmup_steps}"
        answers = ranks.run(size, *COMMON, *options.split(), weights=weights)
        found = run_results(folder, weights, steps)
        if cut == one:
            expected = found
        if sharding in SHARING:
            # keys and values of the clean half alone: layers, steps, rows, both, heads, dims, tokens, bytes of float32
            gathered = 3 * steps * ROWS * 2 * 2 * 16 * 16 * 4 // size
            again = {"none": 0, "selective": 1, "full": 2 / 3}[mode]  # recomputed, in two layers of three if full
            assert [answer["gathered"] for answer in answers] == [gathered * (1 + again)] * size
        errors = differences(found, expected)
        row = f"{size:5} {sharding:9} {mode:11} {micro_batches:13} {reduced:11}"
        print(row, " ".join(f"{error:8.1e}" for error in errors))
        assert max(errors) < 1e-5, row
        targets.append([rank["targets"] for rank in answers])
    # ranks had very different numbers of targets, and once one of them had none
    assert len({sum(map(sum, counts)) for counts in targets}) == 1
    micro_batches = [counts for answer in targets if len(answer) == 4 for counts in zip(*answer)]
    assert any(min(counts) == 0 < max(counts) for counts in micro_batches)
    assert any(max(counts) > 5 * min(counts) > 0 for counts in micro_batches)


@pytest.mark.parametrize(
    "size, sharding, micro_batches, dtype, options",
    [
        (2, "ZeRO-2", 3, "float32", "--parallelism.gradient_reduction step"),
        (3, "ZeRO-3", 2, "bfloat16", ""),
        (4, "HSDP 2x2", 3, "bfloat16", ""),
        (4, "cp 4", 1, "float32", "--activation_checkpoint.mode full"),
    ],
)
def test_copies_give_what_collectives_give(tmp_path, ranks, small_model, size, sharding, micro_batches, dtype, options):
    """Also where ranks have shards of different sizes, and in bfloat16, whose sums are float32 both ways."""
    rows, dp_size, found = 12, size // SHARING.get(sharding, 1), []
    options += f" {small_model} {SHARDING[sharding]} --training.global_batch_size {rows} --training.steps 2"
    options += f" --training.local_batch_size {rows // dp_size // micro_batches}"
    options += f" --training.mixed_precision_param {dtype}"
    for copies in (True, False):
        folder, weights = tmp_path / str(copies), tmp_path / "weights.pt"
        words = [*COMMON, *options.split(), "--job.dump_folder", str(folder)]
        answers = ranks.run(size, *words, weights=weights, copies=copies)
        assert not copies or min(answer["buffers"] for answer in answers) > 0
        found.append(run_results(folder, weights, steps=2))
    assert max(differences(*found)) < 1e-6


def run_results(folder: Path, weights: Path, steps: int) -> tuple[list[float], list[float], torch.Tensor]:
    lines = [line for line in read_metrics(folder) if "train/batch_loss" in line]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    losses = [line[f"train/batch_{name}"] for line in lines for name in ("loss", "ar_loss", "diffusion_loss")]
    return losses, [line["train/grad_norm"] for line in lines], read_weights(weights)


def differences(found, expected) -> tuple[float, float, float]:
    """Largest relative one of the losses and of the norms, and of the weights as a whole."""
    losses, norms = (max(abs(a / b - 1) for a, b in zip(*pair)) for pair in zip(found[:2], expected[:2]))
    return losses, norms, ((found[2] - expected[2]).norm() / expected[2].norm()).item()


def test_validation_and_restart_do_not_depend_on_the_ranks(tmp_path, ranks, small_model):
    """Two ranks validate as one does, and others resume from what they have saved, with the same losses."""
    options = f"{small_model} --validation.share 0.17 --validation.freq 3 --checkpoint.interval 4 --training.steps 6"
    options += f" --training.seq_len 64 --tidar.block_size 3 --metrics.log_freq 1 --training.global_batch_size {ROWS}"
    options += " --validation.generate_prompts 3 --lr_scheduler.warmup_steps 0"
    decoded = []
    shares_rows = "--parallelism.context_parallel_degree 2"
    for run, size, local, extra in (("1", 1, 16, ""), ("2", 2, 2, ""), ("cp", 2, 8, shares_rows)):
        folder = f"--training.local_batch_size {local} --job.dump_folder {tmp_path / run} {extra}"
        answers = ranks.run(size, *options.split(), *folder.split())
        decoded.append(re.findall("decoded 3 prompts: .* tokens in", answers[0]["printed"]))
    assert len(decoded[0]) == 2 and decoded[0] == decoded[1] == decoded[2]
    resumed = (("2", 1, ""), ("cp", 1, ""), ("cp", 2, ""), ("2", 2, shares_rows))
    for number, (run, size, extra) in enumerate(resumed):
        shutil.rmtree(tmp_path / run / "checkpoint" / "step-6", ignore_errors=True)
        folder = shutil.copytree(tmp_path / run, tmp_path / f"resumed-{number}")
        extra = f"--training.local_batch_size 8 --job.dump_folder {folder} {extra}"
        ranks.run(size, *options.split(), *extra.split())
    names = [f"train/batch_{name}" for name in ("loss", "ar_loss", "diffusion_loss", "accuracy")] + ["train/grad_norm"]
    names += ["val/loss", "val/diffusion_loss_at/0", "val/accepted_prefix", "val/tokens_per_forward"]
    curves = []
    for run in ("1", "2", "cp", *(f"resumed-{number}" for number in range(len(resumed)))):
        lines = read_metrics(tmp_path / run)
        curves.append([line[name] for line in lines for name in names if name in line])
    assert len(curves[0]) == 6 * 5 + 2 * 4
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_one_device_trains_as_under_fsdp(tmp_path, ranks, small_model, micro_batches):
    """In bfloat16: the first step's losses and gradients exactly, and later ones, with a restart, closely."""
    options = f"{small_model} --training.seq_len 32 --training.steps 6 --checkpoint.interval 3 --metrics.log_freq 1"
    options += " --training.mixed_precision_param bfloat16 --validation.freq 3 --validation.share 0.17"
    options += f" --training.local_batch_size {6 // micro_batches} --training.global_batch_size 6"
    curves, weights = {}, {}
    for name, reshards in (("plain", "never"), ("fsdp", "always"), ("plain", "never")):
        folder, path = tmp_path / name, tmp_path / f"{name}.pt"
        if folder.is_dir():
            shutil.rmtree(folder / "checkpoint" / "step-6")
        extra = f"--parallelism.fsdp_reshard_after_forward {reshards} --job.dump_folder {folder}"
        ranks.run(1, *options.split(), *extra.split(), weights=path)
        lines = [line for line in read_metrics(folder) if "train/batch_loss" in line or "val/loss" in line]
        curve = [
            line[key] for line in lines for key in ("train/batch_loss", "train/grad_norm", "val/loss") if key in line
        ]
        assert name not in curves or curve == curves[name] and weights[name].equal(read_weights(path))
        curves[name], weights[name] = curve, read_weights(path)
    assert curves["plain"][:2] == curves["fsdp"][:2]
    assert curves["plain"] == pytest.approx(curves["fsdp"], rel=2e-3)
    assert (weights["plain"] - weights["fsdp"]).norm() < 2e-3 * weights["fsdp"].norm()


@pytest.mark.parametrize("pattern", ["tidar_split", "tidar_random", "block_diffusion", "causal"])
def test_ranks_that_share_rows_train_every_pattern_as_one_does(tmp_path, ranks, small_model, pattern):
    """Packed rows, blocks of drawn sizes and a part of them where the pattern knows that, and validation."""
    options = f"{small_model} --training.seq_len 64 --training.steps 4 --metrics.log_freq 1 --checkpoint.enable false"
    options += f" --validation.share 0.17 --validation.freq 4 --tidar.pattern {pattern} --training.local_batch_size 8"
    options += " --tidar.random_block_offset true" if pattern != "causal" else ""
    options += " --tidar.diffusion_share 0.6" if pattern == "tidar_random" else ""
    curves, weights = [], []
    for size, cp_size in ((1, 1), (4, 4)):
        folder, path = tmp_path / str(size), tmp_path / f"{size}.pt"
        extra = f"--job.dump_folder {folder} --parallelism.context_parallel_degree {cp_size}"
        ranks.run(size, *options.split(), *extra.split(), weights=path)
        lines = read_metrics(folder)
        names = ("train/batch_loss", "train/grad_norm", "val/loss", "val/accepted_prefix")
        curves.append([line[name] for line in lines for name in names if name in line])
        weights.append(read_weights(path))
    assert len(curves[0]) >= 4 * 2 + 1 and curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert (weights[1] - weights[0]).norm() < 1e-4 * weights[0].norm()
