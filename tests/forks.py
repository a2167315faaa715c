"""Processes that start at once: forked from one that has imported all they need, and computed nothing."""

import gc
import multiprocessing
import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).parent.parent

_context = multiprocessing.get_context("forkserver")
# an optimizer imports torch._dynamo and a tokenizer transformers, which take a second each
PRELOADED = ["torch._dynamo", "transformers.models.auto.tokenization_auto", "rank_pool", "stops", "faulty"]
_context.set_forkserver_preload([*PRELOADED, "tidar.prepare_data", "tidar.export"])
Pipe = _context.Pipe


def start(function, *arguments, log: Path) -> BaseProcess:
    """Calls a function of a module in a process that leads its own group, and prints to the file `log`."""
    process = _context.Process(target=_run, args=(function, arguments, log))
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    # the first call starts the process that forks, which keeps its environment
    with mock.patch.dict(os.environ, variables | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}):
        process.start()
    return process


def _run(function, arguments: tuple, log: Path) -> None:
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    gc.freeze()  # what is imported: a collection would take longer than a small run
    function(*arguments)


def call(function, *arguments, log: Path, timeout: float = 100) -> tuple[int, str]:
    """Exit code and output of such a process."""
    process = start(function, *arguments, log=log)
    process.join(timeout)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode, log.read_text()


def torchrun(ranks: int, function, *arguments, restarts: int = 0) -> None:
    """Calls a function in each rank, forked by torchrun's agent, which is this process."""
    options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    options |= {"start_method": "fork", "max_restarts": restarts, "signals_to_handle": "SIGTERM,SIGUSR1"}
    elastic_launch(LaunchConfig(1, 1, ranks, run_id=str(os.getpid()), **options), function)(*arguments)
