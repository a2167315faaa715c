import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tidar.kernels import Kernels
from tidar.losses.objective import Objective, TokenScores
from tidar.losses.sums import LossSums, target_weights
from tidar.patterns import Targets

POSITIONS, DIM, VOCAB = 40, 16, 500


def make_targets(n: int, offset: int) -> Targets:
    index = torch.randperm(POSITIONS)[:n].sort().values + offset
    return Targets(index, torch.randint(0, VOCAB, (n,)), torch.rand(n) + 0.1, torch.zeros(n, dtype=torch.long))


def unchunked(hidden, weight, targets, denominators, loss_weights):
    """Both losses over the logits of all positions."""
    logits = (hidden @ weight.T).flatten(0, 1)
    total = 0
    for loss, target in targets.items():
        nll = F.cross_entropy(logits[target.index], target.labels, reduction="none")
        total = total + loss_weights[loss] * (nll * target.weights).sum() / denominators[loss]
    return total / sum(loss_weights.values())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("loss_weights", [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("counts", [(31, 31), (31, 0), (0, 0)])
def test_chunked_equals_unchunked(dtype, tolerance, loss_weights, counts):
    loss_weights = dict(zip(("ar", "diffusion"), loss_weights))
    hidden = torch.randn(2, POSITIONS, DIM, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, DIM, dtype=dtype, requires_grad=True)
    targets = {"ar": make_targets(counts[0], 0), "diffusion": make_targets(counts[1], POSITIONS)}
    # the micro-batch is a part of a step: the denominators are larger than its own weights
    denominators = {loss: target.weights.double().sum() + 7 for loss, target in targets.items()}
    expected = unchunked(hidden, weight, targets, denominators, loss_weights)
    expected_gradients = torch.autograd.grad(3 * expected, [hidden, weight])
    for chunk_size in (1, 7, 31, 1000):
        loss, scores = Objective(loss_weights, chunk_size)(hidden, weight, targets, denominators)
        gradients = torch.autograd.grad(3 * loss, [hidden, weight])
        assert_close(loss, expected, tolerance)
        for gradient, expected_gradient in zip(gradients, expected_gradients):
            assert_close(gradient, expected_gradient, tolerance)
        for loss_name, target in targets.items():
            logits = (hidden @ weight.T).flatten(0, 1)[target.index]
            nll = F.cross_entropy(logits, target.labels, reduction="none")
            assert_close(scores[loss_name].nll, nll, tolerance)
            assert scores[loss_name].correct.equal(logits.argmax(dim=-1) == target.labels)


def assert_close(found, expected, tolerance):
    assert (found - expected).norm() <= tolerance * expected.norm(), (found, expected)


def test_targets_may_be_padded(monkeypatch):
    """As for kernels that want so many at one time: loss, scores and gradients are what they were."""
    hidden = torch.randn(2, POSITIONS, DIM, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, DIM, dtype=torch.float64, requires_grad=True)
    targets = {"ar": make_targets(31, 0), "diffusion": make_targets(30, POSITIONS)}
    denominators = {loss: target.weights.double().sum() for loss, target in targets.items()}
    results, seen = [], []
    for padded in (False, True):
        objective = Objective({"ar": 1.0, "diffusion": 2.0}, 50, Kernels(loss_without_logits=padded))

        def score(*inputs, accumulate, chunk_size, shard, by_logits=objective.by_logits):
            seen.append((len(inputs[2]), chunk_size))
            return by_logits(*inputs, accumulate=accumulate)

        imitation = SimpleNamespace(TARGETS=16, score=score)
        monkeypatch.setitem(sys.modules, "tidar.kernels.anchored_cross_entropy", imitation)
        loss, scores = objective(hidden, weight, targets, denominators)
        kept = [value for score in scores.values() for value in (score.nll, score.correct.double())]
        results.append([loss, *kept, *torch.autograd.grad(loss, [hidden, weight])])
    assert seen == [(32, 50), (32, 50)]
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        assert_close(found, expected, 1e-12)


def test_a_step_without_targets_has_no_loss():
    hidden = torch.randn(1, POSITIONS, DIM, requires_grad=True)
    weight = torch.randn(VOCAB, DIM, requires_grad=True)
    targets = {"ar": make_targets(0, 0), "diffusion": make_targets(0, 0)}
    objective = Objective({"ar": 1.0, "diffusion": 1.0}, chunk_size=8)
    loss, _ = objective(hidden, weight, targets, {"ar": torch.zeros(()), "diffusion": torch.zeros(())})
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_gradients_of_a_large_step_do_not_underflow(dtype, tolerance):
    """A micro-batch of a step of a million targets, its loss scaled as in fp16 training."""
    targets = {"ar": make_targets(31, 0), "diffusion": make_targets(31, POSITIONS)}
    denominators = {loss: torch.tensor(1e6) for loss in targets}
    inputs = [torch.randn(2, POSITIONS, DIM), torch.randn(VOCAB, DIM)]
    gradients = []
    for kind in (torch.float64, dtype):
        hidden, weight = (tensor.to(dtype).to(kind).requires_grad_() for tensor in inputs)
        loss, _ = Objective({"ar": 1.0, "diffusion": 1.0}, 16)(hidden, weight, targets, denominators)
        gradients.append(torch.autograd.grad(2**16 * loss, [hidden, weight]))
    for expected, found in zip(*gradients):
        assert_close(found.double(), expected, tolerance)


def test_logits_never_exist_whole():
    """No tensor made forward or backward has more elements than a chunk's logits or the inputs."""
    hidden = torch.randn(4, POSITIONS, DIM, requires_grad=True)
    weight = torch.randn(VOCAB, DIM, requires_grad=True)
    targets = {"ar": make_targets(31, 0), "diffusion": make_targets(31, POSITIONS)}
    ones = {"ar": torch.ones(()), "diffusion": torch.ones(())}
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    with Watch():
        loss, _ = Objective({"ar": 1.0, "diffusion": 1.0}, chunk_size=16)(hidden, weight, targets, ones)
        loss.backward()
    assert largest == max(hidden.numel(), weight.numel(), 16 * VOCAB) < 31 * VOCAB  # the logits of one loss


@pytest.mark.parametrize("losses", [("ar", "diffusion"), ("ar",), ("diffusion",)])
def test_means_do_not_depend_on_how_a_batch_is_split(losses):
    """Against loops over all target tokens; micro-batches without targets of a loss among them."""
    loss_weights = {loss: 0.5 + number for number, loss in enumerate(losses)}
    tokens = {loss: [] for loss in losses}
    total, weights = LossSums.zeros(torch.device("cpu")), 0
    for n in (5, 0, 17, 1):
        targets = {loss: make_targets(n, 0) for loss in losses}
        scores = {loss: TokenScores(torch.rand(n), torch.rand(n) > 0.4) for loss in losses}
        for loss in losses:
            columns = targets[loss].weights, scores[loss].nll, scores[loss].correct
            tokens[loss] += zip(*(column.tolist() for column in columns))
        total += LossSums.of(targets, scores)
        weights += target_weights(targets)
    assert weights.equal(total.values[0])
    expected, mean = {}, 0
    for loss, name in (("ar", "accuracy"), ("diffusion", "accuracy_diff")):
        if loss in losses:
            weight = sum(weight for weight, *_ in tokens[loss])
            expected[f"{loss}_loss"] = sum(weight * nll for weight, nll, _ in tokens[loss]) / weight
            expected[name] = sum(weight * correct for weight, _, correct in tokens[loss]) / weight
            mean += loss_weights[loss] * expected[f"{loss}_loss"] / sum(loss_weights.values())
    assert total.means(loss_weights) == pytest.approx(expected | {"loss": mean}, rel=1e-12)
    assert total.is_finite() and not LossSums(total.values * math.inf).is_finite()
    # a step without targets
    assert LossSums.zeros(torch.device("cpu")).means(loss_weights) == {}
