"""Evaluates a trained model: python -m tidar.evaluate --model FOLDER …

FOLDER is an exported model or a checkpoint's step-<n>. With a step, or --run, held-out data of the run are scored and
its prompts decoded: losses, accuracies by position in the block, tokens per forward pass, tokens accepted in a step,
tokens/s and the speed-up over autoregressive decoding on this machine. --prompts decodes those of a file instead.
--tasks asks lm-eval's tasks (extra eval). Prints a table and writes a JSON file.
"""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from tidar.config import ArgumentParser, Config, UserError, load_config, print_lines, user_errors_exit
from tidar.config.files import check_output, write_atomically
from tidar.config.hub import local_folder
from tidar.config.options import Parallelism
from tidar.data import Tokenizer
from tidar.decoding import Engine, load
from tidar.decoding.prompts import end_tokens, model_tokenizer, read_prompts
from tidar.decoding.sampling import Sampling
from tidar.distributed import compute_dtype, join_world, leave_world
from tidar.evaluation import held_out_prompts, measure_speed, n_new_tokens, validate
from tidar.evaluation.prompts import MOST_NEW_TOKENS
from tidar.evaluation.report import decoding_lines, speed_up, table
from tidar.evaluation.scores import scorer
from tidar.evaluation.tasks import Tasks, task_rows
from tidar.models.huggingface import assets_folder
from tidar.models.huggingface.manifest import read_manifest
from tidar.training.batches import Batches
from tidar.training.inputs import load_inputs
from tidar.training.plan import plan_run
from tidar.training.reporting.metrics import validation_lines

# held-out prompts, where the run's validation decodes none
N_PROMPTS = 64


def main(arguments: list[str] | None = None) -> None:
    with user_errors_exit():
        run(_parser().parse_args(arguments))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m tidar.evaluate", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of the model, or a checkpoint's step-<n>")
    parser.add_argument("--run", help="run whose held-out data are used (default: the run that the model lies in)")
    parser.add_argument(
        "--tokenizer", help="tokenizer's folder or hub id, or bytes (default: the tokenizer in the model's folder)"
    )
    parser.add_argument(
        "--prompts", help="JSON lines: chats, prompts or texts to decode (default: the run's held-out data)"
    )
    parser.add_argument(
        "--n_prompts", type=int,
        help=f"held-out prompts to decode [validation.generate_prompts of the run, or {N_PROMPTS}]",
    )  # fmt: skip
    parser.add_argument(
        "--max_new_tokens", type=int,
        help=f"[{MOST_NEW_TOKENS}; of held-out prompts at most half a row]",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy [0]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--mode", choices=["tidar", "ar"], default="tidar", help="ar: plain autoregressive decoding")
    parser.add_argument(
        "--lookup", type=int, default=0,
        help="draft what followed the last tokens where LOOKUP or more of them occurred before; 0: nowhere [0]",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=32, help="sequences decoded at a time [32]")
    parser.add_argument("--tasks", help="lm-eval's tasks, groups and tags, separated by commas: gsm8k,arc_easy")
    parser.add_argument("--limit", type=float, help="examples of each task; below 1: a share of them (default: all)")
    parser.add_argument("--num_fewshot", type=int, help="examples in each prompt (default: as the task says)")
    parser.add_argument("--apply_chat_template", action="store_true", help="ask tasks in the model's chat template")
    parser.add_argument("--include_path", type=Path, help="folder with further tasks in YAML")
    parser.add_argument(
        "--confirm_run_unsafe_code", action="store_true", help="run tasks that execute code which the model writes"
    )
    parser.add_argument("--output", default="evaluation.json", help="JSON file to write [evaluation.json]")
    return parser


def run(options: Namespace) -> None:
    for name, value in (("batch_size", options.batch_size), ("n_prompts", options.n_prompts)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if not options.tasks:
        _check_no_task_options(options)
    output = Path(options.output)
    check_output(output)
    model = local_folder(options.model, "--model")
    if not model.is_dir():
        raise UserError(f"--model {model}: must be an exported folder, a checkpoint's step-<n> or an id of the hub")
    run_folder = _run_folder(options.run, model)
    if not run_folder and not options.prompts and not options.tasks:
        raise UserError(f"{model}: lies in no run whose held-out data could be used; give --prompts, --run or --tasks")
    tasks = _tasks(options) if options.tasks else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = _run_config(run_folder, model) if run_folder else None
    dtype = compute_dtype(config, device) if config else None
    engine = load(model, dtype=dtype, device=device, max_batch_size=options.batch_size)
    results: dict[str, Any] = {
        "model": options.model,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(engine.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    lines = [f"{options.model}, {results['device']}, {results['dtype']}"]
    tokenizer: Tokenizer | None = None
    if tasks or options.prompts or options.tokenizer:
        tokenizer = model_tokenizer(model, options.tokenizer, engine.model.config.vocab_size)
    texts = tasks.checked_tokenizer(tokenizer, str(model)) if tasks and tokenizer else None
    prompts = _given_prompts(Path(options.prompts), tokenizer) if options.prompts and tokenizer else None
    n_new = options.max_new_tokens
    if n_new is None:
        n_new = n_new_tokens(config.training.seq_len) if config and prompts is None else MOST_NEW_TOKENS
    engine.check(prompts or [], n_new, Sampling(options.temperature, lookup=options.lookup), options.mode)
    held_out = HeldOut(config, engine) if config else None
    try:
        if held_out and held_out.n_rows:
            results["held_out"] = {"run": str(run_folder), "rows": held_out.n_rows} | held_out.scores()
            lines += [
                f"held-out data of {run_folder}: {held_out.n_rows:,} rows",
                *validation_lines(results["held_out"]),
            ]
        if options.prompts or (held_out and held_out.n_rows):
            results["decoding"], decoding = _decode(options, n_new, engine, held_out, tokenizer, prompts)
            lines += decoding
        elif not tasks:
            raise UserError(f"{run_folder}: holds out no data (validation.enable = false); give --prompts or --tasks")
        if tasks and texts:
            results["lm_eval"] = tasks.run(engine, texts, mode=options.mode, seed=options.seed, lookup=options.lookup)
            lines += table(task_rows(results["lm_eval"]))
    finally:
        leave_world()
    print_lines(*lines)
    try:
        write_atomically(output, json.dumps(results, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
    print(f"written to {output}")


def _check_no_task_options(options: Namespace) -> None:
    for name in ("limit", "num_fewshot", "apply_chat_template", "include_path", "confirm_run_unsafe_code"):
        value = getattr(options, name)
        if value is not None and value is not False:
            raise UserError(f"--{name}{'' if value is True else f' {value}'}: is for --tasks, which is not given")


def _tasks(options: Namespace) -> Tasks:
    for name, value, least in (("limit", options.limit, 0), ("num_fewshot", options.num_fewshot, -1)):
        if value is not None and not value > least:
            raise UserError(f"--{name} {value}: must be above {least}")
    names = [name for name in options.tasks.split(",") if name]
    return Tasks(
        names,
        options.limit,
        options.num_fewshot,
        options.apply_chat_template,
        options.include_path,
        options.confirm_run_unsafe_code,
    )


def _run_folder(named: str | None, model: Path) -> Path | None:
    """The run called `named`, or that of <run>/checkpoint/step-<n> and <run>/export/epoch_<n>."""
    folder = Path(named) if named else model.resolve().parent.parent
    if (folder / "config.toml").is_file():
        return folder
    if named:
        raise UserError(f"--run {named}: holds no config.toml: must be a run's job.dump_folder")
    return None


def _run_config(run_folder: Path, model: Path) -> Config:
    """Options of the run, for one device and for the model that is evaluated."""
    config = load_config(["--job.config_file", str(run_folder / "config.toml")])
    config.parallelism = Parallelism()
    config.training.global_batch_size, config.training.enable_cpu_offload = -1, False
    config.training.float8, config.model.attention_backend = False, "auto"
    # config.json and the tokenizer are those of the weights
    config.model.hf_path, config.checkpoint.initial_load_path = str(assets_folder(model)), ""
    config.data.tokenizer = config.data.tokenizer if config.data.tokenizer == "bytes" else ""
    if config.validation.steps != -1 and assets_folder(model) != model:
        about = read_manifest(model)["about"]
        degrees = about.get("options", {}).get("parallelism", {})
        shares = [degrees.get(f"{kind}_parallel_degree", 1) for kind in ("context", "tensor")]
        config.validation.steps *= about["devices"] // math.prod(shares)
    return config


class HeldOut:
    """The held-out rows of a run."""

    def __init__(self, config: Config, engine: Engine):
        if engine.method:
            config.tidar.pattern, config.tidar.block_size = engine.method.pattern, engine.method.block_size
        self.engine = engine
        self.inputs = load_inputs(config, prepares=False)
        spec = self.inputs.spec
        self.plan = plan_run(config, 1, engine.device, spec.decoder, spec.mask_token_id)
        self.batches = Batches(self.plan, self.inputs.data, join_world(config))
        self.n_rows = len(self.batches.held_out_rows)

    def scores(self) -> dict[str, float]:
        """The scalars of the run's validation."""
        pattern, chunk_size = self.plan.validation_pattern, self.plan.config.training.loss_chunk_size
        return validate(
            self.batches.validation(),
            scorer(self.engine.model, pattern, self.plan.loss_weights, chunk_size),
            block_size=pattern.block_size,
            loss_weights=self.plan.loss_weights,
            device=self.engine.device,
        )

    def prompts(self, n: int | None) -> list[list[int]]:
        """n of them, or those that the run's validation decodes."""
        n = n or self.plan.config.validation.generate_prompts or N_PROMPTS
        return held_out_prompts(self.batches.held_out_rows, n)


def _given_prompts(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    prompts = [tokens for _, _, tokens in read_prompts(path, tokenizer)]
    if not prompts:
        raise UserError(f"--prompts {path}: holds no prompts")
    return prompts


def _decode(
    options: Namespace,
    n_new: int,
    engine: Engine,
    held_out: HeldOut | None,
    tokenizer: Tokenizer | None,
    prompts: list[list[int]] | None,
) -> tuple[dict[str, Any], list[str]]:
    """Results of decoding at most `n_new` tokens for each prompt, and lines that show them.

    prompts: None for those of the held-out data.
    """
    source = options.prompts
    if prompts is None:
        assert held_out
        source, prompts = "held-out data", held_out.prompts(options.n_prompts)
        if not options.tokenizer:
            tokenizer = held_out.inputs.tokenizer  # the data may have none
    settings = {name: getattr(options, name) for name in ("temperature", "seed", "lookup")} | {"max_new_tokens": n_new}
    measured = measure_speed(engine, prompts, options.mode, stop_token_ids=end_tokens(engine, tokenizer), **settings)
    results: dict[str, Any] = {"prompts_of": source, **settings, "batch_size": options.batch_size}
    results |= {mode: decoded.report() for mode, decoded in measured.items()} | {"speed_up": speed_up(measured)}
    how = "greedy" if options.temperature == 0 else f"temperature {options.temperature}"
    how += f", lookup {options.lookup}" if options.lookup else ""
    title = (
        f"{len(prompts)} prompts of {source}, at most {n_new} new tokens each, {how}, {options.batch_size} at a time"
    )
    return results, [title, *decoding_lines(measured)]


if __name__ == "__main__":
    main()
