#!/usr/bin/env bash
# Trains on this machine, or as one node of many. Sets up an environment first if there is none.
#
#   ./run_train.sh [--section.option value ...]
#
# SIGTERM and SIGUSR1 make the run save and stop.
#
# From the environment:
#   NGPU         processes on this machine (default: its GPUs, or 1 without any)
#   CONFIG_FILE  options of the run (default: train_configs/debug.toml beside this script)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   the nodes of the run, this one's number, and where node 0 listens
#                (default: those of the step, where srun has started this script on several nodes)
#   MAX_RESTARTS restarts from the newest checkpoint after a rank has died (default: 0)
#   LOG_RANK     ranks that print, separated by commas (default: 0)
#   PYTHON       interpreter to use or to make the environment with (default: python3)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

CONFIG_FILE=${CONFIG_FILE:-$root/train_configs/debug.toml}
PYTHON=$("${PYTHON:-python3}" "$root/scripts/environment.py")
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

options=(--job.config_file "$CONFIG_FILE" "$@")
for argument in "$@"; do
    case $argument in -h | --help) exec "$PYTHON" -m tidar.train --help ;; esac
done
plan=$("$PYTHON" -m tidar.check "${options[@]}")
NGPU=${plan%% *}

if [ "$NGPU" -gt 1 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + NGPU - 1) / NGPU))} # the cores, shared out
fi
case $plan in
    # a store for each attempt: the one of several nodes' torchruns would remember the addresses of dead processes
    *rdzv_endpoint*) export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 ;;
esac
# shellcheck disable=SC2086  # torchrun's options, as words
exec "$PYTHON" -m torch.distributed.run ${plan#* } -m tidar.train "${options[@]}"
