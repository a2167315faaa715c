"""Our kernels, and those of other libraries in our use of them, beside plain torch in a wider type."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from gpu_helpers import CUDA, KERNELS, needs_quack, relative
from torch.nn import functional as F

from tidar.kernels import Kernels
from tidar.kernels.matmul import TILES, gated_mlp, linear, quack_matmul
from tidar.kernels.norm_rotary import RotatedHeads, norm_backward
from tidar.losses.objective import Objective, _fused_score_logits, _score_logits, _score_part_of_logits
from tidar.models import WHOLE, size_config
from tidar.models.decoder import plain_linear
from tidar.patterns import Targets
from tidar.training.optim.optimizer import Numbers, OfParameter, _update_in_pieces, addressable

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_kernel_equals_plain_torch(dtype):
    """Vocabularies around the kernel's block, and logits of which many are the largest."""
    for vocab in (130, 8192, 20001):
        logits = (3 * torch.randn(50, vocab, device=CUDA)).to(dtype)
        logits[:20] = logits[:20].round()
        labels, coefficients = torch.randint(0, vocab, (50,), device=CUDA), torch.rand(50, device=CUDA)
        labels[::2] = logits[::2].argmax(dim=-1)
        expected = _score_logits(logits.double(), labels, coefficients.double(), True)
        nll, correct, gradient = _fused_score_logits(logits.clone(), labels, coefficients, True)
        assert correct.equal(expected[1]) and 25 <= correct.sum() < 50
        assert relative(nll, expected[0]) < 1e-6 and relative(gradient, expected[2]) < torch.finfo(dtype).eps + 1e-6
        assert _fused_score_logits(logits.clone(), labels, coefficients, False)[0].equal(nll)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_kernels_of_parts_of_the_vocabulary_equal_plain_torch(dtype):
    """Parts smaller and larger than the kernel's block; rows with several largest logits, of which the first counts."""
    from tidar.kernels.cross_entropy import summary

    for columns, ranks in ((65, 2), (2500, 4), (10000, 2)):
        vocab = columns * ranks
        logits = (3 * torch.randn(50, vocab, device=CUDA)).to(dtype)
        logits[:20] = logits[:20].round().clamp(max=3)
        labels, coefficients = torch.randint(0, vocab, (50,), device=CUDA), torch.rand(50, device=CUDA)
        labels[::2] = logits[::2].argmax(dim=-1)
        # wrong: the last of the largest in the first part, the first of them in the last part
        labels[1:20:4] = columns - 1 - logits[1:20:4, :columns].flip(1).argmax(dim=-1)
        labels[3:20:4] = vocab - columns + logits[3:20:4, -columns:].argmax(dim=-1)
        expected = _score_logits(logits.double(), labels, coefficients.double(), True)
        parts = [part.contiguous() for part in logits.split(columns, dim=1)]
        of_ranks = torch.stack([summary(part, labels - i * columns, torch.float32) for i, part in enumerate(parts)])
        gradients = []
        for rank, part in enumerate(parts):
            shard = SimpleNamespace(rank=rank, stacked=lambda _, of_ranks=of_ranks: of_ranks)
            nll, correct, gradient = _score_part_of_logits(part, labels, coefficients, True, shard, fused=True)
            assert correct.equal(expected[1]) and relative(nll, expected[0]) < 1e-6
            assert gradient.data_ptr() == part.data_ptr()
            gradients.append(gradient)
        assert relative(torch.cat(gradients, dim=1), expected[2]) < torch.finfo(dtype).eps + 1e-6
        assert 25 <= expected[1].sum() < 50


@needs_quack
def test_the_loss_without_logits_equals_float64():
    """Chunks of any length; targets that are right, and that are far below the others."""
    for n, dim, vocab, chunk_size in (
        (1001, 256, 64, 300),
        (301, 128, 320, 100),
        (900, 128, 960, 900),
        (4096, 1536, 151936, 4096),
    ):
        hidden, weight = torch.randn(1, n, dim, device=CUDA).bfloat16(), torch.randn(vocab, dim, device=CUDA)
        weight = (4 * weight / dim**0.5).bfloat16()
        hidden[0, 100:200] *= 3
        labels = torch.randint(0, vocab, (n,), device=CUDA)
        labels[::3] = (hidden[0, ::3] @ weight.T).argmax(dim=-1)
        weights = torch.rand(n, device=CUDA)
        weights[5:50] = 0
        targets = {"ar": Targets(torch.arange(n, device=CUDA), labels, weights, torch.zeros_like(labels))}
        denominators = {"ar": torch.tensor(7.0, device=CUDA)}

        def losses(objective, kind, targets=targets, denominators=denominators, inputs=(hidden, weight)):
            leaves = [tensor.to(kind).requires_grad_() for tensor in inputs]
            loss, scores = objective(*leaves, targets, denominators)
            return scores["ar"].correct, loss, scores["ar"].nll, *torch.autograd.grad(loss, leaves)

        exact = losses(Objective({"ar": 1.0}, 500), torch.float64)
        plain = losses(
            Objective({"ar": 1.0}, chunk_size, Kernels(loss_kernel=True)),
            torch.bfloat16,
        )
        found = losses(Objective({"ar": 1.0}, chunk_size, KERNELS), torch.bfloat16)
        errors = [[relative(*pair) for pair in zip(values[1:], exact[1:])] for values in (found, plain)]
        print(errors, (found[0] != exact[0]).sum().item(), (plain[0] != exact[0]).sum().item())
        assert (found[0] != exact[0]).sum() <= 1 < exact[0].sum() < n
        assert max(errors[0][:2]) < 1e-5 and all(a < 1.6 * b for a, b in zip(errors[0][2:], errors[1][2:]))


@needs_quack
def test_the_loss_without_logits_stays_finite():
    """Where a target's probability is less than float32 can tell."""
    hidden, weight = torch.randn(1, 64, 128, device=CUDA).bfloat16(), torch.randn(256, 128, device=CUDA).bfloat16()
    hidden *= 10
    logits = hidden[0].double() @ weight.double().T
    labels = logits.argmin(dim=-1)
    targets = {"ar": Targets(torch.arange(64, device=CUDA), labels, torch.ones(64, device=CUDA), 0 * labels)}
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    objective = Objective({"ar": 1.0}, 64, KERNELS)
    loss, scores = objective(*leaves, targets, {"ar": torch.tensor(64.0, device=CUDA)})
    d_hidden, d_weight = torch.autograd.grad(loss, leaves)
    assert (logits.logsumexp(dim=-1) - logits.amin(dim=-1)).min() > 200
    assert scores["ar"].nll.min() > 110 and not scores["ar"].correct.any()
    assert d_hidden.isfinite().all() and d_weight.isfinite().all()
    # what the target lacks goes to those above it
    assert ((d_hidden[0].double() @ weight.double().T).gather(1, labels[:, None]) < 0).all()


TURN = threading.Lock()


class Part:
    """One rank's part of a vocabulary. The ranks are threads, of which one computes at a time."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, values: dict[int, torch.Tensor]):
        self.rank, self.size, self.barrier, self.values = rank, size, barrier, values

    def stacked(self, x):
        self.values[self.rank] = x.clone()
        self.wait()
        found = torch.stack([self.values[rank] for rank in range(self.size)])
        self.wait()
        return found

    def wait(self):
        TURN.release()
        self.barrier.wait(60)
        TURN.acquire()

    def total(self, value):
        return self.stacked(value).sum(dim=0)


@needs_quack
def test_ranks_with_parts_of_the_vocabulary_have_the_loss_of_the_whole():
    """Parts of whole tiles and of others; losses and hits are the same on all ranks, gradients sum to the whole's."""
    n, dim = 500, 256
    for vocab, ranks in ((768, 2), (1280, 2), (1024, 4)):
        hidden = torch.randn(1, n, dim, device=CUDA).bfloat16()
        weight = (4 * torch.randn(vocab, dim, device=CUDA) / dim**0.5).bfloat16()
        labels = torch.randint(0, vocab, (n,), device=CUDA)
        labels[::3] = (hidden[0, ::3] @ weight.T).argmax(dim=-1)
        weights = torch.rand(n, device=CUDA)
        targets = {"ar": Targets(torch.arange(n, device=CUDA), labels, weights, torch.zeros_like(labels))}

        def losses(weight, shard, inputs=hidden, targets=targets):
            leaves = [inputs.clone().requires_grad_(), weight.clone().requires_grad_()]
            objective = Objective({"ar": 1.0}, 200, KERNELS, shard=shard)
            loss, scores = objective(*leaves, targets, {"ar": torch.tensor(7.0, device=CUDA)})
            return loss, scores["ar"].nll, scores["ar"].correct, *torch.autograd.grad(loss, leaves)

        def by_turns(weight, shard, losses=losses):
            with TURN:
                return losses(weight, shard)

        expected = losses(weight, WHOLE)
        barrier, values = threading.Barrier(ranks), {}
        parts = [Part(rank, ranks, barrier, values) for rank in range(ranks)]
        with ThreadPoolExecutor(ranks) as pool:
            found = list(pool.map(by_turns, weight.chunk(ranks), parts))
        for loss, nll, correct, *_ in found:
            assert loss.equal(found[0][0]) and nll.equal(found[0][1]) and correct.equal(found[0][2])
        assert relative(found[0][1], expected[1].double()) < 1e-6 and (found[0][2] != expected[2]).sum() <= 1
        assert relative(sum(one[3].double() for one in found), expected[3].double()) < 4e-3
        assert relative(torch.cat([one[4] for one in found]), expected[4].double()) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_backward_equals_plain_torch(dtype):
    """Few rows and many, of sizes around a power of two."""
    for shape in ((3, 16), (2, 700, 1536), (5000, 130), (999, 5120)):
        d_out, d_residual, x = (torch.randn(shape).to(dtype) for _ in range(3))
        weight = torch.rand(shape[-1]).to(dtype)
        inputs = d_out, d_residual, x, weight, torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        # in float32 but for the rounded norm, whose rounding the weight's gradient contains
        expected = norm_backward(*(value.float() for value in inputs))
        found = norm_backward(*(value.to(CUDA) for value in inputs))
        for pair in zip(found, expected):
            assert pair[0].dtype == dtype
            assert relative(pair[0].cpu(), pair[1].double()) < max(1e-6, torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_backward_equals_autograd(dtype):
    """Of gradients that lie in memory as attention leaves them, and otherwise."""
    for rows, positions, head_dim, n_heads, kv in ((2, 77, 24, 4, 2), (1, 300, 128, 12, 2), (1, 50, 32, 5, 5)):
        heads = torch.randn(rows, positions, n_heads + 2 * kv, head_dim, device=CUDA).to(dtype).requires_grad_()
        for batch in {1, rows}:
            angles = torch.randn(batch, 1, positions, head_dim // 2, device=CUDA).repeat(1, 1, 1, 2)
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
            found = RotatedHeads.apply(heads, cos, sin, kv)
            d_parts = [torch.randn_like(part) for part in found]
            d_parts[0] = d_parts[0].transpose(1, 2).contiguous().transpose(1, 2)
            d_parts[1] = d_parts[1].mT.contiguous().mT
            (gradient,) = torch.autograd.grad(found, heads, d_parts)
            wide = heads.detach().double().requires_grad_()
            expected = RotatedHeads.forward(FakeContext(), wide, cos.double(), sin.double(), kv)
            (exact,) = torch.autograd.grad(expected, wide, [part.double() for part in d_parts])
            assert gradient.is_contiguous() and relative(gradient, exact) < torch.finfo(dtype).eps


class FakeContext:
    def save_for_backward(self, *_):
        pass


@needs_quack
def test_fused_matmuls_equal_plain_ones():
    """As near to float64, gradients too, where tiles are many, few, and of sizes that no vector divides.

    Alone, with a bias, and with a residual.
    """
    for m, k, n in (1536, 8192, 8960), (100, 64, 64), (4000, 1536, 2045):
        x, weight = torch.randn(m, k), torch.randn(n, k) / k**0.5
        check_matmuls(linear, F.linear, (x, weight))
        check_matmuls(linear, F.linear, (x, weight, torch.randn(n)))
        check_matmuls(with_residual(linear), with_residual(plain_linear), (x, weight, torch.randn(m, n)))


def with_residual(multiply):
    return lambda x, weight, residual: multiply(x, weight, None, residual)


@needs_quack
@pytest.mark.parametrize("tile", TILES)
def test_each_tile_equals_plain_matmuls(tile):
    """Of sizes that it does not divide: with a matrix or bias added, and with concatenated rows of gate and up."""
    torch.manual_seed(0)
    a, b, c = (torch.randn(shape, device=CUDA).bfloat16() for shape in ((1008, 2000), (2000, 840), (1008, 840)))
    tall = torch.randn(2000, 1008, device=CUDA).bfloat16().T
    interleaved = torch.stack(b.double().chunk(2), dim=1).flatten(0, 1)
    rows = tall.double() @ b.double()
    for found, exact in (
        (quack_matmul(a, b, tile, c), c.double() + a.double() @ b.double()),
        (quack_matmul(a, b, tile, bias=c[0]), c[0].double() + a.double() @ b.double()),
        (quack_matmul(a, b, tile, concatenated=("B",)), a.double() @ interleaved),
        (quack_matmul(tall, b, tile, concatenated=("out",)), torch.cat([rows[::2], rows[1::2]])),
    ):
        assert relative(found, exact) < 3e-3


@needs_quack
def test_the_fused_mlp_equals_the_plain_one():
    """With tiles that are dealt at the start, and, where there are more than SMs, as SMs become free."""
    for n, dim, hidden, dynamic in ((300, 256, 768, False), (1000, 1536, 8960, False), (1000, 1536, 8960, True)):
        shapes = (2, n, dim), (2 * hidden, dim), (dim, hidden), (2, n, dim)
        fused = partial(gated_mlp, dynamic=dynamic)
        check_matmuls(fused, plain_mlp, [torch.randn(shape) / dim**0.25 for shape in shapes])


def check_matmuls(fast, plain, inputs):
    for dtype in (torch.bfloat16, torch.float16):
        errors, expected, weights = [], None, None
        for kind, multiply in ((torch.float64, plain), (dtype, plain), (dtype, torch.compile(fast, fullgraph=True))):
            leaves = [tensor.to(CUDA, dtype).to(kind).requires_grad_() for tensor in inputs]
            out = multiply(*leaves)
            weights = torch.randn_like(out).to(dtype) if weights is None else weights
            found = [out, *torch.autograd.grad((out * weights).sum(), leaves)]
            expected = expected or found
            errors.append([relative(*pair) for pair in zip(found, expected)])
        print(dtype, errors[1:])
        assert all(fast <= 1.2 * plain for fast, plain in zip(errors[2], errors[1]))


def plain_mlp(x, gate_up, down, residual):
    gate, up = gate_up.chunk(2)
    return residual + (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [0, 30])
def test_the_optimizers_kernel_equals_plain_torch(state_dtype, gradient_dtype, gap):
    """Sizes around the kernel's block, with copies where gradients are narrow; and a step that is to be skipped.

    gap: of the numbers of elements after each 10, as where columns are divided.
    """
    from tidar.kernels.adamw import BLOCK, update_all  # Triton comes with CUDA's torch only

    sizes = [1, BLOCK - 1, 0, BLOCK, 12 * BLOCK + 5, 3]

    def make():
        torch.manual_seed(0)
        made = []
        for size in sizes:
            values = (torch.randn(size, device=CUDA) for _ in range(4))
            parameter, gradient, first, second = values
            copy = None if gradient_dtype == torch.float32 else parameter.to(gradient_dtype)
            moments = (first / 10).to(state_dtype), second.square().div(100).to(state_dtype)
            made.append(
                OfParameter(
                    parameter, gradient.to(gradient_dtype), *moments, copy, Numbers(7 * size, 2 * size, 10, gap)
                )
            )
        return made

    salts = torch.randint(-(2**31), 2**31, (len(sizes),), device=CUDA, dtype=torch.int32)
    for found_inf in (0.0, 1.0):
        scalars = torch.tensor([1e-3, 0.02, 0.3, 4.0, found_inf], device=CUDA)
        plain, fused = make(), make()
        for tensors, salt in zip(plain, salts):
            _update_in_pieces(tensors, salt, scalars, (0.9, 0.999), 1e-8)
        numbers = [tensors.numbers for tensors in fused]
        update_all(addressable(fused), numbers, salts, scalars, (0.9, 0.999), 1e-8)
        kinds = ["parameter", "exp_avg", "exp_avg_sq"] + ["copy"] * (gradient_dtype != torch.float32)
        for kind in kinds:
            expected, found, before = (
                torch.cat([getattr(tensors, kind).float() for tensors in those]) for those in (plain, fused, make())
            )
            # a rounding to 16 bits may go the other way where what is rounded differs in its last bit
            assert relative(found, expected.double()) < 1e-4
            assert found.equal(before) == (found_inf == 1)


RUN = """
import json, sys
from pathlib import Path
from tidar.config import load_config
from tidar.training.trainer import Trainer

folder, *options = sys.argv[1:]
kernels = lambda: {path.name: path.stat().st_mtime_ns for path in Path(folder).rglob("*.o")}
trainer = Trainer(load_config(options))
status, ahead = trainer.compiler.process.wait(timeout=120), kernels()
trainer.train()
print(json.dumps({"status": status, "ahead": len(ahead), "anew": sorted(kernels().items() - ahead.items())}))
"""


@needs_quack
@pytest.mark.parametrize("family, bias, dim, vocab", [("qwen2", True, 1536, 151936), ("qwen3", False, 1024, 384)])
def test_a_step_finds_its_kernels_compiled(tmp_path, family, bias, dim, vocab):
    """A layer, and the loss; of micro-batches and chunks whose products are QuACK's, not cuBLAS's."""
    architecture = {"model_type": family, "architectures": [f"{family.title()}ForCausalLM"], "vocab_size": vocab}
    sizes = {"hidden_size": dim, "intermediate_size": 4 * dim, "num_hidden_layers": 1, "head_dim": 128}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "attention_bias": bias}
    (tmp_path / "config.json").write_text(json.dumps(size_config("debug") | architecture | sizes | heads))
    options = f"--model.hf_path {tmp_path} --job.dump_folder {tmp_path / 'run'} --training.seq_len 1024"
    options += " --training.local_batch_size 4 --training.steps 1 --validation.enable false --checkpoint.enable false"
    cache = tmp_path / "quack"
    command = [sys.executable, "-c", RUN, str(cache), *options.split()]
    environment = os.environ | {"QUACK_CACHE_DIR": str(cache)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["status"] == 0 and found["ahead"] >= 8 and found["anew"] == []
