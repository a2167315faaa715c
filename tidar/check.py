"""Checks a run before it is launched: python -m tidar.check --job.config_file FILE [--section.option value ...]

Checks the options against each other, the devices, the data and the dump folder, and the variables of run_train.sh
(NGPU, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, LOG_RANK, MAX_RESTARTS, and srun's). Prepares data that is not
prepared yet, on node 0, trains nothing, and prints the number of processes to start here and torchrun's options.

Models by their id on the hub are not downloaded: it says so where one is not in the cache.

python -m tidar.check --model FOLDER: whether tidar.evaluate can use an exported model or a checkpoint's step-<n>.
"""

import dataclasses
import os
import shutil
import subprocess
import sys

import torch
from torch.distributed.launcher.api import LaunchConfig

from tidar.config import (
    ArgumentParser,
    Config,
    UserError,
    in_range,
    load_config,
    make_dump_folder,
    print_lines,
    user_errors_exit,
)
from tidar.config.hub import cached_folder, hub_id, local_folder
from tidar.decoding.load import read_method
from tidar.decoding.prompts import model_tokenizer
from tidar.distributed import check_device_count, logging_ranks
from tidar.evaluation.tasks import check_lm_eval
from tidar.models import Decoder
from tidar.models.huggingface import assets_folder, check_weights, open_model, read_config_json
from tidar.models.huggingface.manifest import saved_steps
from tidar.training.first_weights import open_first_weights
from tidar.training.inputs import load_inputs, missing_on_disk
from tidar.training.plan import plan_run
from tidar.training.run_lock import RunLock

# torchrun's own, and what Slurm sends before a job's time is over (--signal=B:USR1@300)
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main() -> None:
    with user_errors_exit():
        if any(argument.partition("=")[0] == "--model" for argument in sys.argv[1:]):
            parser = ArgumentParser(prog="python -m tidar.check")
            parser.add_argument("--model", required=True)
            print_lines(*check_model(parser.parse_args().model))
            return
        config = load_config(sys.argv[1:], prog="python -m tidar.check")
        processes = _number("NGPU", default=max(1, torch.cuda.device_count()), minimum=1)
        launcher, nodes, node = launcher_options()
        logging_ranks(processes * nodes)
        check_device_count(processes)
        if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
            print(f"warning: torch {torch.__version__} sees no GPU here, so the CPU trains", file=sys.stderr)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        plan_run(config, processes * nodes, device)
        folder = make_dump_folder(config)
        answer = f"{processes} --nproc_per_node {processes} {launcher} {signal_options(config)}"
        if node:
            print(answer)  # node 0 prepares the data, which all nodes share
            return
        lock = RunLock(folder)
        if missing := missing_on_disk(config):
            print_lines(*missing, "the model and the data are checked once they are there", file=sys.stderr)
            del lock
            print(answer)
            return
        inputs = load_inputs(config)
        if inputs.warning:
            print_lines(inputs.warning, file=sys.stderr)
        plan_run(config, processes * nodes, device, inputs.spec.decoder, inputs.spec.mask_token_id)
        weights = None if saved_steps(folder) else open_first_weights(config)
        if weights:
            with torch.device("meta"):
                check_weights(weights, Decoder(inputs.spec.decoder), inputs.spec.vocab_size_before)
        del lock
        print(answer)


def check_model(name: str) -> list[str]:
    """Lines about a model for tidar.evaluate. Raises UserError where it cannot be evaluated as a TiDAR model."""
    if hub_id(name) and not cached_folder(name):
        return [f"{name}: is not in the hub's cache; tidar.evaluate downloads it"]
    folder = local_folder(name, "--model")
    model, weights = open_model(folder)
    check_weights(weights, model)
    assets, vocab_size = assets_folder(folder), model.config.vocab_size
    method = read_method(read_config_json(assets), str(assets / "config.json"), vocab_size)
    if method is None:
        raise UserError(
            f'{folder}: config.json has no section "tidar", and so no mask token; evaluate it with --mode ar'
        )
    tokenizer = model_tokenizer(folder, None, vocab_size)
    lines = [
        f"{folder}: pattern {method.pattern}, blocks of {method.block_size}, mask token {method.mask_token_id}, "
        f"tokenizer of {tokenizer.size} ids"
    ]
    if tokenizer.name == "bytes":
        lines.append("it holds no tokenizer: texts are bytes, which --tasks cannot ask")
    try:
        check_lm_eval()
    except UserError as error:
        lines.append(str(error))
    return lines


def signal_options(config: Config) -> str:
    """torchrun's options for the signals that it passes on, and for how long the processes may save after one."""
    options = f"--signals_to_handle {SIGNALS}"
    if "shutdown_timeout" in {field.name for field in dataclasses.fields(LaunchConfig)}:  # torch 2.11 has none
        options += f" --shutdown_timeout {config.comm.save_timeout_seconds}"
    return options


def launcher_options() -> tuple[str, int, int]:
    """torchrun's options, the number of nodes, and which this is. Raises UserError for variables that do not fit."""
    variables = {name: os.environ.get(name, "") for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}
    if not variables["NNODES"] and _number("SLURM_STEP_NUM_NODES", default=1, minimum=1) > 1:
        variables |= _slurm_variables()
    nodes = _number("NNODES", default=1, minimum=1, text=variables["NNODES"])
    for name, meaning in (("MASTER_ADDR", "the address of node 0"), ("NODE_RANK", "this node's number")):
        if nodes > 1 and not variables[name]:
            raise UserError(f"{name}: must be {meaning} where NNODES = {nodes}")
    node = _number("NODE_RANK", default=0, minimum=0, maximum=nodes - 1, text=variables["NODE_RANK"])
    port = _number("MASTER_PORT", default=29500, minimum=1, maximum=65535)
    restarts = _number("MAX_RESTARTS", default=0, minimum=0)
    rendezvous = "--standalone"
    address = variables["MASTER_ADDR"] or "localhost"
    if nodes > 1 and restarts:
        # the only one that restarts the processes of other nodes too
        rendezvous = f"--rdzv_backend c10d --rdzv_endpoint {address}:{port} --rdzv_id tidar"
    elif nodes > 1 or variables["MASTER_PORT"]:
        rendezvous = f"--node_rank {node} --master_addr {address} --master_port {port}"
    return f"--nnodes {nodes} --max_restarts {restarts} {rendezvous}", nodes, node


def _slurm_variables() -> dict[str, str]:
    """NNODES, NODE_RANK and MASTER_ADDR of a step that srun has started on several nodes."""
    names = ("SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_NODEID")
    missing = [name for name in names if not os.environ.get(name)]
    nodes, tasks, node_list, node = (os.environ.get(name, "") for name in names)
    if missing:
        raise UserError(
            f"{missing[0]}: is not set, though SLURM_STEP_NUM_NODES = {nodes}; start with srun, or set NNODES"
        )
    if tasks != nodes:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS = {tasks}: must be one task on each of {nodes} nodes (--ntasks-per-node=1)"
        )
    address = os.environ.get("MASTER_ADDR")
    if not address:
        try:
            hosts = subprocess.run(
                ["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True
            )
            address = hosts.stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            raise UserError(
                f"MASTER_ADDR: must be the first of {node_list}, which scontrol does not resolve here"
            ) from None
    return {"NNODES": nodes, "NODE_RANK": node, "MASTER_ADDR": address}


def _number(name: str, default: int, minimum: int, maximum: int | None = None, text: str = "") -> int:
    """The number that `text` or else the variable `name` holds."""
    text = text or os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < minimum or (maximum is not None and int(text) > maximum):
        raise UserError(f"{name} = {text}: must be integer {in_range(minimum, maximum)}")
    return int(text)


if __name__ == "__main__":
    main()
