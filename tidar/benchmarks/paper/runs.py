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
# of a run that continues another one: a third of its steps, over rows in another order
CONTINUES = "--training.steps 300 --training.seed 1 --optimizer.lr 7.5e-4"


@dataclass(frozen=True)
class Run:
    """A run by its name. options: that differ from the TOML file. starts_from: the run whose last weights it continues.

    own_text: temperature of the text by that run on which it trains too; None: there is no such text. own_share: of the
    tokens. drafts_only: whether that text has no part in the autoregressive loss.
    """

    name: str
    about: str
    options: str = ""
    starts_from: str = ""
    own_text: float | None = None
    own_share: float = 0.5
    drafts_only: bool = False


# In the order in which they are trained: what the findings need most comes first, then ideas, then what repeats
RUNS = {
    run.name: run
    for run in (
        Run(CAUSAL, "autoregressive loss only", "--tidar.pattern causal"),
        Run(MAIN, "TiDAR, blocks of 8"),
        Run("tidar-4", "blocks of 4", "--tidar.block_size 4"),
        Run("tidar-16", "blocks of 16", "--tidar.block_size 16"),
        Run("random-8", "random masking", "--tidar.pattern tidar_random"),
        Run("causal-more", "the causal model, continued as such", f"--tidar.pattern causal {CONTINUES}", CAUSAL),
        Run("continued-8", "the causal model, continued by TiDAR", CONTINUES, CAUSAL),
        Run("more-8", "tidar-8 continued as it was", CONTINUES, MAIN),
        Run("own-text-8", "tidar-8 continued, half of it on its own greedy text", CONTINUES, MAIN, own_text=0.0),
        Run(
            "own-tenth-8",
            "tidar-8 continued, a tenth of it on its own greedy text",
            CONTINUES,
            MAIN,
            own_text=0.0,
            own_share=0.1,
        ),
        Run(
            "own-drafts-8",
            "tidar-8 continued, half of it on its own greedy text, from which only drafts learn",
            CONTINUES,
            MAIN,
            own_text=0.0,
            drafts_only=True,
        ),
        Run(
            "positions-more-8",
            # of a drafted block the first token is not used: the step has chosen that one itself
            "tidar-8 continued, diffusion loss weighted towards the positions that are drafted first",
            f"--tidar.place_weights 0 2 1.6 1.3 1.0 0.8 0.7 0.6 {CONTINUES}",
            MAIN,
        ),
        Run("ar-heavy-8", "loss weights 1 : 0.3", "--tidar.diffusion_loss_weight 0.3"),
        Run("diffusion-heavy-8", "loss weights 0.3 : 1", "--tidar.ar_loss_weight 0.3"),
        Run("random-8-seed-1", "random masking, second seed", "--tidar.pattern tidar_random --training.seed 1"),
        Run("tidar-8-seed-1", "blocks of 8, second seed", "--training.seed 1"),
        Run("offset-8", "blocks begin anywhere", "--tidar.random_block_offset"),
        Run("mixed-8", "rows of blocks of 4, 8 and 16", "--tidar.block_sizes 4 8 16"),
        Run(
            "own-samples-8",
            "tidar-8 continued, half of it on its own text, temperature 1",
            CONTINUES,
            MAIN,
            own_text=1.0,
        ),
        Run(
            "own-targets-more-8",
            "tidar-8 continued, drafts learn the AR half's most likely tokens",
            f"--tidar.draft_targets model {CONTINUES}",
            MAIN,
        ),
        Run("share-8", "half of the masked blocks", "--tidar.diffusion_share 0.5"),
        Run("block-diffusion-8", "BD3-LM, the rival", "--tidar.pattern block_diffusion"),
    )
}


@dataclass(frozen=True)
class Scale:
    """Sizes of the whole table.

    prompts, new_tokens: of decoding; own_prompts: prompts that a model completes for a run of its own text.
    continued_steps: of runs that continue another one, None as their options say.
    """

    toml: Path
    extent: Extent
    prompts: int
    new_tokens: int
    own_prompts: int
    continued_steps: int | None = None


FULL = Scale(CONFIGS / "base.toml", Extent(), prompts=256, new_tokens=256, own_prompts=8192)
SMOKE = Scale(
    CONFIGS / "smoke.toml",
    Extent(vocabulary=511, held_out=0.1, most_bytes=2**19),
    prompts=3,
    new_tokens=16,
    own_prompts=8,
    continued_steps=4,
)


def select(names: list[str]) -> list[Run]:
    """Runs by their names, in the order of RUNS, with those that they continue; without names all.

    Raises UserError for an unknown name.
    """
    for name in names:
        if name not in RUNS:
            raise UserError(f"--only {name}: must be of smoke, {', '.join(RUNS)}")
    wanted = set(names or RUNS)
    wanted |= {RUNS[name].starts_from for name in wanted}
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
        arguments += ["--data.ar_weights", "1", "0"] if run.drafts_only else []
    if run.starts_from:
        arguments += ["--checkpoint.initial_load_path", str(last_step(folder, run.starts_from))]
        if scale.continued_steps is not None:
            arguments += ["--training.steps", str(scale.continued_steps)]
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
