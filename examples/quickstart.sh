#!/usr/bin/env bash
# Runs everything once, on a CPU: data, base model, SFT -> reward -> BRAIn -> Hugging Face, evaluation, summary.
#
#   bash examples/quickstart.sh            SmolLM2-135M on Debian's package descriptions
#   bash examples/quickstart.sh --smoke    the same chain with a tiny random model
#
# Results are kept in work/quickstart (work/smoke). A second run continues where the first one stopped. WORK=DIR chooses
# another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

smoke=false
for argument in "$@"; do
    case "$argument" in
        --smoke) smoke=true ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "quickstart.sh: unknown argument $argument (there is only --smoke)" >&2; exit 2 ;;
    esac
done

source tools/environment.sh examples
if $smoke; then work=${WORK:-work/smoke}; else work=${WORK:-work/quickstart}; fi
mkdir -p "$work"
example=examples/debian_tldr
# Each process has one thread, as two processes share two cores. Huge pages help, as each step allocates large tensors.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false THP_MEM_ALLOC_ENABLE=1

# The smoke sizes train a random model for a few steps. They test the chain, not the answers.
if $smoke; then
    sft_records=64 pair_prompts=16 pair_packages=60 pairs=64 brain_prompts=16 test_prompts=32 judge=score_rouge
    sizes=(--global-batch-size 8 --micro-batch-size 2)
    brain_sizes=(--prompts-per-round 8 --samples-per-prompt 4 --max-new-tokens 12 --lr-warmup-iters 0)
else
    sft_records=720 pair_prompts=160 pair_packages=200 pairs=480 brain_prompts=256 test_prompts=300 judge=score
    sizes=() brain_sizes=()
fi

say() { printf '\n== %s (%ds)\n' "$1" "$SECONDS"; }
stage() { torchrun --standalone --nproc-per-node 2 -m megatron_brain "$@"; }
done_already() { [ -e "$1" ] && echo "already there: $1"; }
lines() { sed -n "$1,$2p" "$work/data/train.jsonl"; }

say "data"
python $example/fetch_data.py --out "$work/data" --max-prompt-words 60
first_pair=$((sft_records + 1)) last_pair=$((sft_records + pair_prompts))
lines 1 "$sft_records" > "$work/sft.jsonl"
lines $first_pair $last_pair > "$work/pair_prompts.jsonl"
lines $((last_pair + 1)) $((last_pair + pair_packages)) > "$work/pair_records.jsonl"
lines $((last_pair + pair_packages + 1)) $((last_pair + pair_packages + brain_prompts)) > "$work/brain_prompts.jsonl"

say "base model and judge"
if $smoke; then
    python $example/fetch_model.py --out "$work/base_hf" --smoke --tokenizer-data "$work/data/train.jsonl"
else
    python $example/fetch_model.py --out "$work/base_hf"
    python $example/fetch_judge.py --out "$work/judge"
    export TLDR_JUDGE_DIR="$work/judge"
fi

say "convert to Megatron"
done_already "$work/base/latest_checkpointed_iteration.txt" ||
    python tools/convert_hf_to_megatron.py --hf-model "$work/base_hf" --save "$work/base"

say "SFT: two pipeline stages"
done_already "$work/sft/latest_checkpointed_iteration.txt" ||
    stage sft --config $example/sft.yaml --load "$work/base" --finetune --save "$work/sft" \
        --train-data "$work/sft.jsonl" --valid-data "$work/data/valid.jsonl" --max-valid-records "$test_prompts" \
        --pipeline-model-parallel-size 2 --no-save-optim "${sizes[@]}"

say "preference pairs: corrupted references, and best against worst of four SFT samples"
done_already "$work/samples.jsonl" ||
    stage generate --config $example/evaluate.yaml --load "$work/sft" --temperature 1.0 --samples-per-prompt 4 \
        --prompts "$work/pair_prompts.jsonl" --output "$work/samples.jsonl"
done_already "$work/pairs/valid.jsonl" ||
    python $example/make_preferences.py --sft "$work/pair_records.jsonl" --samples "$work/samples.jsonl" \
        --judge $judge --valid-share 0.2 --out "$work/pairs"

say "reward model: two data-parallel replicas"
done_already "$work/reward/latest_checkpointed_iteration.txt" ||
    stage reward --config $example/reward.yaml --load "$work/sft" --finetune --save "$work/reward" \
        --train-data "$work/pairs/train.jsonl" --max-train-records $pairs \
        --valid-data "$work/pairs/valid.jsonl" --no-save-optim "${sizes[@]}"

say "BRAIn: two data-parallel replicas"
done_already "$work/brain/latest_checkpointed_iteration.txt" ||
    stage brain --config $example/brain.yaml --load "$work/sft" --finetune --reward-load "$work/reward" \
        --save "$work/brain" --rollout-dir "$work/rollouts" --train-data "$work/brain_prompts.jsonl" \
        --no-save-optim "${brain_sizes[@]}"

say "export to Hugging Face"
for model in brain reward; do
    done_already "$work/${model}_hf/config.json" ||
        python tools/convert_megatron_to_hf.py --load "$work/$model" --save "$work/${model}_hf"
done

say "evaluate on held-out prompts"
done_already "$work/evaluation.json" ||
    stage evaluate --config $example/evaluate.yaml --load "$work/brain" --prior-load "$work/sft" \
        --reward-load "$work/reward" --judge $example/judge.py:$judge \
        --prompts "$work/data/test.jsonl" --max-prompts $test_prompts --output "$work/evaluation.json"

say "summary"
python $example/summary.py --sft-metrics "$work/sft/metrics.jsonl" --reward-metrics "$work/reward/metrics.jsonl" \
    --brain-metrics "$work/brain/metrics.jsonl" --evaluation "$work/evaluation.json"
echo
echo "The policy is in $work/brain_hf, for transformers' AutoModelForCausalLM. Curves: tensorboard --logdir $work"
echo "Took $SECONDS s."
