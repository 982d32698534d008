#!/usr/bin/env bash
# One node's processes under torchrun: launch_torchrun.sh STAGE CONFIG [--flag value ...]. Not run on a GPU.
#
# Several nodes: the same command on each, within the rendezvous timeout, with
#   NNODES=8               how many there are
#   MASTER_ADDR=10.0.0.1   the first one, as the others reach it
#   RUN_ID=name            the same on all, another for every run that is up at the same time
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

# A signal that torchrun handles goes on to its workers, which save; what is left after the timeout is killed. It must
# cover the longest step and a save. Both flags are those of torch 2.13.
exec torchrun "${rendezvous[@]}" --nproc-per-node "${GPUS_PER_NODE:-8}" --max-restarts "${MAX_RESTARTS:-0}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 280 \
    -m megatron_brain "$stage" --config "$config" "$@"
