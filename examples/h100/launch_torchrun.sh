#!/usr/bin/env bash
# Starts a node's processes with torchrun: launch_torchrun.sh STAGE CONFIG [--flag value ...]. Not tested on a GPU yet.
#
# For several nodes, run the same command on each, within the rendezvous timeout, with
#   NNODES=8               how many there are
#   MASTER_ADDR=10.0.0.1   the first one, as the others reach it
#   RUN_ID=name            the same name on all nodes, and another name for every other run at the same time
#   ROLE=engine            on the ENGINE_NODES nodes that run vLLM servers
# MAX_RESTARTS=N starts all ranks again, up to N times, when one dies; give --save-interval and --auto-resume then.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/h100/env.sh

stage=$1 config=$2
shift 2
nodes=${NNODES:-1}
if [ "$nodes" -gt 1 ]; then
    address=${MASTER_ADDR:?the address of the first of $nodes nodes, as the others reach it}
    rendezvous=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$address:${MASTER_PORT:-29400}"
        --rdzv-id "${RUN_ID:-megatron_brain}")
else
    rendezvous=(--standalone)
fi

# torchrun passes the signals that it handles on to its workers, which save. After the timeout, in seconds, it kills
# workers that still run, so the timeout must cover the longest step and a save. torchrun reads --signals-to-handle and
# --shutdown-timeout from these variables. An old torch would refuse an unknown flag, but ignores the variable.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-280}
command=(torchrun "${rendezvous[@]}" --nproc-per-node "${GPUS_PER_NODE:-8}" --max-restarts "${MAX_RESTARTS:-0}"
    -m megatron_brain "$stage" --config "$config" "$@")
if [ "${ENGINE_SERVERS:-0}" = 0 ]; then exec "${command[@]}"; fi

# All nodes of a run have the same folder, and two runs have different ones.
folder=${ENGINE_DIR:?a folder for the addresses of the servers, which all nodes see}
export ENGINE_DIR=$folder/${RUN_ID:-megatron_brain}
if [ "${ROLE:-}" = engine ]; then exec bash examples/vllm/node.sh; fi
engine=()
if [ "${ENGINE_NODES:-0}" = 0 ]; then engine=(bash examples/vllm/node.sh); fi
exec bash examples/vllm/beside.sh ${engine[@]+"${engine[@]}"} -- "${command[@]}"
