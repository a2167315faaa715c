"""Checks a run before it is launched: python -m tidar.check --job.config_file FILE [--section.option value ...]

Checks the options against each other, the devices, the data and the dump folder, and the variables of run_train.sh
(NGPU, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, LOG_RANK). Prepares data that is not prepared yet, on node 0, trains
nothing, and prints the number of processes to start here.
"""

import os
import shutil
import sys

import torch

from tidar.config import (
    UserError,
    in_range,
    load_config,
    make_dump_folder,
    resolve_global_batch_size,
    user_errors_exit,
)
from tidar.distributed import check_device_count, logging_ranks
from tidar.models import Decoder, check_weights, open_weights, resolve_backend
from tidar.patterns import get_pattern
from tidar.training.inputs import load_inputs


def main() -> None:
    with user_errors_exit():
        config = load_config(sys.argv[1:], prog="python -m tidar.check")
        processes = _number("NGPU", default=max(1, torch.cuda.device_count()), minimum=1)
        nodes = _number("NNODES", default=1, minimum=1)
        for name, meaning in (("MASTER_ADDR", "the address of node 0"), ("NODE_RANK", "this node's number")):
            if nodes > 1 and not os.environ.get(name):
                raise UserError(f"{name}: must be {meaning} where NNODES = {nodes}")
        _number("NODE_RANK", default=0, minimum=0, maximum=nodes - 1)
        _number("MASTER_PORT", default=29500, minimum=1, maximum=65535)
        logging_ranks(processes * nodes)
        check_device_count(processes)
        if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
            print(f"warning: torch {torch.__version__} sees no GPU here, so the CPU trains", file=sys.stderr)
        resolve_global_batch_size(config, processes * nodes)
        resolve_backend(config.model.attention_backend, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        get_pattern(config.tidar.pattern)
        folder = make_dump_folder(config)
        if os.environ.get("NODE_RANK", "0") != "0":
            print(processes)  # node 0 looks after the data, which all nodes share
            return
        inputs = load_inputs(config)
        if inputs.warning:
            print(inputs.warning, file=sys.stderr)
        start = config.checkpoint.initial_load_path or config.model.hf_path
        goes_on = any(path.name[5:].isdigit() for path in folder.glob("checkpoint/step-*"))
        weights = open_weights(start) if start and not goes_on else None
        if weights:
            with torch.device("meta"):
                check_weights(weights, Decoder(inputs.spec.decoder), inputs.spec.vocab_size_before)
        print(processes)


def _number(name: str, default: int, minimum: int, maximum: int | None = None) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < minimum or (maximum is not None and int(text) > maximum):
        raise UserError(f"{name} = {text}: must be integer {in_range(minimum, maximum)}")
    return int(text)


if __name__ == "__main__":
    main()
