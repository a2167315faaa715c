"""The report: findings, table and pictures, as one Markdown file."""

import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from tidar.benchmarks.cases import device_name
from tidar.benchmarks.paper.findings import FINDINGS, GAIN, IDEAS, SAME_LOSS, Result, idea_row, lookup_row, read_results
from tidar.benchmarks.paper.picture import line_chart
from tidar.benchmarks.paper.runs import BY_SIZE, MAIN, RUNS, SMOKE, Scale
from tidar.config.files import write_atomically

LOSSES = (
    "run", "AR loss", "diffusion loss", "at the first, middle, last position", "steps", "training tokens/s",
    "minutes of training, of evaluation",
)  # fmt: skip
DECODING = (
    "run", "tokens/forward, greedy", "of whole texts", "looped", "temperature 1",
    "trust diffusion: greedy, temperature 1", "lookup: greedy, temperature 1", "judged: AR, TiDAR, trust diffusion",
    "equal to AR", "tokens/s, speed-up",
)  # fmt: skip
LOSSES_LEGEND = """\
Losses of held-out packages, each position masked (block diffusion: its own loss). Minutes of training include its
start; those of evaluation are decoding and scores."""
DECODING_LEGEND = """\
tokens/forward: tokens per forward pass of held-out prompts up to the end of each text or where it begins to loop,
prefill counted, ± standard error over prompts; "of whole texts" counts loops too, "looped" is their share of the
tokens. trust diffusion: the first mask of a group decides a token (`draft_mix` 0). lookup: the draft is what followed
the last tokens where they occurred before, if they did (`lookup`). judged: mean loss of texts sampled at temperature 1
under the causal model, by autoregressive decoding, TiDAR, and TiDAR that trusts diffusion. equal to AR: share of greedy
texts, in the run's dtype; in float32, lookup included. tokens/s: greedy, one prompt at a time, and the ratio to
autoregressive decoding of the same model; measured for one run of each block size."""


def write_report(folder: Path, corpus: dict[str, Any], scale: Scale, seconds: float) -> Path:
    """Writes report.md and its pictures from what is finished so far. Returns its path.

    corpus: see `make_corpus`. seconds: that all of it has taken.
    """
    results = read_results(folder)
    lines = ["# The paper's findings at small size", ""]
    if scale is SMOKE:
        lines += [
            "Reduced form (`--only smoke`): it shows that all parts run; its figures mean nothing. Runs whose options "
            f"below say their steps have {scale.own_steps}.",
            "",
        ]
    lines += [*_setting(corpus, scale, results, seconds), "", "## Findings of the paper", ""]
    lines += _table(("finding", "here", "figures"), [finding.row(results) for finding in FINDINGS])
    lines += [
        "",
        "## Ideas beyond it",
        "",
        "Tokens per forward and AR loss relative to the run named, ± standard error over the prompts that both decode; "
        f"worth it: {GAIN:.0%} more tokens per forward, greedy, at an AR loss at most {SAME_LOSS:.1%} higher.",
        "",
    ]
    columns = ("idea", "compared with", "greedy", "temperature 1", "AR loss", "worth it")
    lines += _table(columns, [*(idea_row(name, results) for name in IDEAS), lookup_row(results)])
    lines += ["", "## Losses", "", *_table(LOSSES, [_losses(name, one) for name, one in results.items()])]
    decoded = {name: one for name, one in results.items() if one.evaluation["decoding"]}
    lines += ["", LOSSES_LEGEND, "", "## Decoding", ""]
    lines += [*_table(DECODING, [_decoding(name, one) for name, one in decoded.items()]), "", DECODING_LEGEND, ""]
    lines += [*_pictures(folder, results), "## Options", ""]
    toml = scale.toml.relative_to(scale.toml.parents[2])
    only = " --only smoke" if scale is SMOKE else ""
    lines += [
        f"`python -m tidar.benchmarks.paper --output FOLDER{only}` made this report. A run is `python -m tidar.train "
        f"--job.config_file {toml}` with the corpus of that folder and:",
        "",
    ]
    lines += _table(("run", "what", "options"), [_options(name) for name in RUNS])
    path = folder / "report.md"
    write_atomically(path, "\n".join(lines) + "\n")
    return path


def _setting(corpus: dict[str, Any], scale: Scale, results: dict[str, Result], seconds: float) -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files, tokens = corpus["files"], corpus["tokens"]
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in corpus["skipped"].items()) or "none"
    trained = sum(one.training["seconds"] for one in results.values()) / 60
    evaluated = sum(one.evaluation["seconds"] for one in results.values()) / 60
    return [
        f"- machine: {device_name(device)}, {os.cpu_count()} CPU cores, torch {torch.__version__}; commit {_commit()}",
        f"- corpus: {files['training']:,} Python files of {corpus['packages']:,} packages, {tokens['training']:,} "
        f"tokens; held out {files['held_out']:,} files of {len(corpus['held_out_packages']):,} packages, "
        f"{tokens['held_out']:,} tokens; vocabulary {corpus['vocabulary']:,}; digest {corpus['digest'][:16]}",
        f"- files that were skipped: {skipped}",
        f"- decoding: {scale.prompts} held-out prompts, up to {scale.new_tokens} new tokens, fewer where a text ends",
        f"- {len(results)} of {len(RUNS)} runs are finished, in {seconds / 60:.1f} minutes of one device (summed over "
        f"processes, without waiting): {trained:.1f} of training, {evaluated:.1f} of evaluation, the rest for the "
        "corpus, own texts, judging and what was interrupted",
    ]


def _commit() -> str:
    """Of the checkout, with a plus sign where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parents[3])]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + "+" * bool(changed.strip())


def _losses(name: str, one: Result) -> list[str]:
    training = one.training
    by_position = [value for k in range(64) if (value := one.score(f"diffusion_loss_at/{k}")) is not None]
    parts = [by_position[k] for k in (0, len(by_position) // 2, -1)] if by_position else []
    return [
        f"`{name}`",
        _number(one.score("ar_loss"), 4),
        _number(one.score("diffusion_loss"), 4),
        ", ".join(_number(value, 2) for value in parts),
        f"{training['steps']:,}",
        f"{training['tokens_per_second']:,.0f}",
        f"{training['seconds'] / 60:.1f}, {one.evaluation['seconds'] / 60:.1f}",
    ]


def _decoding(name: str, one: Result) -> list[str]:
    evaluation = one.evaluation
    greedy, sampled = one.decoded("greedy"), one.decoded("temperature 1")
    trusting, looked_up = (
        [one.decoded(f"{how}, {other}") for how in ("greedy", "temperature 1")]
        for other in ("trust diffusion", "lookup")
    )
    judged = ("ar, temperature 1", "temperature 1", "temperature 1, trust diffusion")
    speed = evaluation.get("speed")
    return [
        f"`{name}`",
        f"{greedy:.3f} ± {one.decoded('greedy', 'error'):.3f}" if greedy else "",
        _number(one.decoded("greedy", "whole_texts"), 3),
        f"{one.decoded('greedy' if greedy else 'ar', 'looped') or 0:.1%}",
        f"{sampled:.3f} ± {one.decoded('temperature 1', 'error'):.3f}" if sampled else "",
        *(", ".join(_number(value, 2) for value in values if value) for values in (trusting, looked_up)),
        ", ".join(_number(one.judged(how), 3) for how in judged if one.judged(how)),
        f"{evaluation['equal']:.0%}, {evaluation['equal_float32']:.0%}" if "equal" in evaluation else "",
        f"{speed['tidar']:,.0f}, {speed['tidar'] / speed['ar']:.2f}" if speed else "",
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _options(name: str) -> list[str]:
    run = RUNS[name]
    options = f"`{run.options}`" if run.options else ""
    if run.starts_from:
        options += f" from the weights of `{run.starts_from}`"
    return [f"`{name}`", run.about, options]


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def _pictures(folder: Path, results: dict[str, Result]) -> list[str]:
    """Charts of what there is, and the lines that show them."""
    (folder / "pictures").mkdir(exist_ok=True)
    lines = []
    sizes = {size: results[name] for size, name in BY_SIZE.items() if name in results}
    if sizes:
        series = {how: [one.decoded(how) for one in sizes.values()] for how in ("greedy", "temperature 1")}
        line_chart(
            folder / "pictures" / "tokens_per_forward.svg", "Tokens per forward pass", "block size", list(sizes), series
        )
        lines += ["![tokens per forward pass by block size](pictures/tokens_per_forward.svg)", ""]
    shown = [name for name in ("tidar-4", MAIN, "tidar-16", "random-8", "scratch-8", "positions-8") if name in results]
    accuracies = {name: [results[name].score(f"accuracy_diff_at/{k}") for k in range(16)] for name in shown}
    if accuracies:
        longest = max(sum(value is not None for value in values) for values in accuracies.values())
        ticks = [str(k) for k in range(longest)]
        series = {name: values[:longest] for name, values in accuracies.items()}
        path = folder / "pictures" / "accuracy_by_position.svg"
        line_chart(path, "Accuracy of drafts on held-out text", "position in the block", ticks, series)
        lines += ["![accuracy of drafts by position in the block](pictures/accuracy_by_position.svg)", ""]
    return lines
