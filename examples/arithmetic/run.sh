#!/usr/bin/env bash
# A small model learns to add from a rule alone, on a CPU, in a few minutes: it is shown numbers as answers, but no right
# ones, and BRAIn rewards what the rule finds right.
#
#   bash examples/arithmetic/run.sh            seed 0; SEED=1 bash examples/arithmetic/run.sh is another model and split
#   bash examples/arithmetic/run.sh --smoke    the same chain with a few steps
#
# Results are kept in work/arithmetic_SEED (work/arithmetic_smoke). A second run continues where the first one stopped.
# WORK=DIR chooses another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

seed=${SEED:-0} work=work/arithmetic_${SEED:-0}
sft_sizes=() brain_sizes=() asked=(train test)
case "${1:-}" in
    "") ;;
    --smoke)
        work=work/arithmetic_smoke
        asked=(test) sft_sizes=(--train-epochs 0.3) brain_sizes=(--train-iters 4 --refresh-interval 2 --lr-warmup-iters 1)
        ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "run.sh: unknown argument $1 (there is only --smoke)" >&2; exit 2 ;;
esac

work=${WORK:-$work}
source tools/environment.sh examples
example=examples/arithmetic
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
stage() { python -m megatron_brain "$@" --seed "$seed"; }
done_already() { [ -e "$1" ] && echo "already there: $1"; }

python $example/make_problems.py --out "$work/data" --seed "$seed"
done_already "$work/tokenizer" ||
    python tools/train_tokenizer.py --input "$work/data/sft.jsonl" --vocab-size 272 --save "$work/tokenizer"
done_already "$work/sft/latest_checkpointed_iteration.txt" ||
    stage sft --config $example/sft.yaml --tokenizer-model "$work/tokenizer" --train-data "$work/data/sft.jsonl" \
        --save "$work/sft" "${sft_sizes[@]}"
done_already "$work/brain/latest_checkpointed_iteration.txt" ||
    stage brain --config $example/brain.yaml --load "$work/sft" --finetune --reward-function $example/rule.py:right \
        --train-data "$work/data/train.jsonl" --rollout-dir "$work/rollouts" --save "$work/brain" "${brain_sizes[@]}"

for problems in "${asked[@]}"; do
    stage evaluate --config $example/evaluate.yaml --load "$work/brain" --prior-load "$work/sft" \
        --reward-function $example/rule.py:right --prompts "$work/data/$problems.jsonl" --output "$work/$problems.json"
done
echo
echo "Share of right answers (baseline: the SFT model, which guesses) to the problems of the rule, and to held-out ones:"
python - "$work" "${asked[@]}" <<'EOF'
import json, sys
for problems in sys.argv[2:]:
    metrics = json.load(open(f"{sys.argv[1]}/{problems}.json"))["metrics"]
    shares = {name: metrics[f"reward/{name}"]["value"] for name in ("baseline", "policy")}
    print(f"  {problems:5}  baseline {shares['baseline']:.2f}  policy {shares['policy']:.2f}")
EOF
