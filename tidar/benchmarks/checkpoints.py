"""Measures the cost of saving during training, and start-up time: python -m tidar.benchmarks.checkpoints [options]

Trains with each checkpoint.async_mode, saving twice on the way, and then resumes from the last checkpoint. Further
arguments are options of tidar.train; --model.name, --training.seq_len and --training.local_batch_size matter most. With
--ngpu it trains on several devices of this machine; rates are per device. Needs room for two checkpoints, 12 bytes a
parameter each, where TMPDIR says: a slow disk is measured too.
"""

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tidar.benchmarks.ranks import launcher
from tidar.config import ArgumentParser, user_errors_exit

MODES = ("disabled", "async", "async_with_pinned_mem")


def command(ngpu: int, mode: str, interval: int, steps: int, folder: Path, options: list[str]) -> list[str]:
    words = launcher(ngpu) if ngpu > 1 else [sys.executable, "-u", "-m"]
    words += ["tidar.train", "--checkpoint.async_mode", mode, "--metrics.log_freq", "1"]
    words += ["--checkpoint.interval", str(interval), "--checkpoint.keep_latest_k", "1", "--validation.enable", "false"]
    return [*words, *options, "--training.steps", str(steps), "--job.dump_folder", str(folder)]


def measure(ngpu: int, mode: str, interval: int, folder: Path, options: list[str]) -> str:
    """A table row: speed away from saves and right after them, stalls of the saves, size of one."""
    words = command(ngpu, mode, interval, 2 * interval + 2, folder, options)
    if code := subprocess.run(words, stdout=subprocess.DEVNULL).returncode:
        sys.exit(code)  # it has printed its error
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    stalls = [line["perf/save_stall_seconds"] for line in lines if "perf/save_stall_seconds" in line]
    # the first steps compile
    speeds = {line["step"]: line["perf/tokens_per_second"] for line in lines if line["step"] > 3}
    writing = [speed for step, speed in speeds.items() if step > interval and 1 < step % interval <= interval // 4 + 1]
    quiet = [speed for step, speed in speeds.items() if not step > interval or step % interval > interval // 2]
    newest = next((folder / "checkpoint").iterdir())
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    return (
        f"{mode:<22} {statistics.median(quiet):>10,.0f} {statistics.median(writing):>13,.0f} "
        f"{' '.join(f'{stall:9.3f}' for stall in stalls):<20} {size / 2**30:>7.2f}"
    )


def measure_restart(ngpu: int, interval: int, folder: Path, options: list[str]) -> str:
    """Resumes for a step from the newest checkpoint there."""
    started = time.perf_counter()
    words = command(ngpu, "disabled", 10**6, 2 * interval + 3, folder, options)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if found := re.search(r"checked and restored in ([\d.]+) s", line):
                restored = found[1]
            if line.startswith("step") and "loss" in line:
                seconds = time.perf_counter() - started
    return f"a start from it: {seconds:.1f} s to the end of the first step, of which {restored} s to check and restore"


def main() -> None:
    description = __doc__.split("\n\n")[1]
    parser = ArgumentParser(prog="python -m tidar.benchmarks.checkpoints", description=description)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--ngpu", type=int, default=1, help="devices [1]")
    parser.add_argument("--interval", type=int, default=60, help="steps between saves, long enough to write one [60]")
    with user_errors_exit():
        arguments, options = parser.parse_known_args()
    header = ("checkpoint.async_mode", "tokens/s", "while writing", "stalls of saves, s", "GiB")
    print("{:<22} {:>10} {:>13} {:<20} {:>7}".format(*header), flush=True)
    for mode in arguments.modes:
        folder = Path(tempfile.mkdtemp(prefix="tidar-checkpoints-"))
        try:
            print(measure(arguments.ngpu, mode, arguments.interval, folder, options), flush=True)
            if mode == arguments.modes[-1]:
                print(measure_restart(arguments.ngpu, arguments.interval, folder, options))
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
