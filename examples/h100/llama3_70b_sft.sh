#!/usr/bin/env bash
# SFT of Llama-3 70B on 8 nodes of 8 H100. Not tested on a GPU yet.
#
#   DRY_RUN=1 bash examples/h100/llama3_70b_sft.sh        checks everything on any machine
#   MASTER_ADDR=... bash examples/h100/llama3_70b_sft.sh  on each node
#   LAUNCHER=slurm bash examples/h100/llama3_70b_sft.sh   submits it to Slurm
#
# Starts from $RUNS/base, which this makes of Hugging Face's weights, once:
#   python tools/convert_hf_to_megatron.py --hf-model DIR --save runs/llama3_70b/base
# Flags given here go to the run. docs/clusters.md has the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
runs=${RUNS:-runs/llama3_70b} data=${DATA:-data}
exec bash examples/h100/launch.sh 8 sft examples/h100/llama3_70b_sft.yaml \
    --load "$runs/base" --finetune --save "$runs/sft" --auto-resume \
    --train-data "$data/sft_train.jsonl" --valid-data "$data/sft_valid.jsonl" "$@"
