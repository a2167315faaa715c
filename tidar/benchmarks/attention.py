"""Attention speed: python -m tidar.benchmarks.attention [--case NAME] [--section.option value ...]

Measures forward and backward of one attention layer of a case of tidar.benchmarks.train_step on its first batch, for
each backend of this machine and each of three masks: packed rows, rows of one document, and plain causal attention over
as many positions (the upper bound). TFLOP/s count allowed pairs. Further options go to the trainer.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from tidar.benchmarks.cases import CASES, case_options, device_name, first_batches, median_seconds, running
from tidar.config import ArgumentParser, UserError, user_errors_exit
from tidar.kernels import Sizes, choose_kernels
from tidar.models import Mask, MaskBuilder, attention
from tidar.training.trainer import Trainer

REPEATS = 10


def masks(trainer: Trainer, backend: str) -> dict[str, tuple[Mask, int]]:
    """Masks by name, with their numbers of allowed pairs."""
    (batch,) = first_batches(trainer, 1)
    rows, positions = batch.rows.input_ids.shape
    build = MaskBuilder(trainer.plan.pattern, backend)
    pattern, packed = trainer.plan.pattern, batch.rows.documents
    whole = pattern.documents(torch.zeros_like(packed.index))
    built = {"packed rows": build(packed), "one document": build(whole)}
    causal = None
    if backend != "sdpa":
        causal = create_block_mask(_causal, None, None, positions, positions, device=trainer.device)
    return {
        **{name: (mask.attention, int(mask.allowed_pairs)) for name, mask in built.items()},
        "plain causal": (causal, rows * positions * (positions + 1) // 2),
    }


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def measure(trainer: Trainer, mask: Mask, backend: str) -> tuple[float, float]:
    """Milliseconds of the forward and the backward pass of one layer."""
    config, decoder, device = trainer.config, trainer.spec.decoder, trainer.device
    positions = trainer.plan.pattern.model_positions(config.training.seq_len)
    # strides as the projections leave them: [batch, positions, heads, head_dim] in memory
    q, k, v = (
        torch.randn(config.training.local_batch_size, positions, heads, decoder.head_dim, device=device)
        .to(trainer.plan.dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (decoder.n_heads, decoder.n_kv_heads, decoder.n_kv_heads)
    )
    gradient = torch.randn_like(q)

    def forward() -> Tensor:
        return attention(q, k, v, mask, flash=backend == "flash")

    with torch.no_grad():
        alone = median_seconds(forward, REPEATS, warm_up=3)
    both = median_seconds(lambda: torch.autograd.grad(forward(), (q, k, v), gradient), REPEATS, warm_up=3)
    return alone * 1e3, (both - alone) * 1e3


def main() -> None:
    parser = ArgumentParser(prog="python -m tidar.benchmarks.attention", description=__doc__.split("\n\n")[1])
    parser.add_argument("--case", default="debug", metavar="NAME", help=", ".join(CASES))
    with user_errors_exit():
        arguments, others = parser.parse_known_args()
        # only the shapes of one layer are needed of the model
        options = [*case_options(arguments.case), *others]
        with running(options) as trainer:
            decoder = trainer.spec.decoder
            print(f"{device_name(trainer.device)}, torch {torch.__version__}, {trainer.plan.dtype}, one layer")
            print(f"{'backend':8} {'mask':13} {'forward ms':>10} {'backward ms':>11} {'TFLOP/s':>9} {'TFLOP/s':>9}")
            for backend in ("flash", "flex", "sdpa"):
                model = replace(trainer.config.model, attention_backend=backend)
                sizes = Sizes(decoder.dim, decoder.hidden_dim, decoder.head_dim, decoder.vocab_size)
                try:
                    choose_kernels(replace(trainer.config, model=model), trainer.device, trainer.plan.dtype, sizes)
                except UserError as reason:
                    print(f"{backend:8} {reason}")
                    continue
                for name, (mask, pairs) in masks(trainer, backend).items():
                    forward, backward = measure(trainer, mask, backend)
                    flops = 4 * pairs * decoder.n_heads * decoder.head_dim
                    rates = flops / forward / 1e9, 2 * flops / backward / 1e9
                    print(f"{backend:8} {name:13} {forward:10.3f} {backward:11.3f} {rates[0]:9.1f} {rates[1]:9.1f}")


if __name__ == "__main__":
    main()
