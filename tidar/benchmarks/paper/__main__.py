"""The paper's findings at small size: python -m tidar.benchmarks.paper --output FOLDER [--only NAME …] [--time_limit N]

Trains small models on the Python source of this interpreter's packages, each by an ordinary run of tidar.train,
decodes held-out prompts with them, and writes FOLDER/report.md: a table, pictures, and which of the findings of the
paper held. Called again, it resumes; what is finished is not repeated. Started several times at once, each on a GPU of
its own, it shares the runs. --only smoke: a reduced form that takes minutes on a CPU.
"""

import time
import traceback
from argparse import Namespace
from collections.abc import Callable
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
from tidar.benchmarks.paper.sharing import add_seconds, held, seconds_of_all
from tidar.config import ArgumentParser, Config, UserError, first_line, print_lines, user_errors_exit

POLL = 1.0  # seconds between two looks at what other processes have finished


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
    if options.time_limit is not None and not options.time_limit > 0:
        raise UserError(f"--time_limit {options.time_limit}: must be above 0")
    deadline = None if options.time_limit is None else time.monotonic() + 60 * options.time_limit
    scale = SMOKE if "smoke" in options.only else FULL
    runs = select([name for name in options.only if name != "smoke"])
    folder = options.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be made ({error.strerror})") from None
    with held(folder, "corpus"):
        started = time.monotonic()
        corpus = make_corpus(folder, scale.extent)

    def report(seconds: float = 0.0) -> Path:
        """seconds: that this process has worked since its last report."""
        with held(folder, "report"):
            if is_finished(folder, CAUSAL):
                judge(folder, list(RUNS))
            add_seconds(folder, seconds)
            return write_report(folder, corpus, scale, seconds_of_all(folder))

    for one in runs:
        if is_done(folder, one.name):
            check_options(config_of(one, folder, scale))
    if not all(is_done(folder, one.name) for one in runs):
        report(time.monotonic() - started)
    failed: dict[str, str] = {}
    print_lines(work_on(runs, folder, scale, deadline, report, failed), f"report: {report()}")
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise UserError(f"{len(failed)} runs failed, and those that continue them: {reasons}")


def is_done(folder: Path, name: str) -> bool:
    return is_finished(folder, name) and read_evaluation(folder, name) is not None


def work_on(
    runs: list[Run],
    folder: Path,
    scale: Scale,
    deadline: float | None,
    report: Callable[[float], object],
    failed: dict[str, str],
) -> str:
    """Trains and evaluates, one after another, the runs that no other process works on. Returns how it ended.

    A run that continues another one waits until that is trained, while there are others to do. failed: gets the names
    of runs that raised an error, and why; the others continue.
    """
    while True:
        lost = set(failed)
        for one in runs:  # each comes after the one that it continues
            if one.starts_from in lost:
                lost.add(one.name)
        left = [one for one in runs if one.name not in lost and not is_done(folder, one.name)]
        if not left:
            return "the other runs are done" if failed else f"all {len(runs)} runs are done"
        if is_over(deadline):
            return f"stopped at {left[0].name}: the same command resumes"
        begun = [one for one in left if not one.starts_from or is_finished(folder, one.starts_from)]
        for one in begun:
            started = time.monotonic()
            with held(folder, one.name, wait=False) as is_held:
                if not is_held or is_done(folder, one.name):
                    continue
                try:
                    is_whole = work(one, folder, scale, deadline)
                except Exception as error:
                    if not isinstance(error, UserError):
                        traceback.print_exc()
                    failed[one.name], is_whole = first_line(error), True
            report(time.monotonic() - started)
            if not is_whole:
                return f"stopped at {one.name}: the same command resumes"
            break
        else:
            if len(begun) == len(left):
                return f"other processes work on the rest: {', '.join(one.name for one in left)}"
            time.sleep(POLL)


def work(one: Run, folder: Path, scale: Scale, deadline: float | None) -> bool:
    """Trains and evaluates a run. Returns False where the time is over, or the run asked to stop, before it is done."""
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
        with held(folder, f"text of {one.starts_from}"):
            own = write_own_text(folder, one, one.own_text, config, scale)
        config = run_config(one, folder, scale, *own)
    return config


def is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def free_gpu() -> None:
    """Frees the memory of what came before, and what it has compiled, which does not fit another run."""
    if torch.cuda.is_available():
        free_memory()


if __name__ == "__main__":
    main()
