"""Two devices (and four and eight GPUs) train as one does: on GPUs with the mark gpu2, on CPUs with the mark long."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from gpu_helpers import KERNELS, options_with_heads_of_128
from rank_pool import RankPool
from results import batch_losses, of_steps, read_weights

ROOT = Path(__file__).parents[2]
ROWS, STEPS = 8, 20
NORMS = 6  # first gradient norms that float32 runs compare to 1e-5: they show the weights' rounding before losses do
FLOAT32 = f"""
    --training.mixed_precision_param float32 --training.seq_len 64 --tidar.block_size 3 --training.steps {STEPS}
    --training.global_batch_size {ROWS} --validation.enable false --metrics.log_freq 1 --lr_scheduler.warmup_steps 0
"""
SHARDING = {
    "default": "",
    "always": "--parallelism.fsdp_reshard_after_forward always",
    "never": "--parallelism.fsdp_reshard_after_forward never",
    "reduced once a step": "--parallelism.gradient_reduction step",
    "two replicas": "--parallelism.data_parallel_replicate_degree 2",
    "replicas": "--parallelism.data_parallel_replicate_degree {size} --parallelism.data_parallel_shard_degree 1",
}


@pytest.fixture(
    scope="module",
    params=[pytest.param("cuda", marks=pytest.mark.gpu2), pytest.param("cpu", marks=pytest.mark.long)],
)
def pool(request):
    with RankPool(request.param) as pool:
        yield pool


@pytest.fixture(scope="module")
def wide_model(pool, tmp_path_factory, uneven_data) -> str:
    """Options of a model whose attention FlashAttention-4 can do; of few steps on a CPU, which is slow in bfloat16."""
    options = f"{options_with_heads_of_128(tmp_path_factory.mktemp('wide'))} {uneven_data} --metrics.log_freq 1"
    return f"{options} --training.seq_len 128 --training.steps {20 if pool.device == 'cuda' else 2}"


class Curve(NamedTuple):
    """The losses and gradient norms of all steps of a run."""

    losses: list[float]
    norms: list[float]

    def errors(self, expected: "Curve", n_norms: int | None = None) -> tuple[float, float]:
        """The largest of the losses and of the first `n_norms` gradient norms, or of all of them, relative."""
        assert len(self.losses) == len(expected.losses) > 0 and len(self.norms) == len(expected.norms) > 0
        losses, norms = ([abs(a / b - 1) for a, b in zip(*both)] for both in zip(self, expected))
        return max(losses), max(norms[:n_norms])


def train(pool: RankPool, folder: Path, size: int, options: str, micro_batches: int = 1, rows: int = 0) -> Curve:
    """A run on `size` devices. rows: of each, by default its part of ROWS."""
    rows = rows or ROWS // size // micro_batches
    options = f"{options} --training.local_batch_size {rows} --job.dump_folder {folder}"
    train.answers = pool.run(size, *options.split(), weights=folder.with_suffix(".pt"))
    assert not (error := train.answers[0].get("error")), error
    return Curve(*(of_steps(folder, f"train/{name}") for name in ("batch_loss", "grad_norm")))


def sizes(pool: RankPool) -> list[int]:
    """Numbers of devices that are compared with one: 2, and 4 and 8 where there are so many GPUs."""
    return [size for size in (2, 4, 8) if size <= (torch.cuda.device_count() if pool.device == "cuda" else 2)]


def difference(folder: Path, other: Path) -> float:
    """Of the weights that two runs have trained, relative."""
    found, expected = (read_weights(path.with_suffix(".pt")) for path in (folder, other))
    return ((found - expected).norm() / expected.norm()).item()


def test_every_sharding_has_the_numbers_of_one_device(tmp_path, pool, small_model):
    options = f"{small_model} {FLOAT32} --checkpoint.enable false"
    expected = train(pool, tmp_path / "one", 1, options)
    assert len(expected.losses) == STEPS
    cases = itertools.product(sizes(pool), SHARDING.items(), (1, 2))
    for number, (size, (name, sharding), micro_batches) in enumerate(cases):
        if size * micro_batches > ROWS:
            continue
        folder = tmp_path / str(number)
        found = train(pool, folder, size, f"{options} {sharding.format(size=size)}", micro_batches)
        errors = *found.errors(expected, NORMS), difference(folder, tmp_path / "one")
        text = "losses {:.1e}, gradient norms {:.1e}, weights {:.1e}".format(*errors)
        print(f"{size} devices, {name}, {micro_batches} micro-batches: {text}")
        assert max(errors[:2]) < 1e-5 and errors[2] < 1e-4, (size, name)


def test_bfloat16_differs_by_its_rounding(tmp_path, pool, wide_model):
    options = f"{wide_model} --training.mixed_precision_param bfloat16"
    one, two = (train(pool, tmp_path / str(size), size, options) for size in (1, 2))
    losses, norms = two.errors(one)
    print(f"losses {losses:.1e}, norms {norms:.1e}")
    assert 0 < losses < 5e-3 and norms < 5e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "micro_batches, options",
    [
        (1, "--parallelism.fsdp_reshard_after_forward always"),
        (2, "--parallelism.gradient_reduction step"),
        (2, ""),
    ],
)
def test_copies_between_devices_give_what_nccl_gives(tmp_path, pool, wide_model, dtype, micro_batches, options):
    """Two terms have one sum, in whichever order; in bfloat16 both are summed in float32."""
    if pool.device == "cpu":
        pytest.skip("copies are between GPUs")
    options += f" {wide_model} --training.mixed_precision_param {dtype} --training.deterministic --training.steps 3"
    curves = {}
    for how in ("default", "nccl"):
        curves[how] = train(pool, tmp_path / how, 2, f"{options} --parallelism.fsdp_collectives {how}", micro_batches)
        assert how == "nccl" or train.answers[0]["buffers"] > 0
    assert curves["default"] == curves["nccl"] and difference(tmp_path / "default", tmp_path / "nccl") == 0


def test_a_checkpoint_resumes_on_another_number_of_devices(tmp_path, pool, small_model):
    options = f"{small_model} {FLOAT32} --checkpoint.interval {STEPS // 2}"
    curves = {size: train(pool, tmp_path / str(size), size, options) for size in (1, *sizes(pool))}
    for size, found in curves.items():
        assert max(found.errors(curves[1], NORMS)) < 1e-5, size
    for before, after in itertools.permutations(curves, 2):
        folder = shutil.copytree(tmp_path / str(before), tmp_path / f"{before}-{after}")
        shutil.rmtree(folder / "checkpoint" / f"step-{STEPS}")
        resumed = train(pool, folder, after, options)
        assert f"resumed from step {STEPS // 2}" in train.answers[0]["printed"]
        assert max(resumed.errors(curves[1], NORMS)) < 1e-5
        assert difference(folder, tmp_path / "1") < 1e-4


def test_fused_kernels_under_fsdp_follow_plain_float32(tmp_path, pool, wide_model):
    """In bfloat16, compiled, beside float32, eager, dense masks: both on two devices."""
    fast, plain = (
        "--training.mixed_precision_param bfloat16",
        "--training.mixed_precision_param float32 --model.attention_backend sdpa --compile.enable false",
    )
    train(pool, tmp_path / "fast", 2, f"{wide_model} {fast}")
    if pool.device == "cuda" and KERNELS.fused_matmul:
        assert "QuACK matmuls, loss without logits" in train.answers[0]["printed"]
    train(pool, tmp_path / "plain", 2, f"{wide_model} {plain}")
    losses = [batch_losses(tmp_path / name) for name in ("fast", "plain")]
    errors = [abs(a / b - 1) for a, b in zip(*losses)]
    print(max(errors))
    assert max(errors) < 5e-3
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize(
    "shared, kernels", [("context", "float32"), ("context", "flash"), ("tensor", "float32"), ("tensor", "flash")]
)
def test_two_devices_share_rows(tmp_path, pool, small_model, wide_model, shared, kernels):
    """Context and tensor parallelism: in float32, and with FlashAttention-4's kernels where it is installed."""
    if kernels == "flash":
        if pool.device == "cpu" or KERNELS.attention != "flash":
            pytest.skip("FlashAttention-4 does not run here")
        options = f"{wide_model} --model.attention_backend flash --training.seq_len 512"
        bounds, n_norms = (5e-3, 5e-2), None
    else:
        options = f"{small_model} {FLOAT32} --checkpoint.enable false"
        bounds, n_norms = (1e-5, 1e-5), NORMS
    one = train(pool, tmp_path / "one", 1, options)
    # each of the two has all rows
    two = train(pool, tmp_path / "two", 2, f"{options} --parallelism.{shared}_parallel_degree 2", rows=ROWS)
    losses, norms = two.errors(one, n_norms)
    print(f"losses {losses:.1e}, norms {norms:.1e}")
    assert losses < bounds[0] and norms < bounds[1]


@pytest.mark.parametrize(
    "vocab, engine",
    [
        (384, "QuACK matmuls, loss without logits"),
        (392, "no loss without logits: needs a multiple of 64 tokens on each device, not 196"),
    ],
)
def test_two_devices_share_the_vocabulary(tmp_path, tmp_path_factory, pool, uneven_data, vocab, engine):
    """Losses, accuracies and gradient norms of one device, by exponentials and by logits."""
    model = options_with_heads_of_128(tmp_path_factory.mktemp("model"), vocab)
    options = f"{model} {uneven_data} --metrics.log_freq 1"
    options += f" --training.seq_len 128 --training.steps {10 if pool.device == 'cuda' else 2}"
    one = train(pool, tmp_path / "one", 1, options)
    two = train(pool, tmp_path / "two", 2, f"{options} --parallelism.tensor_parallel_degree 2", rows=ROWS)
    if pool.device == "cuda" and KERNELS.fused_matmul:
        assert engine in train.answers[0]["printed"]
    losses, norms = two.errors(one)
    assert losses < 5e-3 and norms < 5e-2
    accuracies = [of_steps(tmp_path / run, "train/batch_accuracy") for run in ("one", "two")]
    assert accuracies[1] == pytest.approx(accuracies[0], abs=2e-2)


def test_a_rank_that_is_killed_ends_the_run_and_is_named(tmp_path, pool):
    options = "--data.source uneven --data.num_workers 0 --validation.enable false --training.seq_len 64"
    options += " --training.local_batch_size 2 --training.steps 5 --checkpoint.interval 1 --metrics.log_freq 1"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "tests/faulty.py",
    ]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if pool.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    finished = subprocess.run(
        [*command, "kill", *options.split(), "--job.dump_folder", str(tmp_path)], cwd=ROOT, env=os.environ | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200,
    )  # fmt: skip
    ended_at, output = time.time(), finished.stdout
    (killed_at,) = map(float, re.findall(r"fault at ([\d.]+)", output))
    assert finished.returncode != 0 and ended_at - killed_at < 20, output
    assert re.search(r"rank +: 1", output) and "SIGKILL" in output
    assert '"outcome": "failed"' in (tmp_path / "outcome.json").read_text()


def test_ranks_use_the_device_that_they_are_tested_on(tmp_path, pool, small_model):
    train(pool, tmp_path / "run", 2, f"{small_model} {FLOAT32} --training.steps 1 --checkpoint.enable false")
    assert f"engine   {pool.device}, torch.float32" in train.answers[0]["printed"]
    assert pool.device == "cpu" or torch.cuda.device_count() >= 2
