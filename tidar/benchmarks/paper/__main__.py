"""The paper's findings at small size: python -m tidar.benchmarks.paper --output FOLDER [--only NAME …] [--time_limit N]

Trains small models from scratch on the Python source of this interpreter's packages, each by an ordinary run of
tidar.train, decodes held-out prompts with them, and writes FOLDER/report.md: a table, pictures, and which of the
findings of the paper held. Called again, it resumes; what is finished is not repeated. --only smoke: a reduced form
that takes minutes on a CPU.
"""

import time
from argparse import Namespace
from pathlib import Path

import torch

from tidar.benchmarks.cases import free_memory
from tidar.benchmarks.paper.corpus import make_corpus
from tidar.benchmarks.paper.decoding import evaluate, judge, read_evaluation, write_own_text
from tidar.benchmarks.paper.report import write_report
from tidar.benchmarks.paper.runs import (
    CAUSAL,
    FULL,
    RUNS,
    SMOKE,
    Run,
    Scale,
    check_options,
    is_finished,
    run_config,
    select,
    train,
)
from tidar.config import ArgumentParser, Config, UserError, print_lines, user_errors_exit
from tidar.config.files import write_atomically

SECONDS = "seconds.txt"  # of all calls


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m tidar.benchmarks.paper", description=__doc__.split("\n\n")[1])
    parser.add_argument("--output", type=Path, required=True, help="folder for the corpus, the runs and the report")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME",
        help=f"runs [all], with those that they continue; smoke: the reduced form. Runs: {', '.join(RUNS)}",
    )  # fmt: skip
    parser.add_argument(
        "--time_limit", type=float, metavar="MINUTES", help="stop after so many; the same call resumes (default: never)"
    )
    with user_errors_exit():
        run(parser.parse_args(arguments))


def run(options: Namespace) -> None:
    started = time.monotonic()
    if options.time_limit is not None and not options.time_limit > 0:
        raise UserError(f"--time_limit {options.time_limit}: must be above 0")
    scale = SMOKE if "smoke" in options.only else FULL
    runs = select([name for name in options.only if name != "smoke"])
    folder = options.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be made ({error.strerror})") from None
    deadline = None if options.time_limit is None else started + 60 * options.time_limit
    corpus = make_corpus(folder, scale.extent)
    before, works = seconds_before(folder), not all(is_done(folder, one.name) for one in runs)

    def report() -> Path:
        seconds = before + (time.monotonic() - started) * works
        write_atomically(folder / SECONDS, f"{seconds:.1f}\n")
        return write_report(folder, corpus, scale, seconds)

    for one in runs:
        if not work(one, folder, scale, deadline):
            print_lines(f"stopped at {one.name}: the same command resumes")
            break
        judge_all(folder)
        report()
    else:
        print_lines(f"all {len(runs)} runs are done")
    print_lines(f"report: {report()}")


def seconds_before(folder: Path) -> float:
    """Wall time of the calls before that had something to do, each up to its last report."""
    try:
        return float((folder / SECONDS).read_text())
    except (OSError, ValueError):
        return 0.0


def is_done(folder: Path, name: str) -> bool:
    return is_finished(folder, name) and read_evaluation(folder, name) is not None


def work(one: Run, folder: Path, scale: Scale, deadline: float | None) -> bool:
    """Trains and evaluates a run, unless that is done. Returns False where the time is over before it is."""
    if is_done(folder, one.name):
        check_options(config_of(one, folder, scale))
        return True
    if is_over(deadline):
        return False
    print_lines(f"=== {one.name}: {one.about}")
    config = config_of(one, folder, scale)
    check_options(config)
    if not is_finished(folder, one.name):
        free_gpu()
        if not train(config, deadline) or is_over(deadline):
            return False
    free_gpu()
    evaluate(config_of(one, folder, scale), folder, one.name, scale)
    return True


def config_of(one: Run, folder: Path, scale: Scale) -> Config:
    config = run_config(one, folder, scale)
    if one.own_text is not None:
        own = write_own_text(folder, one.starts_from, one.own_text, config, scale)
        config = run_config(one, folder, scale, *own)
    return config


def is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def free_gpu() -> None:
    """Frees the memory of what came before, and what it has compiled, which does not fit another run."""
    if torch.cuda.is_available():
        free_memory()


def judge_all(folder: Path) -> None:
    if is_finished(folder, CAUSAL):
        judge(folder, list(RUNS))


if __name__ == "__main__":
    main()
