#!/usr/bin/env bash
# Runs the vLLM servers of one node, until the run is over; the launchers start it. Not tested on a GPU yet.
#
#   ENGINE_MODEL=folder         untied export of the model that the run starts from
#   ENGINE_SERVERS=N            servers of this node, of ENGINE_TENSOR_PARALLEL=N GPUs each (1)
#   ENGINE_DIR=folder           on storage that all nodes see: the servers' addresses are written there
#   ENGINE_PORT=N               the first port (8000)
#   ENGINE_HOST, ENGINE_GPUS, VLLM_PYTHON, MAX_MODEL_LEN, ...   as examples/vllm/serve.sh has them
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
: "${ENGINE_MODEL:?the untied export of the model that the run starts from}"
: "${ENGINE_DIR:?a folder that all nodes see}"

# These belong to the trainer, whose environment Slurm passes on.
unset CUDA_DEVICE_MAX_CONNECTIONS PYTORCH_CUDA_ALLOC_CONF
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
name=${SLURMD_NODENAME:-$(hostname)}
export ENGINE_HOST=${ENGINE_HOST:-$name} URL_FILE=$ENGINE_DIR/url-$name LOGS=${LOGS:-$ENGINE_DIR/logs-$name}
mkdir -p "$ENGINE_DIR"
touch "$ENGINE_DIR/started-$name"
trap '' USR1 # Slurm's notice is for the trainer, as serve.sh says.

bash examples/vllm/serve.sh "$ENGINE_MODEL" "${ENGINE_SERVERS:-1}" "${ENGINE_TENSOR_PARALLEL:-1}" \
    "${ENGINE_PORT:-8000}" &
servers=$!
trap 'kill -TERM $servers 2> /dev/null' TERM INT HUP

# beside.sh touches `over` when the run ends. An older one is of an earlier run.
while kill -0 $servers 2> /dev/null; do
    if [ "$ENGINE_DIR/over" -nt "$ENGINE_DIR/started-$name" ]; then kill -TERM $servers 2> /dev/null; fi
    sleep 0.5
done
wait $servers
