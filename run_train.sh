#!/usr/bin/env bash
# Trains on this machine, or as one node of many. Sets up an environment first if there is none.
#
#   ./run_train.sh [--section.option value ...]
#
# From the environment:
#   NGPU         processes on this machine (default: its GPUs, or 1 without any)
#   CONFIG_FILE  options of the run (default: train_configs/debug.toml beside this script)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   the nodes of the run, this one's number, and where node 0 listens
#   LOG_RANK     ranks that print, separated by commas (default: 0)
#   PYTHON       interpreter to use or to make the environment with (default: python3)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

CONFIG_FILE=${CONFIG_FILE:-$root/train_configs/debug.toml}
NNODES=${NNODES:-1}
PYTHON=$("${PYTHON:-python3}" "$root/tidar/environment.py")
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

options=(--job.config_file "$CONFIG_FILE" "$@")
for argument in "$@"; do
    case $argument in -h | --help) exec "$PYTHON" -m tidar.train --help ;; esac
done
NGPU=$("$PYTHON" -m tidar.check "${options[@]}")

if [ "$NGPU" -gt 1 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + NGPU - 1) / NGPU))} # the cores, shared out
fi
rendezvous=(--standalone)
if [ "$NNODES" -gt 1 ] || [ -n "${MASTER_PORT:-}" ]; then
    rendezvous=(--node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-localhost}" --master_port "${MASTER_PORT:-29500}")
fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "$NGPU" "${rendezvous[@]}" \
    -m tidar.train "${options[@]}"
