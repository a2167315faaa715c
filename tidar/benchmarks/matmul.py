"""Measures matmuls by tile shape: python -m tidar.benchmarks.matmul [--case NAME] [--only MATMUL ...] [...]

The matmuls of a layer's MLP and of a chunk of the loss by logits, of the shapes of a case of
tidar.benchmarks.train_step: by torch, without activation, and by each tile of QuACK's kernels where they run. Times are
those of a card that has worked for a second, which is then at its limit of power, as in training. Further options go to
the trainer.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

from tidar.benchmarks.cases import CASES, case_options, device_name, running, sustained_seconds
from tidar.config import ArgumentParser, UserError, user_errors_exit
from tidar.kernels.matmul import Tile, quack_gated_matmul, quack_gated_matmul_backward, quack_matmul
from tidar.training.trainer import Trainer

SHAPES = ((128, 128, True), (128, 160, True), (128, 192, True), (128, 256, False), (256, 192, False), (256, 208, False))
CLUSTERS = ((1, 2), (2, 1), (2, 2))
TILES = [Tile(*shape, cluster) for shape in SHAPES for cluster in CLUSTERS]
SECONDS = 0.4  # of each measurement, once the card is warm
SHOWN = 5  # of the tiles, the fastest


class Matmul(NamedTuple):
    """`[m, k] @ [k, n]`, or two of them; by_tile: the same with what the MLP puts inside of it."""

    name: str
    m: int
    k: int
    n: int
    plain: Callable[[], object]
    by_tile: Callable[[Tile], object]


def step_matmuls(trainer: Trainer) -> Iterator[Matmul]:
    """The matmuls of a step on random values; gradients are as small as in training."""
    config, decoder, device, dtype = trainer.config, trainer.spec.decoder, trainer.device, trainer.plan.dtype
    positions = config.training.local_batch_size * trainer.plan.pattern.model_positions(config.training.seq_len)
    dim, hidden = decoder.dim, decoder.hidden_dim

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, device=device)).to(dtype)

    def of(
        name: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None, concatenated: tuple = ()
    ) -> Matmul:
        m, k = a.shape
        return Matmul(
            name,
            m,
            k,
            b.shape[1],
            lambda: a @ b if c is None else torch.addmm(c, a, b),
            lambda tile: quack_matmul(a, b, tile, c, concatenated=concatenated),
        )

    x, d_out, gate_up, down = (
        random(positions, dim),
        random(positions, dim, scale=1e-4),
        random(2 * hidden, dim, scale=0.02),
        random(dim, hidden, scale=0.02),
    )
    gate, up = gate_up.chunk(2)
    preactivation = x @ gate_up.T
    activation = F.silu(preactivation[:, :hidden]) * preactivation[:, hidden:]
    d_preactivation = 1e-4 * preactivation
    yield Matmul(
        "gate_up",
        positions,
        dim,
        2 * hidden,
        lambda: (x @ gate.T, x @ up.T),
        lambda tile: quack_gated_matmul(x, gate_up, tile),
    )
    yield of("down", activation, down.T, x)
    yield Matmul(
        "d_preactivation",
        positions,
        dim,
        hidden,
        lambda: d_out @ down,
        lambda tile: quack_gated_matmul_backward(d_out, down, preactivation, tile),
    )
    yield of("d_x", d_preactivation, gate_up, concatenated=("B",))
    yield of("d_gate_up", d_preactivation.T, x, concatenated=("out",))
    yield of("d_down", d_out.T, activation)
    scored, weight = random(config.training.loss_chunk_size, dim), random(decoder.vocab_size, dim, scale=0.02)
    yield of("logits", scored, weight.T)
    yield of("d_hidden", (scored @ weight.T).softmax(-1), weight)


def measure(trainer: Trainer, one: Matmul, tiles: list[Tile]) -> str:
    """A line of the table: torch's time, and those of the fastest tiles."""

    def cell(name: str, seconds: float) -> str:
        return f"{name} {seconds * 1e3:.4f} {2 * one.m * one.k * one.n / seconds / 1e12:.3g}"

    cells = [cell("torch", sustained_seconds(one.plain, trainer.device, SECONDS))]
    times, failed = [], 0
    for tile in tiles:
        try:
            times.append((sustained_seconds(partial(one.by_tile, tile), trainer.device, SECONDS), tile))
        except Exception:  # a tile that the kernel does not have, or has no memory for
            failed += 1
    for seconds, tile in sorted(times)[:SHOWN]:
        cluster = "x".join(map(str, tile.cluster))
        cells.append(cell(f"{tile.rows}x{tile.columns}{' pingpong' if tile.pingpong else ''} {cluster}", seconds))
    if failed:
        cells.append(f"{failed} of {len(tiles)} tiles do not run")
    return f"{one.name:15} {f'{one.m} x {one.k} x {one.n}':22} {' | '.join(cells)}"


def main() -> None:
    parser = ArgumentParser(prog="python -m tidar.benchmarks.matmul", description=__doc__.split("\n\n")[1])
    parser.add_argument("--case", default="debug", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--only", nargs="+", metavar="MATMUL", help="names as the table has them [all]")
    with user_errors_exit():
        arguments, others = parser.parse_known_args()
        with running([*case_options(arguments.case), *others]) as trainer:
            matmuls = {one.name: one for one in step_matmuls(trainer)}
            only = arguments.only or list(matmuls)
            if unknown := set(only) - set(matmuls):
                raise UserError(f"--only {' '.join(sorted(unknown))}: must be of {', '.join(matmuls)}")
            device = trainer.device
            tiles = TILES if trainer.plan.kernels.loss_matmul else []
            print(f"{device_name(device)}, torch {torch.__version__}, {trainer.plan.dtype}")
            print("matmul, m x k x n, ms and TFLOP/s of torch and of the fastest tiles", flush=True)
            sustained_seconds(matmuls[only[0]].plain, device)
            for name in only:
                print(measure(trainer, matmuls[name], tiles), flush=True)


if __name__ == "__main__":
    main()
