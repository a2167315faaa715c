"""Checks a run before it is launched: python -m tidar.check --job.config_file FILE [--section.option value ...]

Reads NGPU and NNODES from the environment as run_train.sh does. Checks the options against each other, the devices, the
data and the dump folder, without starting anything, and prints the number of processes to start on this machine.
"""

import os
import sys

import torch

from tidar.config import UserError, load_config, make_dump_folder, resolve_global_batch_size, user_errors_exit
from tidar.data import load_rows
from tidar.distributed import check_device_count
from tidar.models import decoder_config, resolve_backend
from tidar.patterns import get_pattern


def main() -> None:
    with user_errors_exit():
        config = load_config(sys.argv[1:], prog="python -m tidar.check")
        processes = _count("NGPU", default=max(1, torch.cuda.device_count()))
        check_device_count(processes)
        resolve_global_batch_size(config, processes * _count("NNODES", default=1))
        resolve_backend(config.model.attention_backend, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        get_pattern(config.tidar.pattern)
        _, _, vocabulary = load_rows(config)
        decoder_config(config.model.name, vocabulary.size)
        make_dump_folder(config)
        print(processes)


def _count(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"{name} = {text}: must be an integer >= 1")
    return int(text)


if __name__ == "__main__":
    main()
