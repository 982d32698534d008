#!/usr/bin/env bash
# Starts a run on NODES nodes of 8 GPUs (GPUS_PER_NODE=N for other numbers). Not tested on a GPU yet.
#
#   launch.sh NODES STAGE CONFIG [--flag value ...]
#
#   DRY_RUN=1         check everything for that many nodes on this machine, without a GPU, and print a report
#   LAUNCHER=slurm    submit a job (launch_slurm.sbatch); SBATCH_ARGS="--partition=x --time=4:00:00" goes to sbatch
#   otherwise         torchrun on this node (launch_torchrun.sh); on several nodes, call it on each
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ $# -lt 3 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
nodes=$1 stage=$2 config=$3
shift 3
gpus=${GPUS_PER_NODE:-8}

if [ "${DRY_RUN:-0}" = 1 ]; then
    unset RANK
    WORLD_SIZE=$((nodes * gpus)) LOCAL_WORLD_SIZE=$gpus \
        exec python -m megatron_brain "$stage" --config "$config" "$@" --dry-run
fi
case "${LAUNCHER:-torchrun}" in
    torchrun) NNODES=$nodes GPUS_PER_NODE=$gpus exec bash examples/h100/launch_torchrun.sh "$stage" "$config" "$@" ;;
    slurm)
        read -r -a extra <<< "${SBATCH_ARGS:-}"
        name=$(basename "$config" .yaml)
        exec sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" \
            ${extra[@]+"${extra[@]}"} examples/h100/launch_slurm.sbatch "$stage" "$config" "$@"
        ;;
    *)
        echo "launch.sh: LAUNCHER=$LAUNCHER: must be torchrun or slurm" >&2
        exit 2
        ;;
esac
