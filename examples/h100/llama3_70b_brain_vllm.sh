#!/usr/bin/env bash
# BRAIn of Llama-3 70B: 8 nodes of 8 H100 train, and 2 more draw the next round with vLLM. Not tested on a GPU yet.
#
#   DRY_RUN=1 bash examples/h100/llama3_70b_brain_vllm.sh        checks everything on any machine
#   MASTER_ADDR=... bash examples/h100/llama3_70b_brain_vllm.sh  on each of the 8 nodes
#   ROLE=engine bash examples/h100/llama3_70b_brain_vllm.sh      on each of the 2 nodes
#   LAUNCHER=slurm bash examples/h100/llama3_70b_brain_vllm.sh   submits one job of all 10 to Slurm
#
# As llama3_70b_brain.sh, with an export of the policy for the start of the servers, made once:
#   python tools/convert_megatron_to_hf.py --load runs/llama3_70b/sft --save runs/llama3_70b/sft_hf --untie
# VLLM_PYTHON=path names the Python of vLLM's environment. Flags given here go to the run. More in docs/clusters.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
runs=${RUNS:-runs/llama3_70b} data=${DATA:-data}
# A stop waits for the round that is being drawn and scored: twenty minutes' notice instead of five.
export SBATCH_ARGS="--signal=USR1@1200 ${SBATCH_ARGS:-}" PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-1180}
export ENGINE_NODES=2 ENGINE_SERVERS=2 ENGINE_TENSOR_PARALLEL=4 MAX_MODEL_LEN=${MAX_MODEL_LEN:-1536}
export ENGINE_MODEL=${ENGINE_MODEL:-$runs/sft_hf} ENGINE_DIR=${ENGINE_DIR:-$runs/engine}
exec bash examples/h100/launch.sh 8 brain examples/h100/llama3_70b_brain.yaml \
    --load "$runs/sft" --finetune --reward-load "$runs/reward" --save "$runs/brain" --auto-resume \
    --rollout-dir "$runs/rollouts" --train-data "$data/prompts.jsonl" \
    --engine vllm --engine-sync-dir "$runs/engine_sync" --engine-concurrency 584 --rounds-ahead 1 "$@"
