#!/usr/bin/env bash
# Starts a run on NODES nodes of 8 GPUs (GPUS_PER_NODE=N for other numbers). Not tested on a GPU yet.
#
#   launch.sh NODES STAGE CONFIG [--flag value ...]
#
#   DRY_RUN=1         check everything for that many nodes on this machine, without a GPU, and print a report
#   LAUNCHER=slurm    submit a job (launch_slurm.sbatch); SBATCH_ARGS="--partition=x --time=4:00:00" goes to sbatch
#   otherwise         torchrun on this node (launch_torchrun.sh); on several nodes, call it on each
#
# With ENGINE_SERVERS=N vLLM servers draw the responses, of ENGINE_TENSOR_PARALLEL=N GPUs each; see node.sh:
#   ENGINE_NODES=N    on N more nodes, so many servers on each; with torchrun, call it there with ROLE=engine
#   otherwise         on the trainer's node, on the GPUs behind its own
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ $# -lt 3 ]; then
    sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
nodes=$1 stage=$2 config=$3
shift 3
gpus=${GPUS_PER_NODE:-8}

engine_gpus=$((${ENGINE_SERVERS:-0} * ${ENGINE_TENSOR_PARALLEL:-1})) # of one node
if [ $engine_gpus -gt 0 ] && [ "${ENGINE_NODES:-0}" = 0 ]; then
    if [ "$nodes" -gt 1 ]; then
        echo "launch.sh: a trainer on $nodes nodes needs servers on nodes of their own: set ENGINE_NODES" >&2
        exit 2
    fi
    behind=$(seq -s, "$gpus" $((gpus + engine_gpus - 1)))
    export ENGINE_GPUS=${ENGINE_GPUS:-$behind} ENGINE_HOST=${ENGINE_HOST:-127.0.0.1}
fi

if [ "${DRY_RUN:-0}" = 1 ]; then
    unset RANK
    if [ $engine_gpus -gt 0 ]; then set -- "$@" --engine-url http://SERVERS; fi
    WORLD_SIZE=$((nodes * gpus)) LOCAL_WORLD_SIZE=$gpus \
        exec python -m megatron_brain "$stage" --config "$config" "$@" --dry-run
fi
case "${LAUNCHER:-torchrun}" in
    torchrun) NNODES=$nodes GPUS_PER_NODE=$gpus exec bash examples/h100/launch_torchrun.sh "$stage" "$config" "$@" ;;
    slurm)
        read -r -a extra <<< "${SBATCH_ARGS:-}"
        name=$(basename "$config" .yaml)
        job=$((nodes + ${ENGINE_NODES:-0})) each=$gpus
        if [ "${ENGINE_NODES:-0}" = 0 ]; then
            each=$((gpus + engine_gpus))
        elif [ $engine_gpus -gt "$gpus" ]; then
            each=$engine_gpus
        fi
        exec sbatch --job-name="$name" --nodes=$job --ntasks-per-node="$gpus" --gpus-per-node="$each" \
            ${extra[@]+"${extra[@]}"} examples/h100/launch_slurm.sbatch "$stage" "$config" "$@"
        ;;
    *)
        echo "launch.sh: LAUNCHER=$LAUNCHER: must be torchrun or slurm" >&2
        exit 2
        ;;
esac
