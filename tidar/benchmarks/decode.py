"""Speed of decoding: python -m tidar.benchmarks.decode [--model NAME …] [--batch N …] [--prefix N …] [--block_size N …]

For each model (shapes of tidar/models/sizes.py, random weights), batch and prefix: milliseconds of a prefill, of an
autoregressive step and of a TiDAR step of the same engine; their ratio; the share of the device's memory bandwidth that
the autoregressive step reaches (weights and cache read once); and tokens/s by how many tokens a step commits.
--lookup: the same step when it also drafts from repeated text.
--transformers: tokens/s of autoregressive decoding by this engine and by `generate` of transformers, same weights.
"""

import gc
import tempfile
from argparse import Namespace

import torch

from tidar.benchmarks.cases import device_name, median_seconds
from tidar.config import ArgumentParser, user_errors_exit
from tidar.decoding import Engine, Method, load
from tidar.decoding.engine import Mode
from tidar.decoding.forward import Forward
from tidar.decoding.lookup import LONGEST
from tidar.decoding.sampling import Sampling
from tidar.models import Decoder, size_config
from tidar.models.huggingface import decoder_config

REPEATS = 30


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m tidar.benchmarks.decode", description=__doc__.split("\n\n")[1])
    parser.add_argument("--model", nargs="+", default=["debug"], help="sizes, as model.name [debug]")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="sequences at a time [1]")
    parser.add_argument("--prefix", nargs="+", type=int, default=[512], help="committed tokens [512]")
    parser.add_argument("--block_size", nargs="+", type=int, default=[8, 16], help="[8 16]")
    parser.add_argument("--accepted", type=float, help="committed tokens of a step to print tokens/s for")
    parser.add_argument(
        "--lookup", type=int, default=0, choices=range(LONGEST + 1),
        help="also time steps that draft with this lookup [0: none]",
    )  # fmt: skip
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs and compiled layers")
    parser.add_argument("--transformers", action="store_true", help="compare with generate of transformers")
    with user_errors_exit():
        run(parser.parse_args(arguments))


@torch.no_grad()
def run(options: Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = memory_bandwidth(device)
    print(
        f"{device_name(device)}, torch {torch.__version__}, memory bandwidth {bandwidth / 1e9:,.0f} GB/s (copy)",
        flush=True,
    )
    for name in options.model:
        model = random_model(name, device)
        for batch in options.batch:
            for prefix in options.prefix:
                measure(name, model, batch, prefix, bandwidth, options)
        del model
        gc.collect()
        if options.transformers:
            compare_with_transformers(name)


def measure(name: str, model: Decoder, batch: int, prefix: int, bandwidth: float, options: Namespace) -> None:
    def timed(mode: Mode, block_size: int, lookup: int = 0) -> tuple[float, float]:
        """Seconds of a prefill of one prompt, and of a step."""
        engine = Engine(
            model, Method("tidar", block_size, 0), max_batch_size=batch, graph=False if options.eager else None
        )
        prompts = torch.randint(model.config.vocab_size, (batch, prefix)).tolist()
        length = prefix + REPEATS * 2 * block_size
        with engine._forward(batch, length, mode, Sampling(lookup=lookup)) as forward:
            prefill = median_seconds(lambda: forward.prefill([0], prompts[:1], [0], padded=prefix), repeats=3)
            fill(forward, prefix)
            return prefill, median_seconds(forward.step, REPEATS)

    prefill, ar = timed("ar", 1)
    read = weight_bytes(model) + batch * prefix * cache_bytes(model)
    print(
        f"{name}, batch {batch}, prefix {prefix}: prefill {prefill * 1e3:.2f} ms; AR step {ar * 1e3:.3f} ms, "
        f"{batch / ar:,.0f} tokens/s, {read / ar / bandwidth:.1%} of the bandwidth",
        flush=True,
    )
    for block_size in options.block_size:
        step = timed("tidar", block_size)[1]
        rates = [f"{accepted}: {batch * accepted / step:,.0f}" for accepted in (1, block_size // 2, block_size)]
        if options.accepted and options.accepted <= block_size:  # a step commits no more
            rates.append(f"{options.accepted}: {batch * options.accepted / step:,.0f}")
        print(
            f"  B = {block_size}: step {step * 1e3:.3f} ms, {step / ar:.2f} AR steps; tokens/s by committed tokens: "
            f"{', '.join(rates)}",
            flush=True,
        )
        if options.lookup:
            looked_up = timed("tidar", block_size, options.lookup)[1]
            print(
                f"    lookup {options.lookup}: step {looked_up * 1e3:.3f} ms, {looked_up / step - 1:+.1%}", flush=True
            )


def fill(forward: Forward, prefix: int) -> None:
    """Every row as if a prompt of that many tokens had been prefilled."""
    for keys, values in forward.cache.layers:
        keys[:, :, :prefix].normal_()
        values[:, :, :prefix].normal_()
    forward.state.lengths.fill_(prefix)
    forward.state.active.fill_(True)


def compare_with_transformers(name: str, prefix: int = 512, new: int = 256) -> None:
    """Greedy autoregressive tokens/s at batch 1 of this engine and of `generate` with a static, compiled cache."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        config = AutoConfig.for_model(**{"vocab_size": 258} | size_config(name))
        with device:
            reference = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        reference.save_pretrained(folder)
        engine = load(folder)
        prompt = torch.randint(reference.config.vocab_size, (prefix,)).tolist()

        def theirs() -> list[int]:
            ids = torch.tensor([prompt], device=device)
            out = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                cache_implementation="static", pad_token_id=0,
            )  # fmt: skip
            return out[0, prefix:].tolist()

        def ours() -> list[int]:
            return engine.generate([prompt], new, mode="ar")[0].tokens

        rates, outputs = [], []
        for generate in (ours, theirs):
            generate()  # compiles
            outputs.append(generate())
            rates.append(new / median_seconds(generate, repeats=3))
        same = next((i for i, (a, b) in enumerate(zip(*outputs)) if a != b), new)
        print(
            f"{name}, prefix {prefix}, {new} new tokens, AR: {rates[0]:,.1f} tokens/s, transformers (static cache, "
            f"compiled) {rates[1]:,.1f}, ratio {rates[0] / rates[1]:.2f}; the first {same} tokens are equal",
            flush=True,
        )


def random_model(name: str, device: torch.device) -> Decoder:
    """A decoder of that size with random weights, drawn on the device; bfloat16 on a GPU."""
    config = decoder_config({"vocab_size": 258} | size_config(name), f"--model {name}")
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).to_empty(device=device)
    for parameter in model.parameters():
        parameter.fill_(1) if parameter.ndim == 1 else parameter.normal_(0, config.initializer_range)
    return model.eval()


def weight_bytes(model: Decoder) -> int:
    """Bytes of the weights that a step reads: all but the embedding, of which it reads a few rows."""
    read = sum(parameter.nbytes for parameter in model.parameters())
    return read - (0 if model.config.tie_embeddings else model.embed_tokens.weight.nbytes)


def cache_bytes(model: Decoder) -> int:
    """Bytes of the keys and values of one token."""
    config = model.config
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * model.output_weight().itemsize


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), repeats=10)


if __name__ == "__main__":
    main()
