#!/usr/bin/env bash
# Reward model of Llama-3 8B on one node of 8 H100. Not tested on a GPU yet.
#
#   DRY_RUN=1 bash examples/h100/llama3_8b_reward.sh        checks everything on any machine
#   bash examples/h100/llama3_8b_reward.sh                  on the node
#   LAUNCHER=slurm bash examples/h100/llama3_8b_reward.sh   submits it to Slurm
#
# Starts from $RUNS/sft.
# Flags given here go to the run. docs/clusters.md has the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
runs=${RUNS:-runs/llama3_8b} data=${DATA:-data}
exec bash examples/h100/launch.sh 1 reward examples/h100/llama3_8b_reward.yaml \
    --load "$runs/sft" --finetune --save "$runs/reward" --auto-resume \
    --train-data "$data/pairs_train.jsonl" --valid-data "$data/pairs_valid.jsonl" "$@"
