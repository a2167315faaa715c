"""The runs that are compared: each is one TOML file with a few options changed, trained by the ordinary trainer."""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tidar.benchmarks.paper.corpus import Extent
from tidar.config import Config, UserError, load_config, to_toml
from tidar.config.files import parse_json
from tidar.distributed import leave_world
from tidar.models.huggingface.manifest import read_manifest, saved_steps
from tidar.training.outcome import NAME as OUTCOME
from tidar.training.reporting.metrics import validation_figures
from tidar.training.trainer import Trainer

CONFIGS = Path(__file__).parents[3] / "train_configs" / "paper_small"
CAUSAL, MAIN = "causal", "tidar-8"
BY_SIZE = {"4": "tidar-4", "8": MAIN, "16": "tidar-16"}
# of a block of 8 drafted tokens. The first is not used: the step has chosen that one itself
POSITIONS = "--tidar.place_weights 0 2 1.6 1.3 1.0 0.8 0.7 0.6"


@dataclass(frozen=True)
class Run:
    """A run by its name. options: that differ from the TOML file. starts_from: the run whose last weights it continues.

    own_text: some of its tokens are text sampled from that run at this temperature; None: there is no such text.
    own_share: how many of them.
    """

    name: str
    about: str
    options: str = ""
    starts_from: str = ""
    own_text: float | None = None
    own_share: float = 0.5


def _continued(steps: int, seed: int, options: str) -> str:
    return f"--training.steps {steps} --training.seed {seed} --optimizer.lr 7.5e-4 {options}".strip()


def _from_causal(name: str, about: str, options: str = "", seed: int = 1) -> Run:
    """A run that continues the causal model, as the paper continues Qwen."""
    return Run(name, about, _continued(600, seed, options), CAUSAL)


def _from_tidar(name: str, about: str, options: str = "", own_text: float | None = None, own_share: float = 0.5) -> Run:
    return Run(name, about, _continued(300, 3, options), MAIN, own_text, own_share)


# In the order in which they are trained: what the findings need most comes first, then ideas, then what repeats
RUNS = {
    run.name: run
    for run in (
        Run(CAUSAL, "autoregressive loss only", "--tidar.pattern causal"),
        Run("scratch-8", "TiDAR from scratch, as many steps as causal and tidar-8 together", "--training.steps 1500"),
        _from_causal(MAIN, "TiDAR, blocks of 8"),
        _from_causal("tidar-4", "blocks of 4", "--tidar.block_size 4"),
        _from_causal("tidar-16", "blocks of 16", "--tidar.block_size 16"),
        _from_causal("random-8", "random masking", "--tidar.pattern tidar_random"),
        _from_causal("causal-more", "continued with the autoregressive loss only", "--tidar.pattern causal"),
        _from_causal("ar-heavy-8", "loss weights 1 : 0.3", "--tidar.diffusion_loss_weight 0.3"),
        _from_causal("diffusion-heavy-8", "loss weights 0.3 : 1", "--tidar.ar_loss_weight 0.3"),
        _from_causal("positions-8", "diffusion loss weighted towards the positions that are drafted first", POSITIONS),
        _from_causal(
            "positions-light-8",
            "the same, with a weight of the diffusion loss of 0.8",
            f"{POSITIONS} --tidar.diffusion_loss_weight 0.8",
        ),
        _from_tidar("more-8", "tidar-8 continued as it was"),
        _from_tidar("own-text-8", "tidar-8 continued, half of it on its own greedy text", own_text=0.0),
        _from_tidar(
            "own-text-light-8",
            "the same, with a weight of the diffusion loss of 0.4",
            "--tidar.diffusion_loss_weight 0.4",
            own_text=0.0,
        ),
        _from_tidar(
            "own-text-quarter-8",
            "a quarter of it own greedy text, with a weight of the diffusion loss of 0.6",
            "--tidar.diffusion_loss_weight 0.6",
            own_text=0.0,
            own_share=0.25,
        ),
        _from_causal("random-8-seed-2", "random masking, second seed", "--tidar.pattern tidar_random", seed=2),
        _from_causal("tidar-8-seed-2", "blocks of 8, second seed", seed=2),
        _from_causal("offset-8", "blocks begin anywhere", "--tidar.random_block_offset"),
        _from_causal("mixed-8", "rows of blocks of 4, 8 and 16", "--tidar.block_sizes 4 8 16"),
        _from_tidar("own-samples-8", "tidar-8 continued, half of it on its own text, temperature 1", own_text=1.0),
        _from_causal("share-8", "half of the masked blocks", "--tidar.diffusion_share 0.5"),
        _from_causal("block-diffusion-8", "BD3-LM, the rival", "--tidar.pattern block_diffusion"),
    )
}


@dataclass(frozen=True)
class Scale:
    """Sizes of the whole table.

    prompts, new_tokens: of decoding; own_prompts: prompts that a model completes for a run of its own text.
    own_steps: of runs whose options say their steps, None as they say.
    """

    toml: Path
    extent: Extent
    prompts: int
    new_tokens: int
    own_prompts: int
    own_steps: int | None = None


FULL = Scale(CONFIGS / "base.toml", Extent(), prompts=256, new_tokens=256, own_prompts=8192)
SMOKE = Scale(
    CONFIGS / "smoke.toml",
    Extent(vocabulary=511, held_out=0.1, most_bytes=2**19),
    prompts=3,
    new_tokens=16,
    own_prompts=8,
    own_steps=4,
)


def select(names: list[str]) -> list[Run]:
    """Runs by their names, in the order of RUNS, with those that they continue; without names all.

    Raises UserError for an unknown name.
    """
    for name in names:
        if name not in RUNS:
            raise UserError(f"--only {name}: must be of smoke, {', '.join(RUNS)}")
    wanted = set(names or RUNS)
    for name in reversed(RUNS):  # a run comes after the one that it continues
        if name in wanted:
            wanted.add(RUNS[name].starts_from)
    return [run for name, run in RUNS.items() if name in wanted]


def run_folder(folder: Path, name: str) -> Path:
    return folder / "runs" / name


def run_config(run: Run, folder: Path, scale: Scale, own_text: Path | None = None, weight: float = 1.0) -> Config:
    """The options of a run. own_text: prepared text of the model that it continues, where it has such; weight: how
    often an epoch repeats it.
    """
    if not scale.toml.is_file():
        raise UserError(f"{scale.toml}: does not exist: run this from a checkout of the project")
    data = folder / "data"
    paths = [str(data / "training"), *([str(own_text)] if own_text else [])]
    arguments = ["--job.config_file", str(scale.toml), "--job.dump_folder", str(run_folder(folder, run.name))]
    arguments += ["--data.tokenizer", str(folder / "tokenizer"), "--data.paths", *paths]
    arguments += ["--validation.paths", str(data / "held_out"), *run.options.split()]
    if own_text:
        arguments += ["--data.weights", "1", f"{weight:.6f}"]
    if run.starts_from:
        arguments += ["--checkpoint.initial_load_path", str(last_step(folder, run.starts_from))]
    if scale.own_steps is not None and "--training.steps" in arguments:
        arguments += ["--training.steps", str(scale.own_steps)]
    return load_config(arguments, prog="python -m tidar.benchmarks.paper")


def is_finished(folder: Path, name: str) -> bool:
    """Whether a run has done all of its steps."""
    try:
        outcome = parse_json((run_folder(folder, name) / OUTCOME).read_bytes())
        return outcome["outcome"] == "finished" and bool(saved_steps(run_folder(folder, name)))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def last_step(folder: Path, name: str) -> Path:
    """The newest checkpoint of a run, which must have one."""
    return list(saved_steps(run_folder(folder, name)).values())[-1]


def check_options(config: Config) -> None:
    """Raises UserError where the run's folder has been begun with other options."""
    path = Path(config.job.dump_folder) / "config.toml"
    if not path.is_file():
        return
    before = load_config(["--job.config_file", str(path)])
    before.checkpoint.max_wall_minutes = config.checkpoint.max_wall_minutes
    lines = zip(to_toml(before).splitlines(), to_toml(config).splitlines(), strict=True)
    for old, new in lines:
        if old != new:
            raise UserError(
                f"{path.parent}: was trained with {old}, and now it is {new}; remove the folder, or keep the option"
            )


def train(config: Config, deadline: float | None) -> bool:
    """Trains a run from its newest checkpoint on. Returns whether it is finished: it may have been asked to stop.

    deadline: when it stops, on the clock of `time.monotonic`.
    """
    if deadline is not None:
        config.checkpoint.max_wall_minutes = max(0.01, (deadline - time.monotonic()) / 60)
    try:
        trainer = Trainer(config)
        trainer.train()
        return trainer.step == trainer.steps and not trainer.progress.is_interrupted
    finally:
        leave_world()


def trained(folder: Path, name: str) -> dict[str, Any]:
    """Figures of a finished run: its last validation, tokens, seconds and tokens/s of training."""
    step = last_step(folder, name)
    about = read_manifest(step)["about"]
    rates = []
    for line in (run_folder(folder, name) / "metrics.jsonl").read_text().splitlines():
        if (rate := parse_json(line).get("perf/tokens_per_second")) is not None:
            rates.append(rate)
    return {
        **validation_figures(run_folder(folder, name), about["step"]),
        "steps": about["step"],
        "tokens": about["tokens"],
        "seconds": about["seconds"],
        "tokens_per_second": median(rates) if rates else 0.0,
    }
