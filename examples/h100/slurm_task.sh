#!/usr/bin/env bash
# Runs one rank under srun: slurm_task.sh STAGE CONFIG [--flag value ...]. Not tested under Slurm or on a GPU yet.
#
# The run exits with 0 both when it is done and when it has saved because it was asked to stop. This script turns the
# second status into 75 (EX_TEMPFAIL), so that launch_slurm.sbatch knows that more is to do. It does the same where the
# signal itself ended a run that was asked to stop before it began. srun returns the highest status of the ranks.
set -uo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS

stage=$1 config=$2
shift 2
asked=false run=
# Slurm may signal only this shell. If the run gets the signal twice, nothing changes.
# shellcheck disable=SC2329 # The traps call it.
pass_on() {
    asked=true
    if [ -n "$run" ]; then kill -s "$1" "$run" 2> /dev/null; fi
}
# The traps come before the run: a signal that arrives just after its start must not end this shell.
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
python -m megatron_brain "$stage" --config "$config" "$@" &
run=$!
if $asked; then kill -s TERM "$run" 2> /dev/null; fi

# A trapped signal ends `wait` early, so this waits again.
status=128
while [ "$status" -ge 128 ] && kill -0 "$run" 2> /dev/null; do
    wait "$run"
    status=$?
done
wait "$run"
status=$?
if $asked; then
    case $status in
        0 | $((128 + $(kill -l USR1))) | $((128 + $(kill -l TERM)))) exit 75 ;;
    esac
fi
exit "$status"
