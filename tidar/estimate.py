"""Estimates a run, without any GPU: python -m tidar.estimate --job.config_file FILE --world_size 64 --gpu h100 ...

Prints the memory of each device at the peak of a step, the time of a step, what limits both, and which other shapes of
the same step fit and are fastest. One document fills each row, as is usual at 4096 tokens; shorter ones make attention
cheaper. Errors of estimates: docs/performance.md.
"""

from pathlib import Path

import torch

from tidar.config import ArgumentParser, Config, UserError, in_range, load_config, print_lines, user_errors_exit
from tidar.data.tokenizer import BytesTokenizer
from tidar.models.huggingface import ModelSpec, read_model, resolve_model
from tidar.models.sizes import SIZES
from tidar.training.estimate.gpus import GPUS, named_gpu
from tidar.training.estimate.report import describe, options, table
from tidar.training.estimate.shapes import estimate, shapes
from tidar.training.plan import plan_run

# shapes that are printed
SHOWN = 6


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m tidar.estimate",
        description=__doc__.split("\n\n")[1],
        epilog="Further arguments: --job.config_file FILE and the options of a run, as tidar.train --help lists them.",
    )
    parser.add_argument("--world_size", type=int, default=1, help="number of GPUs [1]")
    parser.add_argument("--gpu", default="h100", help=f"{' or '.join(GPUS)} [h100]")
    with user_errors_exit():
        given, others = parser.parse_known_args(arguments)
        if given.world_size < 1:
            raise UserError(f"--world_size {given.world_size}: must be integer {in_range(1, None)}")
        gpu, config = named_gpu(given.gpu), load_config(others, prog=parser.prog)
        spec = model_spec(config)
        device = torch.device("cuda")
        model = spec.decoder, spec.mask_token_id
        plan = plan_run(config, given.world_size, device, *model, elsewhere=gpu.capability)
        name = config.model.hf_path or config.model.name
        print_lines(f"model    {name}, {plan.n_parameters:,} parameters", *describe(estimate(plan, gpu)))
        found = shapes(plan, gpu)
        print_lines("", "shapes of the same step, the fastest with each degree of parallelism:", *table(found[:SHOWN]))
        if found[0].fits:
            print_lines("", f"the fastest: {options(found[0])}")


def model_spec(config: Config) -> ModelSpec:
    """The sizes of a run's model. A published model that is not here has those of its name."""
    path = config.model.hf_path
    name = next((size for size in sorted(SIZES, key=len) if f"{Path(path).name.lower()}-".startswith(f"{size}-")), None)
    if path and name and not Path(path).exists():
        print_lines(f"model.hf_path = {path}: is not read; its sizes are those of model.name = {name}")
        config.model.hf_path, config.model.name = "", name
    config.checkpoint.initial_load_path = config.data.tokenizer = ""  # have no part in it
    return resolve_model(read_model(config), config.tidar.mask_token_id, BytesTokenizer.size, None)


if __name__ == "__main__":
    main()
