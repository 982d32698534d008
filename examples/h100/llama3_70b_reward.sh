#!/usr/bin/env bash
# Reward model of Llama-3 70B on 8 nodes of 8 H100. Not tested on a GPU yet.
#
#   DRY_RUN=1 bash examples/h100/llama3_70b_reward.sh        checks everything on any machine
#   MASTER_ADDR=... bash examples/h100/llama3_70b_reward.sh  on each node
#   LAUNCHER=slurm bash examples/h100/llama3_70b_reward.sh   submits it to Slurm
#
# Starts from $RUNS/sft.
# Flags given here go to the run. docs/clusters.md has the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
runs=${RUNS:-runs/llama3_70b} data=${DATA:-data}
exec bash examples/h100/launch.sh 8 reward examples/h100/llama3_70b_reward.yaml \
    --load "$runs/sft" --finetune --save "$runs/reward" --auto-resume \
    --train-data "$data/pairs_train.jsonl" --valid-data "$data/pairs_valid.jsonl" "$@"
