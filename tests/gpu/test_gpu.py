"""What runs on a GPU only: FlexAttention's kernels and compiled layers."""

import random
import shutil
from functools import partial

import pytest
import torch
import uneven  # noqa: F401  (registers the source)
from gpu_helpers import CUDA, options_with_heads_of_128, relative
from reference import expected_mask, ids_of, listed, random_lengths, random_pattern
from results import batch_losses, read_metrics

from tidar.config import load_config
from tidar.data import Batch
from tidar.distributed import leave_world
from tidar.kernels import Kernels
from tidar.losses.objective import Objective
from tidar.models import (
    Decoder,
    MaskBuilder,
    PointMask,
    attention,
    initialize,
    pattern_mask,
    size_config,
)
from tidar.models.huggingface import decoder_config
from tidar.patterns import PATTERNS, Documents, get_pattern
from tidar.training.hooks import Hooks
from tidar.training.optim.gradients import local_gradient
from tidar.training.trainer import Trainer

pytestmark = pytest.mark.gpu


def on_cuda(documents: Documents) -> Documents:
    return Batch(documents, n_tokens=0).to(CUDA).rows


def output_and_gradients(inputs, mask, kind, **options):
    inputs = [tensor.to(kind).detach().requires_grad_() for tensor in inputs]
    out = attention(*inputs, mask, **options)
    weights = torch.linspace(-1, 1, out.shape[-1], device=CUDA).to(kind)
    return out, *torch.autograd.grad((out * weights).sum(), inputs)


def test_first_values_are_those_of_the_cpu():
    config = decoder_config(size_config("debug") | {"vocab_size": 50_000})
    models = [Decoder(config), Decoder(config).to(CUDA)]
    for model in models:
        initialize(model, seed=0)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert one.equal(other.cpu())


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_flex_equals_the_dense_loops(dtype, rounding, name):
    """One attention, forward and backward, against SDPA in float64 under the mask made by plain loops."""
    torch._dynamo.reset()
    rng = random.Random(0)
    # in the last one FlexAttention would choose its decoding kernel, and not compile it
    for seq_len, n_heads in ((128, 6), (77, 6), (300, 6), (45, 4)):
        lengths = random_lengths(rng, seq_len)
        pattern = random_pattern(name, rng, rng.randint(1, 20))
        documents = pattern.documents(ids_of(lengths), [seq_len])
        dense = expected_mask(name, pattern, documents, 0, lengths)[None, None].to(CUDA)
        q, k, v = (torch.randn(1, n, dense.shape[-1], 32, device=CUDA, dtype=dtype) for n in (n_heads, 2, 2))
        block_mask = MaskBuilder(pattern, "flex")(on_cuda(documents)).attention
        expected = output_and_gradients((q, k, v), dense, torch.float64)
        for pair in zip(output_and_gradients((q, k, v), block_mask, dtype), expected):
            assert relative(*pair) < rounding


@pytest.mark.parametrize("name", ["tidar", "causal"])  # one for each form of mask: two ranges of keys, and one
def test_flash_equals_the_dense_loops(name):
    """The same with FlashAttention-4's kernels: documents that share a row, and one that fills it."""
    pytest.importorskip("flash_attn.cute")
    torch._dynamo.reset()
    pattern = random_pattern(name, random.Random(0), 8)
    for lengths in ([700], [40, 500, 1, 159]):
        documents = pattern.documents(ids_of(lengths), [1])
        dense = expected_mask(name, pattern, documents, 0, lengths)[None, None].to(CUDA)
        shape = dense.shape[-1], 128
        q, k, v = (torch.randn(1, heads, *shape, device=CUDA, dtype=torch.bfloat16) for heads in (6, 2, 2))
        block_mask = MaskBuilder(pattern, "flash")(on_cuda(documents)).attention
        expected = output_and_gradients((q, k, v), dense, torch.float64)
        found = output_and_gradients((q, k, v), block_mask, torch.bfloat16, flash=True)
        errors = [relative(*pair) for pair in zip(found, expected)]
        print(lengths, errors)
        assert max(errors) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_rounds_as_sdpa_does(dtype):
    """Loss, logits and gradients of the model: as near to float64 with flex, compiled, as with sdpa, eager."""
    pattern = get_pattern("tidar", block_size=8, mask_token_id=257)
    lengths = [random_lengths(random.Random(row), 200) for row in range(3)]
    tokens = torch.randint(0, 256, (3, 200))
    batch = pattern.layout(tokens, torch.cat([ids_of(row) for row in lengths]), torch.ones(3, 200))
    errors = {}
    expected = None
    for backend, kind in (("sdpa", torch.float64), ("sdpa", dtype), ("flex", dtype)):
        model = Decoder(decoder_config(size_config("debug") | {"vocab_size": 258}))
        initialize(model, seed=0)
        model.to(CUDA, kind)
        documents = Documents.from_ids(torch.cat([ids_of(row) for row in lengths]).to(CUDA))
        mask = MaskBuilder(pattern, backend)(documents).attention
        targets = {
            loss: type(target)(*(tensor.to(CUDA) for tensor in vars(target).values()))
            for loss, target in batch.targets.items()
        }
        denominators = {loss: target.weights.sum() for loss, target in targets.items()}
        objective = Objective(
            {"ar": 1.0, "diffusion": 1.0}, chunk_size=300, kernels=Kernels(loss_kernel=backend == "flex")
        )
        input_ids, position_ids = batch.input_ids.to(CUDA), batch.position_ids.to(CUDA)
        head = partial(objective, targets=targets, denominators=denominators)
        loss, _ = model(input_ids, position_ids, mask, head=head)
        loss.backward()
        found = [
            loss.detach(),
            model(input_ids, position_ids, mask).detach(),
            torch.cat([parameter.grad.flatten() for parameter in model.parameters()]),
        ]
        if expected is None:
            expected = found
        else:
            errors[backend] = [relative(a, b) for a, b in zip(found, expected)]
    print(dtype, errors)
    epsilon = torch.finfo(dtype).eps
    for flex, sdpa in zip(errors["flex"], errors["sdpa"]):
        assert flex < 1.5 * sdpa + epsilon


class Watched(Hooks):
    """Counts the graphs that were compiled by the end of each step."""

    graphs = torch._dynamo.utils.counters["stats"]

    def __init__(self):
        self.compiled = []

    def after_step(self, trainer):
        self.compiled.append(self.graphs["unique_graphs"])


@pytest.mark.parametrize(
    "experiments",
    ["", "--tidar.block_sizes 4 8 --tidar.random_block_offset --tidar.diffusion_share 0.5"],
    ids=["plain", "mixed blocks"],
)
def test_training_compiles_once(tmp_path, experiments):
    """Packed rows with ever different numbers of targets: nothing compiles after step 2 but the first validation.

    Nor where block sizes, offsets and the blocks that are trained differ from row to row.
    """
    torch._dynamo.reset()
    options = f"{experiments} --data.source uneven --validation.share 0.17 --training.seq_len 128"
    options += " --training.local_batch_size 4 --training.steps 16"
    options += " --training.loss_chunk_size 50 --validation.freq 8 --metrics.log_freq 8"
    options += f" --checkpoint.enable false --job.dump_folder {tmp_path}"
    watched = Watched()
    trainer = Trainer(load_config(options.split()), watched)
    try:
        assert trainer.mask_builder.backend == "flex"
        trainer.train()
    finally:
        leave_world()
    watched.after_step(trainer)  # the last validation comes after the last step
    after_steps, after_validation = watched.compiled[:8], watched.compiled[8:]
    assert after_steps[0] > 0
    assert len(set(after_steps[1:])) == 1
    assert len(after_validation) == 9 and len(set(after_validation)) == 1


class WithoutWaits(Hooks):
    """From the end of step 3 to that of the last but one, what makes the host wait for the device is an error."""

    watched = 0  # steps

    def after_step(self, trainer):
        self.watched += torch.cuda.get_sync_debug_mode() == 2
        waits = trainer.step < 3 or trainer.step >= trainer.steps - 1
        torch.cuda.set_sync_debug_mode("default" if waits else "error")


@pytest.mark.parametrize("options", ["", "--optimizer.state_dtype bfloat16", "--training.global_batch_size 8"])
def test_the_host_does_not_wait_for_the_device(tmp_path, options):
    """So that it begins a step while the one before is still computed, and a slow host delays nothing."""
    torch._dynamo.reset()
    options = f"{options} --data.source uneven --training.seq_len 128 --training.local_batch_size 4 --training.steps 8"
    options += f" --metrics.log_freq 100 --checkpoint.enable false --job.dump_folder {tmp_path}"
    hooks = WithoutWaits()
    try:
        Trainer(load_config(options.split()), hooks).train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        leave_world()
    assert hooks.watched == 4


@pytest.mark.parametrize("name", PATTERNS)
def test_direct_block_mask_equals_the_evaluated_one(name):
    """On the device: tiles, their order, pairs; and it is built without a wait for the device."""
    torch._dynamo.reset()
    rng = random.Random(5)
    for number in range(4):
        lengths = [random_lengths(rng, 1000) for _ in range(2)]
        pattern = random_pattern(name, rng, rng.randint(1, 300))
        pattern.diffusion_share = 1.0
        documents = on_cuda(pattern.documents(torch.cat([ids_of(row) for row in lengths]), [number, number + 1]))
        torch.cuda.set_sync_debug_mode("error")
        try:
            mask = pattern_mask(pattern, documents)
            direct, pairs = mask.block_mask(), mask.allowed_pairs()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        points = PointMask(mask.mask_mod, 2, mask.n_queries, mask.n_keys, CUDA)  # as a user's mask
        evaluated = points.block_mask()
        for of in ("kv", "full_kv", "q", "full_q"):
            assert listed(direct, of) == listed(evaluated, of)
        assert pairs == points.allowed_pairs()


def test_another_pattern_compiles_at_most_once():
    """Rows of ever new documents and blocks under each pattern, in batches of one shape, forward and backward."""
    torch._dynamo.reset()
    rng = random.Random(6)
    graphs = Watched.graphs
    q, k, v = (torch.randn(2, heads, 256, 32, device=CUDA, requires_grad=True) for heads in (6, 2, 2))
    for name in PATTERNS:
        seq_len = 128 if name in ("tidar", "tidar_random", "block_diffusion") else 256
        before = graphs["unique_graphs"]
        for number in range(5):
            options = {"block_sizes": [4, 8, rng.randint(1, 30)], "random_block_offset": True}
            pattern = get_pattern(name, **({} if name == "causal" else options))
            ids = torch.cat([ids_of(random_lengths(rng, seq_len)) for _ in range(2)])
            mask = MaskBuilder(pattern, "flex")(on_cuda(pattern.documents(ids, [number, -number]))).attention
            attention(q, k, v, mask).sum().backward()
        print(name, graphs["unique_graphs"] - before)
        assert graphs["unique_graphs"] - before <= 1


def test_deterministic_runs_repeat_bit_for_bit(tmp_path):
    """bfloat16, flex and compile: the same run twice, the second one stopped in its middle."""
    options = "--training.deterministic --training.seq_len 256 --training.steps 8 --metrics.log_freq 1"
    options += " --checkpoint.interval 4 --validation.steps 2"
    curves = []
    for name in ("whole", "stopped", "stopped"):
        trainer = Trainer(load_config([*options.split(), "--job.dump_folder", str(tmp_path / name)]))
        try:
            trainer.train()
        finally:
            leave_world()
        assert not torch.are_deterministic_algorithms_enabled()
        lines = read_metrics(tmp_path / name)
        curves.append([{k: v for k, v in line.items() if not k.startswith(("perf", "memory"))} for line in lines])
        if name == "stopped" and len(curves) == 2:
            shutil.rmtree(tmp_path / name / "checkpoint" / "step-8")
    assert len(curves[0]) == 9 and curves[0] == curves[1] == curves[2]


def losses_of(folder, options: str, hooks: Hooks | None = None) -> list[float]:
    """Trains with these options; returns train/batch_loss of all steps."""
    options = [*options.split(), "--metrics.log_freq", "1", "--job.dump_folder", str(folder)]
    trainer = Trainer(load_config(options), hooks)
    try:
        trainer.train()
    finally:
        leave_world()
    losses_of.trainer = trainer
    return batch_losses(folder)


ENGINES = {
    "none": "",
    "full": "--activation_checkpoint.mode full",
    "selective": "--activation_checkpoint.mode selective",
    "full in one of four": "--activation_checkpoint.mode full --activation_checkpoint.layers 1",
    "selective, eager": "--activation_checkpoint.mode selective --compile.enable false",
    "offload": "--training.enable_cpu_offload",
    "full, offload, never": "--activation_checkpoint.mode full --training.enable_cpu_offload "
    "--parallelism.fsdp_reshard_after_forward never",
}


def test_same_numbers_with_each_engine(tmp_path):
    """Checkpointing of activations and offload change nothing but memory and time, and nothing compiles again."""
    common = "--training.seq_len 256 --training.local_batch_size 4 --training.global_batch_size 8 --training.steps 10"
    common += " --training.mixed_precision_param float32 --validation.enable false --checkpoint.enable false"
    curves, graphs = {}, {}
    for name, options in ENGINES.items():
        torch._dynamo.reset()
        before = Watched.graphs["unique_graphs"]
        curves[name] = losses_of(tmp_path / name.replace(", ", "-").replace(" ", "-"), f"{common} {options}", Watched())
        counts = [number - before for number in losses_of.trainer.hooks.compiled]
        graphs[name] = counts[-1]
        assert len(set(counts[1:])) == 1
    print(graphs, {name: max(abs(a / b - 1) for a, b in zip(curve, curves["none"])) for name, curve in curves.items()})
    for curve in curves.values():
        assert curve == pytest.approx(curves["none"], rel=1e-5)
    # graphs of the layer, the last norm, the loss and the block mask: not one for each of the four layers
    assert len(set(graphs[name] for name in ("none", "full", "selective", "offload"))) == 1


def test_the_fast_way_follows_plain_float32(tmp_path):
    """50 steps in bfloat16, compiled, with the fastest attention there is, beside float32, eager, dense masks."""
    common = options_with_heads_of_128(tmp_path)
    fast = losses_of(tmp_path / "fast", common, FirstGradients())
    gradients = losses_of.trainer.hooks.gradients
    again = losses_of(tmp_path / "again", common)
    plain = losses_of(
        tmp_path / "plain",
        f"{common} --training.mixed_precision_param float32 --model.attention_backend sdpa --compile.enable false",
        FirstGradients(),
    )
    errors = [abs(a / b - 1) for a, b in zip(fast, plain)]
    gradient_error = relative(gradients, losses_of.trainer.hooks.gradients)
    print(max(errors), sum(errors) / 50, gradient_error, max(abs(a / b - 1) for a, b in zip(fast, again)))
    assert plain[-1] < 0.7 * plain[0]
    assert max(errors) < 2e-3 and gradient_error < 2e-2
    assert again == pytest.approx(fast, rel=1e-3)


def test_float8_follows_bfloat16(tmp_path):
    """50 steps, compiled, with the MLP in FP8 beside bfloat16, and with checkpointing of activations."""
    common = options_with_heads_of_128(tmp_path)
    wide = losses_of(tmp_path / "wide", common, FirstGradients())
    gradients = losses_of.trainer.hooks.gradients
    narrow = losses_of(tmp_path / "narrow", f"{common} --training.float8 true", FirstGradients())
    assert "MLP in float8" in losses_of.trainer.plan.kernels.describe()
    errors = [abs(a / b - 1) for a, b in zip(narrow, wide)]
    gradient_error = relative(losses_of.trainer.hooks.gradients, gradients)
    print(max(errors), sum(errors) / 50, gradient_error)
    assert wide[-1] < 0.7 * wide[0]
    assert max(errors) < 2e-3 and 5e-3 < gradient_error < 0.05
    for mode in ("selective", "full"):
        torch._dynamo.reset()
        options = f"{common} --training.float8 true --activation_checkpoint.mode {mode}"
        curve = losses_of(tmp_path / mode, options)
        print(mode, max(abs(a / b - 1) for a, b in zip(curve, narrow)))
        assert curve == pytest.approx(narrow, rel=5e-4)


def test_float8_with_any_number_of_positions(tmp_path):
    """Of which 16 divide none: the products of the weights' gradients are padded."""
    common = "--tidar.pattern causal --training.seq_len 77 --training.local_batch_size 1 --training.steps 20"
    common += " --validation.enable false --checkpoint.enable false"
    wide, narrow = (losses_of(tmp_path / kind, f"{common} --training.float8 {kind}") for kind in ("false", "true"))
    assert narrow == pytest.approx(wide, rel=2e-2) and narrow != wide


class FirstGradients(Watched):
    """Keeps the gradients of step 1, all in one vector."""

    gradients = None

    def on_micro_batch(self, trainer, rows, loss, scores):
        def keep(optimizer, *_):
            if self.gradients is None:
                local = [local_gradient(parameter, trainer.updates.copies) for parameter in trainer.model.parameters()]
                self.gradients = torch.cat([gradient.flatten().double() for gradient in local])

        if trainer.step == 0:
            trainer.updates.optimizer.register_step_pre_hook(keep)
        return loss


def test_float16_follows_bfloat16(tmp_path):
    common = "--training.seq_len 256 --training.local_batch_size 8 --training.steps 200 --lr_scheduler.warmup_steps 20"
    common += " --validation.enable false --checkpoint.enable false --training.mixed_precision_param"
    half = losses_of(tmp_path / "half", f"{common} float16")
    wide = losses_of(tmp_path / "wide", f"{common} bfloat16")
    errors = [abs(a / b - 1) for a, b in zip(half, wide) if a == a]
    print(max(errors), abs(sum(half[-20:]) / sum(wide[-20:]) - 1))
    assert len(half) == len(wide) == 200 and sum(half[-20:]) == pytest.approx(sum(wide[-20:]), rel=5e-3)


def test_flex_and_sdpa_train_alike(tmp_path):
    """The same run in float32, compiled with flex and eager with sdpa; gradient accumulation on one of them."""
    curves = []
    for options in (
        "--model.attention_backend flex --compile.enable true",
        "--model.attention_backend flex --training.local_batch_size 4",
        "--model.attention_backend sdpa --compile.enable false --training.local_batch_size 4",
    ):
        folder = tmp_path / str(len(curves))
        common = "--training.global_batch_size 8 --training.seq_len 128 --training.steps 10 --metrics.log_freq 1"
        common += f" --training.mixed_precision_param float32 --validation.steps 2 --job.dump_folder {folder}"
        trainer = Trainer(load_config([*common.split(), *options.split()]))
        try:
            trainer.train()
        finally:
            leave_world()
        curves.append(batch_losses(folder))
        assert 0 < read_metrics(folder)[0]["perf/mfu"] < 1
    assert len(curves[0]) == 10
    assert curves[0] == pytest.approx(curves[2], rel=1e-4) and curves[1] == pytest.approx(curves[2], rel=1e-4)
