#!/usr/bin/env bash
# One rank under srun: slurm_task.sh STAGE CONFIG [--flag value ...]. Not run under Slurm, nor on a GPU.
#
# The run ends with 0 both when it is done and when it has saved because it was asked to stop. Here the second becomes 75
# (EX_TEMPFAIL), so that launch_slurm.sbatch knows that there is more to do. Of the ranks' statuses srun gives the highest.
set -uo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS

stage=$1 config=$2
shift 2
asked=false
# Slurm may signal this shell alone; that the run gets the signal twice changes nothing.
# shellcheck disable=SC2329 # the traps call it
pass_on() {
    asked=true
    kill -s "$1" "$run" 2> /dev/null
}
python -m megatron_brain "$stage" --config "$config" "$@" &
run=$!
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

# A trapped signal ends `wait` early.
status=128
while [ "$status" -ge 128 ] && kill -0 "$run" 2> /dev/null; do
    wait "$run"
    status=$?
done
wait "$run"
status=$?
if $asked && [ "$status" = 0 ]; then
    exit 75
fi
exit "$status"
