#!/usr/bin/env bash
# SFT of Llama-3 8B on one node of 8 H100. Not tested on a GPU yet.
#
#   DRY_RUN=1 bash examples/h100/llama3_8b_sft.sh        checks everything on any machine
#   bash examples/h100/llama3_8b_sft.sh                  on the node
#   LAUNCHER=slurm bash examples/h100/llama3_8b_sft.sh   submits it to Slurm
#
# Starts from $RUNS/base, which this makes of Hugging Face's weights, once:
#   python tools/convert_hf_to_megatron.py --hf-model DIR --save runs/llama3_8b/base
# Flags given here go to the run. docs/clusters.md has the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
runs=${RUNS:-runs/llama3_8b} data=${DATA:-data}
exec bash examples/h100/launch.sh 1 sft examples/h100/llama3_8b_sft.yaml \
    --load "$runs/base" --finetune --save "$runs/sft" --auto-resume \
    --train-data "$data/sft_train.jsonl" --valid-data "$data/sft_valid.jsonl" "$@"
