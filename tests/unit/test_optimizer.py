"""AdamW and its learning rate, against their rules written out, DeepSpeed's too."""

import dataclasses
import itertools
import math

import pytest
import torch
from results import batch_losses, read_weights
from runs import train_run
from torch import nn

from tidar.config.options import LRScheduler, Optimizer
from tidar.models import Decoder, size_config
from tidar.models.huggingface import decoder_config
from tidar.training.optim.optimizer import Numbers, OfParameter, addressable, make_optimizer
from tidar.training.optim.schedule import learning_rate


@pytest.mark.parametrize("decay_type", ["cosine", "linear", "constant"])
def test_learning_rate(decay_type):
    """By torchtitan's rule, recursively: equal steps up, one step at the top, then a decay that ends after the run."""
    for warmup, end, floor in itertools.product((0, 1, 4, 19), (20, 33), (0.0, 0.3)):
        explicit = LRScheduler(warmup_steps=warmup, decay_type=decay_type, min_lr_factor=floor, total_steps=end)
        implied = dataclasses.replace(explicit, total_steps=-1)
        rates = [learning_rate(update, 1000, 2.0, explicit) for update in range(1, end + 10)]
        assert rates[:end] == [learning_rate(update, end, 2.0, implied) for update in range(1, end + 1)]
        assert rates[:warmup] == pytest.approx([2.0 * (i + 1) / warmup for i in range(warmup)], rel=1e-12)
        expected, angle = 2.0, 0.0
        for rate in rates[warmup:end]:
            assert rate == pytest.approx(expected, rel=1e-9)
            angle += math.pi / (end - warmup)
            if decay_type == "linear":
                expected -= 2.0 * (1 - floor) / (end - warmup)
            elif decay_type == "cosine":
                expected = 2.0 * floor + 2.0 * (1 - floor) * math.cos(angle / 2) ** 2
        assert rates[end - 1] > 2.0 * floor  # the last update moves the parameters
        assert rates[end:] == pytest.approx([2.0 if decay_type == "constant" else 2.0 * floor] * 9, abs=1e-12)
    assert learning_rate(1, 1, 2.0, LRScheduler(warmup_steps=0)) == 2.0
    assert learning_rate(3, 3, 2.0, LRScheduler(warmup_steps=10)) == pytest.approx(0.6)


@pytest.mark.parametrize("warmup_type", ["log", "linear"])
@pytest.mark.parametrize("schedule", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_deepspeeds_schedules(schedule, warmup_type):
    """Its closed forms. The optimizer steps first, then the schedule from -1 on: step n has iteration n - 2's rate."""
    low, high, warmup, total, floor = 3e-6, 1e-5, 10, 50, 0.1
    options = LRScheduler(
        schedule=schedule, warmup_type=warmup_type, warmup_steps=warmup, total_steps=total, min_lr_factor=floor,
        warmup_min_lr_factor=low / high,
    )  # fmt: skip
    for step in range(1, 71):
        i = step - 2
        rise = math.log(i + 1) / math.log(warmup) if warmup_type == "log" and i >= 0 else i / warmup
        if schedule == "WarmupCosineLR":
            place = min(1, (i - warmup + 1) / (total - warmup))
            expected = high * (floor + (1 - floor) * (1 + math.cos(math.pi * place)) / 2)
            expected = high * (low / high + (1 - low / high) * rise) if i < warmup else expected
            expected = 0 if i < 0 else expected
        else:
            fall = max(0, (total - i) / (total - warmup)) if schedule == "WarmupDecayLR" else 1
            expected = low + (high - low) * (rise if i < warmup else fall)
            expected = low if i < 0 else expected
        assert learning_rate(step, 1000, high, options) == pytest.approx(expected, rel=1e-12), step


@pytest.mark.parametrize("state_dtype, copied", [("float32", False), ("bfloat16", False), ("float32", True)])
def test_a_recipe_in_deepspeeds_arithmetic(state_dtype, copied):
    """Steps of its fused Adam with adam_w_mode, bias correction and clipping by norm + 1e-6, in float64."""
    torch.manual_seed(1)
    model = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in ((300, 7), (40,), (5, 5))])
    recipe = Optimizer(
        lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decay_params="all", state_dtype=state_dtype
    )
    schedule = LRScheduler(schedule="WarmupDecayLR", warmup_steps=5, total_steps=20, warmup_min_lr_factor=0.3)
    copies = {parameter: nn.Parameter(parameter.detach().bfloat16()) for parameter in model} if copied else None
    optimizer = make_optimizer(model, recipe, copies=copies)
    expected = [parameter.detach().double() for parameter in model]
    first, second = ([torch.zeros_like(value) for value in expected] for _ in range(2))
    for step in range(1, 16):
        gradients = [torch.randn_like(parameter) for parameter in model]
        if copied:
            gradients = [gradient.bfloat16().float() for gradient in gradients]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        lr = learning_rate(step, 100, recipe.lr, schedule)
        for parameter, gradient in zip(model, gradients):
            if copied:
                copies[parameter].grad = gradient.bfloat16() * 1024
            else:
                parameter.grad = gradient * 1024  # a loss scale of 1024
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.grad_scale = torch.clamp((norm + 1e-6) / 1.0, min=1.0) * 1024
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        for i, gradient in enumerate(gradients):
            gradient = gradient.double() / max(1, (norm.double() + 1e-6) / 1.0)
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            update = (first[i] / (1 - 0.9**step)) / ((second[i] / (1 - 0.999**step)).sqrt() + 1e-8)
            expected[i] = expected[i] - lr * (update + 0.01 * expected[i])
    for parameter, copy in (copies or {}).items():
        assert copy.equal(parameter.bfloat16())
    moved = torch.cat([parameter.detach().flatten().double() for parameter in model])
    wanted = torch.cat([value.flatten() for value in expected])
    assert (moved - wanted).norm() / wanted.norm() < (1e-6 if state_dtype == "float32" else 5e-4)


def test_bfloat16_moments_are_rounded_without_bias():
    """A second moment decays although each decay is a fifth of bfloat16's step; the mean stays that of float32."""
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = make_optimizer(nn.ParameterList([parameter]), Optimizer(beta2=0.999, state_dtype="bfloat16"))
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    parameter.grad = torch.full((4096,), 3.0)
    optimizer.step()
    parameter.grad = torch.zeros(4096)
    for _ in range(200):
        optimizer.step()
    second = optimizer.state[parameter]["exp_avg_sq"]
    assert second.dtype == torch.bfloat16
    expected = 0.009 * 0.999**200
    assert second.double().mean().item() == pytest.approx(expected, rel=2e-3)
    assert (0.009 - expected) / 0.009 > 0.15  # rounded to nearest it would not have moved at all


def test_bfloat16_moments_do_not_depend_on_sharding_or_a_restart(tmp_path, ranks, small_model):
    """The same weights on one rank and on three, and, bit for bit, after a restart in the middle."""
    common = f"{small_model} --training.seq_len 16 --training.global_batch_size 6 --validation.enable false"
    common += " --optimizer.state_dtype bfloat16 --optimizer.beta2 0.999 --training.steps 8 --checkpoint.interval 4"
    weights = []
    for size, name in ((1, "one"), (3, "three"), (3, "three")):
        folder = tmp_path / name
        if len(weights) == 2:
            (folder / "checkpoint" / "step-8").rename(tmp_path / "unused")
        options = f"{common} --training.local_batch_size {6 // size} --job.dump_folder {folder}"
        ranks.run(size, *options.split(), weights=tmp_path / "weights.pt")
        weights.append(read_weights(tmp_path / "weights.pt"))
    one, three, again = weights
    assert torch.equal(three, again)
    options = f"{common} --training.local_batch_size 2 --job.dump_folder {folder} --optimizer.state_dtype float32"
    for answer in ranks.run(3, *options.split(), "--training.steps", "9"):
        assert "optimizer.state_dtype = float32:" in answer["error"] and "has bfloat16; resume with" in answer["error"]
    assert (three - one).norm() / one.norm() < 1e-5


@pytest.mark.parametrize("steps", [40, pytest.param(500, marks=pytest.mark.long)])
def test_bfloat16_moments_follow_float32(tmp_path, smaller_debug, uneven_data, steps):
    """At beta2 = 0.999, the loss over the last tenth of the steps within 0.5 %."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        options = f"{uneven_data} --training.seq_len 32 --training.local_batch_size 8 --validation.enable false"
        options += f" --optimizer.beta2 0.999 --optimizer.state_dtype {dtype} --training.steps {steps}"
        options += " --optimizer.lr 2e-3"
        options += f" --metrics.log_freq 1 --checkpoint.enable false --job.dump_folder {tmp_path / dtype}"
        train_run(options.split())
        losses[dtype] = batch_losses(tmp_path / dtype)
    assert losses["float32"] != losses["bfloat16"]
    last = steps // 10
    means = {dtype: sum(curve[-last:]) / last for dtype, curve in losses.items()}
    print(f"\n{steps} steps, the last {last}: {means}")
    assert means["bfloat16"] == pytest.approx(means["float32"], rel=5e-3)


@pytest.mark.parametrize("decay_params, decayed", [("matrices", 2), ("all", 1)])
def test_weight_decay(decay_params, decayed):
    with torch.device("meta"):
        model = Decoder(decoder_config(size_config("debug") | {"vocab_size": 258}))
    optimizer = make_optimizer(model, Optimizer(decay_params=decay_params, weight_decay=0.5))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.5 if parameter.ndim >= decayed else 0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_gradients_anywhere_in_memory_become_addressable():
    """Views of one buffer, as FSDP2 makes them where shards are not a multiple of 16 bytes; and what is refused."""
    buffer = torch.randn(40)
    gradients = [buffer[:5], buffer[5:9], buffer[12:20], buffer[20:32].view(4, 3).T]
    tensors = [
        OfParameter(*(torch.zeros(g.shape) for _ in range(4)), None, Numbers(0, 0, 1, 0))._replace(gradient=g)
        for g in gradients
    ]
    columns = addressable(tensors)
    for gradient, found in zip(gradients, columns[1]):
        assert found.equal(gradient) and found.is_contiguous() and found.data_ptr() % 16 == 0
    assert columns[1][2].data_ptr() == gradients[2].data_ptr()  # one that is in order is not copied
    with pytest.raises(ValueError, match="gradient have several types"):
        addressable([tensors[0], tensors[1]._replace(gradient=gradients[1].bfloat16())])
    with pytest.raises(ValueError, match=r"exp_avg of shape \[4\]"):
        addressable([tensors[1]._replace(exp_avg=buffer[5:9])])
