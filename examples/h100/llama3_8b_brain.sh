#!/usr/bin/env bash
# BRAIn of Llama-3 8B on one node of 8 H100. Not tested on a GPU yet.
#
#   DRY_RUN=1 bash examples/h100/llama3_8b_brain.sh        checks everything on any machine
#   bash examples/h100/llama3_8b_brain.sh                  on the node
#   LAUNCHER=slurm bash examples/h100/llama3_8b_brain.sh   submits it to Slurm
#
# Starts from $RUNS/sft, which is also the prior, and scores with $RUNS/reward. Export of the result:
#   python tools/convert_megatron_to_hf.py --load runs/llama3_8b/brain --save export/llama3_8b
# Flags given here go to the run. docs/clusters.md has the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
runs=${RUNS:-runs/llama3_8b} data=${DATA:-data}
# A stop waits for the round that is being sampled and scored: twenty minutes' notice instead of five.
export SBATCH_ARGS="--signal=USR1@1200 ${SBATCH_ARGS:-}" PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-1180}
exec bash examples/h100/launch.sh 1 brain examples/h100/llama3_8b_brain.yaml \
    --load "$runs/sft" --finetune --reward-load "$runs/reward" --save "$runs/brain" --auto-resume \
    --rollout-dir "$runs/rollouts" --train-data "$data/prompts.jsonl" "$@"
