"""Attention of a row that several devices share: python -m tidar.benchmarks.context_attention [--ngpu N] [--case CASE]

Measures forward and backward of one attention layer of a case of tidar.benchmarks.train_step, with what travels for it,
by this project's context parallelism and by torch's for FlexAttention, in which keys and values of all positions travel
and positions are dealt head to tail or by the tiles of their mask (PTRR). All get the same queries, keys, values and
mask, and results of the forward pass are compared. Times are of the slowest device, TFLOP/s of each, forward (f) and
backward (b), count allowed pairs. Without CUDA FlexAttention has no backward pass. Further options go to the trainer.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import _attention as experimental
from torch.distributed.tensor.parallel import parallelize_module

from tidar.benchmarks.attention import REPEATS
from tidar.benchmarks.cases import CASES, case_options, device_name, first_batches, median_seconds, running
from tidar.benchmarks.ranks import gather, is_first_rank, is_rank, launcher
from tidar.config import ArgumentParser, UserError, user_errors_exit
from tidar.data import Batch
from tidar.distributed import check_device_count, gathered_attention
from tidar.kernels import Sizes, choose_kernels
from tidar.models import MaskBuilder, attention, pattern_mask
from tidar.patterns import ModelBatch
from tidar.training.trainer import Trainer

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Shared(NamedTuple):
    """A way to share a row: this rank's positions in it, -1 for none, attention of them, and positions that travel."""

    positions: Tensor
    attend: Attend
    n_gathered: int
    has_backward: bool = True


class FlexAttention(nn.Module):
    """With the plain attention of this project, so that torch can hook its inputs."""

    def __init__(self, mask: Any, flash: bool):
        super().__init__()
        self.mask, self.flash = mask, flash

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self.mask, self.flash)


def ours(trainer: Trainer, rows: ModelBatch, backend: str) -> Shared:
    assert rows.share and trainer.plan.sharding
    build = MaskBuilder(trainer.plan.pattern, backend, gathered_attention(trainer.world))
    mask = build(rows.documents, rows.share).attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask, backend == "flash")

    return Shared(rows.share.positions[0], attend, trainer.plan.sharding.n_shared)


def of_torch(trainer: Trainer, rows: ModelBatch, backend: str, balance: str) -> Shared:
    world = trainer.world
    whole = pattern_mask(trainer.plan.pattern, rows.documents).block_mask()
    positions, _ = whole.seq_lengths
    balancer: Any = {
        "head to tail": lambda: experimental._HeadTailLoadBalancer(positions, world.cp_size, world.device),
        "PTRR": lambda: experimental._PTRRLoadBalancer(whole, world.cp_size),
    }[balance]()
    mesh = DeviceMesh.from_group(world.cp_group, world.device.type)
    (mask,) = experimental._context_parallel_shard(mesh, [whole], [2], balancer)
    style = experimental._ContextParallel(2, experimental._ContextParallel.AttentionType.FLEX)
    attend = parallelize_module(FlexAttention(mask, backend == "flash"), mesh, style)
    own = balancer._generate_indices()[0].chunk(world.cp_size)[world.cp_rank]
    return Shared(own, attend, positions, has_backward=world.device.type == "cuda")


WAYS: dict[str, Callable[[Trainer, ModelBatch, str], Shared]] = {
    "ours": ours,
    "torch, head to tail": partial(of_torch, balance="head to tail"),
    "torch, PTRR": partial(of_torch, balance="PTRR"),
}


def rows_by_name(trainer: Trainer) -> dict[str, ModelBatch]:
    """The first row of the run, and one document as long, each with this rank's share."""
    plan = trainer.plan
    assert plan.sharding
    ids = torch.zeros(1, trainer.config.training.seq_len, dtype=torch.long)
    alone = plan.sharding.share(plan.pattern.layout(ids, ids, torch.ones(ids.shape), [0]), trainer.world.cp_rank)
    (packed,) = first_batches(trainer, 1)
    return {"packed row": packed.rows, "one document": Batch(alone, 0).to(trainer.device).rows}


def inputs(trainer: Trainer) -> list[Tensor]:
    """Queries, keys and values of a whole row, the same on all ranks, as projections leave them."""
    decoder, plan = trainer.spec.decoder, trainer.plan
    positions = plan.pattern.model_positions(trainer.config.training.seq_len)
    generator = torch.Generator(trainer.device).manual_seed(0)
    return [
        torch.randn(1, positions, heads, decoder.head_dim, device=trainer.device, generator=generator).to(plan.dtype)
        for heads in (decoder.n_heads, decoder.n_kv_heads, decoder.n_kv_heads)
    ]


def run(trainer: Trainer, shared: Shared) -> tuple[float, float, Tensor]:
    """Milliseconds of the forward and the backward pass on the slowest rank, and the result of the whole row."""
    world, at = trainer.world, shared.positions.clamp(min=0)
    of_row = inputs(trainer)
    q, k, v = (x[:, at].transpose(1, 2).requires_grad_(shared.has_backward) for x in of_row)
    whole = torch.zeros_like(of_row[0])
    with torch.no_grad():
        out = shared.attend(q, k, v)
        used = shared.positions >= 0
        whole[:, at[used]] = out.transpose(1, 2)[:, used]
        dist.all_reduce(whole, group=world.cp_group)
        alone = median_seconds(lambda: shared.attend(q, k, v), REPEATS, warm_up=3) * 1e3
        forward = max(gather(alone, trainer.cpu_group))
    backward = float("nan")
    if shared.has_backward:
        gradient = torch.randn_like(out)

        def step() -> object:
            return torch.autograd.grad(shared.attend(q, k, v), (q, k, v), gradient)

        both = median_seconds(step, REPEATS, warm_up=3) * 1e3
        backward = max(gather(both, trainer.cpu_group)) - forward
    return forward, backward, whole


def backends(trainer: Trainer) -> Iterator[str]:
    """Those of FlexAttention that run here with a backward pass, or else SDPA."""
    decoder, config, found = trainer.spec.decoder, trainer.config, 0
    sizes = Sizes(decoder.dim, decoder.hidden_dim, decoder.head_dim, decoder.vocab_size)
    for backend in ("flash", "flex"):
        model = replace(config.model, attention_backend=backend)
        try:
            choose_kernels(replace(config, model=model), trainer.device, trainer.plan.dtype, sizes)
        except UserError:
            continue
        found += 1
        yield backend
    if not found:
        yield "sdpa"


def measure(trainer: Trainer) -> Iterator[str]:
    """Lines of the table."""
    decoder, plan, size = trainer.spec.decoder, trainer.plan, trainer.world.cp_size
    for backend in backends(trainer):
        for mask_name, rows in rows_by_name(trainer).items():
            pairs = int(pattern_mask(plan.pattern, rows.documents).allowed_pairs()) / size
            flops = 4 * pairs * decoder.n_heads * decoder.head_dim
            expected = None
            for name, way in WAYS.items():
                # torch's is FlexAttention on a CPU, too
                shown = "flex" if backend == "sdpa" and way is not ours else backend
                title = f"{name:20} {shown:8} {mask_name:13}"
                try:
                    shared = way(trainer, rows, backend)
                    forward, backward, result = run(trainer, shared)
                except Exception as error:
                    # what torch cannot do fails on all ranks alike
                    if name == "ours":
                        raise
                    yield f"{title} {type(error).__name__}: {str(error).strip().splitlines()[0]}"
                    continue
                expected = result if expected is None else expected
                difference = (result - expected).norm() / expected.norm()
                of_position = 2 * decoder.n_kv_heads * decoder.head_dim * plan.dtype.itemsize
                received = of_position * shared.n_gathered * (size - 1) / size / 2**20
                rates = flops / forward / 1e9, 2 * flops / backward / 1e9
                figures = f"{forward:10.3f} {backward:11.3f} {rates[0]:9.1f} {rates[1]:9.1f}"
                yield f"{title} {figures} {received:13.2f} {difference:10.1e}"


def main() -> None:
    parser = ArgumentParser(prog="python -m tidar.benchmarks.context_attention", description=__doc__.split("\n\n")[1])
    parser.add_argument("--case", default="debug", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--ngpu", type=int, default=2, help="devices that share a row [2]")
    with user_errors_exit():
        arguments, others = parser.parse_known_args()
        degree = ["--parallelism.context_parallel_degree", str(arguments.ngpu)]
        options = [*case_options(arguments.case), *others, "--training.local_batch_size", "1", *degree]
        if arguments.ngpu < 2:
            raise UserError(f"--ngpu {arguments.ngpu}: must be integer >= 2")
        if not is_rank():
            check_device_count(arguments.ngpu)
            command = [*launcher(arguments.ngpu), "tidar.benchmarks.context_attention", *sys.argv[1:]]
            sys.exit(subprocess.run(command).returncode)
        with running(options) as trainer:
            lines = [f"{device_name(trainer.device)}, torch {torch.__version__}, {trainer.plan.dtype}, one layer"]
            titles = f"{'forward ms':>10} {'backward ms':>11} {'TFLOP/s f':>9} {'TFLOP/s b':>9}"
            lines.append(f"{'':20} {'backend':8} {'mask':13} {titles} {'MiB received':>13} {'difference':>10}")
            for part in (lines, measure(trainer)):
                for line in part:
                    if is_first_rank():
                        print(line, flush=True)


if __name__ == "__main__":
    main()
