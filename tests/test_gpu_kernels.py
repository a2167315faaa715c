"""Our kernels, and those of other libraries in our use of them, beside plain torch in a wider type."""

import pytest
import torch
from test_gpu import CUDA, needs_quack, relative

from tidar.models.backward import RotatedHeads, norm_backward
from tidar.objective import Objective
from tidar.patterns import Targets

pytestmark = pytest.mark.gpu


@needs_quack
def test_the_loss_without_logits_equals_float64():
    """Chunks of any length; targets that are right, and that are far below the others."""
    for n, dim, vocab, chunk_size in ((1001, 256, 64, 300), (900, 128, 960, 900), (4096, 1536, 151936, 4096)):
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
        plain = losses(Objective({"ar": 1.0}, chunk_size, compile=True), torch.bfloat16)
        found = losses(Objective({"ar": 1.0}, chunk_size, compile=True, fast_products=True), torch.bfloat16)
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
    objective = Objective({"ar": 1.0}, 64, fast_products=True)
    loss, scores = objective(*leaves, targets, {"ar": torch.tensor(64.0, device=CUDA)})
    d_hidden, d_weight = torch.autograd.grad(loss, leaves)
    assert (logits.logsumexp(dim=-1) - logits.amin(dim=-1)).min() > 200
    assert scores["ar"].nll.min() > 110 and not scores["ar"].correct.any()
    assert d_hidden.isfinite().all() and d_weight.isfinite().all()
    # what the target lacks goes to those above it
    assert ((d_hidden[0].double() @ weight.double().T).gather(1, labels[:, None]) < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_backward_equals_plain_torch(dtype):
    """Few rows and many, of sizes around a power of two."""
    for shape in ((3, 16), (2, 700, 1536), (5000, 130)):
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
    for rows, positions, head_dim, sizes in ((2, 77, 24, [4, 2, 2]), (1, 300, 128, [12, 2, 2])):
        heads = torch.randn(rows, positions, sum(sizes), head_dim, device=CUDA).to(dtype).requires_grad_()
        for batch in {1, rows}:
            angles = torch.randn(batch, 1, positions, head_dim // 2, device=CUDA).repeat(1, 1, 1, 2)
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
            found = RotatedHeads.apply(heads, cos, sin, sizes)
            d_parts = [torch.randn_like(part) for part in found]
            d_parts[0] = d_parts[0].transpose(1, 2).contiguous().transpose(1, 2)
            d_parts[1] = d_parts[1].mT.contiguous().mT
            (gradient,) = torch.autograd.grad(found, heads, d_parts)
            wide = heads.detach().double().requires_grad_()
            expected = RotatedHeads.forward(FakeContext(), wide, cos.double(), sin.double(), sizes)
            (exact,) = torch.autograd.grad(expected, wide, [part.double() for part in d_parts])
            assert gradient.is_contiguous() and relative(gradient, exact) < torch.finfo(dtype).eps


class FakeContext:
    def save_for_backward(self, *_):
        pass
