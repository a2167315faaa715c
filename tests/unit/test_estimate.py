"""Estimates of memory and time, against what was measured and what a layer really saves."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tidar import estimate as command
from tidar.benchmarks.cases import CASES
from tidar.config import load_config
from tidar.kernels import Kernels
from tidar.models import decoder, size_config
from tidar.models.huggingface import decoder_config
from tidar.models.shards import TensorShard
from tidar.training.estimate.gpus import GIB, GPUS
from tidar.training.estimate.memory import kept_bytes, saved_bytes
from tidar.training.estimate.report import describe
from tidar.training.estimate.shapes import Estimate, estimate, shapes
from tidar.training.plan import RunPlan, plan_run
from tidar.training.reporting.summary import summarize

ROOT = Path(__file__).parents[2]
# what estimates may be wrong by: memory, time
BOUNDS = 0.07, 0.15


def planned(options: str, world_size: int = 1) -> RunPlan:
    config = load_config(options.split())
    sizes = decoder_config(size_config(config.model.name), config.model.name)
    return plan_run(config, world_size, torch.device("cuda"), sizes, elsewhere=(9, 0))


def estimated(options: str, world_size: int = 1, gpu: str = "h100") -> Estimate:
    return estimate(planned(options, world_size), GPUS[gpu])


def table_of(title: str, least: int) -> list[list[str]]:
    """Cells of the rows of a table in docs/performance.md, whose first ones are code."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    table = text.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:3] == "| `"]
    assert len(rows) >= least
    return rows


@pytest.mark.parametrize("cells", table_of("Estimates", least=12), ids=" ".join)
def test_measured_runs_are_estimated_as_the_docs_say(cells):
    """Each row has a case of the benchmarks with further options, GPUs, and estimated and measured GiB and ms."""
    case, *further = re.findall("`(.*?)`", cells[0])[0].split()
    number, gpu = cells[1].split(" ")
    found = estimated(f"{CASES[case]} {' '.join(further)}", int(number), gpu.lower())
    values = found.memory.total / GIB, found.time.seconds * 1e3
    for value, text, bound in zip(values, (cells[2], cells[3]), BOUNDS):
        written, measured, error = re.fullmatch(r"(\S+) / (\S+)(?: (\S+) %)?", text.replace(",", "")).groups()
        assert value == pytest.approx(float(written), rel=0.01)
        if measured != "-":
            assert value == pytest.approx(float(measured), rel=bound)
            assert float(error) == pytest.approx(100 * (value / float(measured) - 1), abs=0.6)


@pytest.mark.parametrize("cells", table_of("What the shipped configs are estimated to do", least=6), ids=" ".join)
def test_configs_fit_as_the_docs_say(cells):
    """Each row has a file of train_configs, GPUs, a shape, GiB and tokens/s of a GPU."""
    number, gpu = cells[1].split()
    config = ROOT / "train_configs" / cells[0].strip("`")
    config = load_config(["--job.config_file", str(config)])
    sizes = command.model_spec(config).decoder
    found = estimate(plan_run(config, int(number), torch.device("cuda"), sizes, elsewhere=(9, 0)), GPUS[gpu.lower()])
    lines = describe(found)
    assert found.fits and lines[2].startswith(f"memory   {cells[3]} GiB")
    assert f" {cells[4]} tokens/s" in lines[5] and f" {cells[5]} MFU" in lines[5]


class Attended(torch.autograd.Function):
    """Saves what kernels of attention do."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, d_out):
        return d_out, *ctx.saved_tensors[1:3]


class Halves(TensorShard):
    """One of two ranks that share a layer, without the other."""

    def gathered(self, x):
        return torch.cat([x, x], dim=1)

    def summed(self, x):
        return x.flatten(0, 1)[None, : x.shape[0] * x.shape[1] // 2]


@pytest.mark.parametrize("shard", [TensorShard(), Halves(0, 2)], ids=["whole", "half"])
def test_saved_tensors_are_those_of_a_layer(monkeypatch, shard):
    """On the meta device, with the kernels that a GPU would run. Results of norms, which compiled layers recompute, and
    parameters do not count.
    """
    options = "--model.name qwen2.5-1.5b --training.seq_len 64 --training.local_batch_size 2"
    plan = planned(f"{options} --parallelism.tensor_parallel_degree {shard.size}", shard.size)
    monkeypatch.setattr(decoder, "attention", lambda q, k, v, *_: Attended.apply(q, k, v))
    with torch.device("meta"):
        kernels = Kernels(fused_matmul=True, fused_backward=True)
        layer = decoder.DecoderLayer(plan.own_sizes, kernels, shard).bfloat16()
        shape = (2, 128, plan.decoder.dim) if shard.size == 1 else (1, 128, plan.decoder.dim)
        x = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
        angles = torch.empty(2, 1, 128, plan.decoder.head_dim, dtype=torch.bfloat16)
    ignored, saved = [*layer.parameters(), angles], []
    normalize = layer.normalize

    def recorded(*arguments):
        results = normalize(*arguments)
        ignored.append(results[0])
        return results

    layer.normalize = recorded
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = layer(x, angles, angles, None)
    assert out.shape == x.shape
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in saved}
    for tensor in ignored:
        sizes.pop(tensor.untyped_storage()._cdata, None)
    assert sum(sizes.values()) == sum(saved_bytes(plan).values())


def test_checkpointed_layers_need_less_memory_and_more_time():
    """By layers and by mode; with as many devices for a row each needs half as much for activations."""
    options = "--model.name qwen3-8b --training.seq_len 8192 --training.local_batch_size 1"
    options += " --training.global_batch_size 8"
    found = [
        estimated(f"{options} --activation_checkpoint.mode full --activation_checkpoint.layers {layers}", 8)
        for layers in (0, 9, 18, 36)
    ]
    memory, seconds = [each.memory.total for each in found], [each.time.seconds for each in found]
    assert memory == sorted(memory, reverse=True) and seconds == sorted(seconds)
    assert kept_bytes(found[1].plan) == [kept_bytes(found[3].plan)[0]] * 9 + [kept_bytes(found[0].plan)[0]] * 27
    selective = estimated(f"{options} --activation_checkpoint.mode selective", 8)
    assert memory[3] < selective.memory.total < memory[0]
    shared = estimated(f"{options} --parallelism.context_parallel_degree 2", 8)
    assert 0.45 < shared.memory.activations / found[0].memory.activations < 0.6
    assert 0.5 < shared.time.seconds / shared.plan.micro_batches / found[0].time.seconds < 0.65
    shared = estimated(f"{options} --parallelism.tensor_parallel_degree 2", 8)
    assert 0.6 < shared.memory.activations / found[0].memory.activations < 0.75  # what is gathered is whole
    assert 0.5 < shared.time.seconds / shared.plan.micro_batches / found[0].time.seconds < 0.65


def test_shapes_are_of_the_same_step():
    """Those that fit come first, the fastest of them first, and none of the tried ones that fits is faster."""
    plan = planned("--model.name qwen3-8b --training.seq_len 8192 --training.local_batch_size 8", 8)
    found = shapes(plan, GPUS["h100"])
    assert [each.plan.context_parallel for each in found if each.fits] and not estimate(plan, GPUS["h100"]).fits
    for each in found:
        config = each.plan.config
        rows = config.training.local_batch_size * each.plan.micro_batches * each.plan.dp_size
        assert rows == each.plan.global_batch_size == 64
        again = plan_run(config, 8, plan.device, plan.decoder, elsewhere=(9, 0))
        assert again.micro_batches == each.plan.micro_batches and again.dp_size == each.plan.dp_size
    order = [(not each.fits, each.time.seconds) for each in found]
    assert order == sorted(order)
    (alone,) = shapes(planned("--model.name qwen3-32b --training.seq_len 4096"), GPUS["h100"])
    assert not alone.fits


def test_the_command_prints_memory_time_and_shapes(capsys):
    """Of a config of this repository whose model is not here, on GPUs that are not here."""
    arguments = ["--job.config_file", str(ROOT / "train_configs" / "qwen3_8b.toml"), "--world_size", "16"]
    command.main([*arguments, "--gpu", "h200", "--training.local_batch_size", "4"])
    printed = capsys.readouterr().out
    assert "its sizes are those of model.name = qwen3-8b" in printed.splitlines()[0]
    for start in ("shape    16 h200", "engine   flash", "memory   ", "time     ", "speed    ", "the fastest: --"):
        assert f"\n{start}" in printed
    assert re.search(r"\n16 +1 +1 +none .* yes ", printed)


def test_a_run_prints_the_estimate_of_its_gpus(monkeypatch):
    """The command's figures; nothing on GPUs whose kernels were not measured."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    plan = planned("--model.name qwen3-0.6b --training.seq_len 1024", 2)
    names = "n_tokens n_documents n_long n_dropped n_truncated_tokens n_without_targets n_rows_dropped"
    counts = dict.fromkeys(names.split(), 1)
    rows = type("Rows", (SimpleNamespace,), {"__len__": lambda _: 3})(**counts)
    batches = SimpleNamespace(training_rows=rows, held_out_rows=rows)
    line = summarize(plan, batches, n_unusable=0, steps=10)[-1]
    found = estimate(plan, GPUS["h100"])
    assert line.startswith(f"estimate {found.memory.total / GIB:.1f} of 79.1 GiB at the peak; ")
    assert f" {found.time.seconds * 1e3:,.0f} ms a step" in line
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H100 PCIe")
    assert summarize(plan, batches, n_unusable=0, steps=10)[-1].startswith("engine")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--gpu b200", "--gpu b200: must be one of h100, h200"),
        ("--world_size 0", "--world_size 0: must be integer >= 1"),
        ("--training.enable_cpu_offload", "training.enable_cpu_offload = true: is not estimated"),
        ("--compile.enable false", "compile.enable = false: is not estimated"),
        ("--training.mixed_precision_param float32", "mixed_precision_param = float32: is not estimated"),
        ("--world_size 6 --parallelism.context_parallel_degree 4", "must divide the number of devices, 6"),
    ],
)
def test_what_is_not_estimated_is_refused_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit):
        command.main(["--model.name", "qwen3-0.6b", *arguments.split()])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
