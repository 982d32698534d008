#!/usr/bin/env bash
# Runs a trainer beside vLLM servers: beside.sh [ENGINE_COMMAND ...] -- COMMAND ...
#
# Starts ENGINE_COMMAND, if there is one, waits until the servers of ENGINE_NODES nodes (at least one) answer, runs
# COMMAND with --engine-url, and ends the servers when it ends. If servers end first, it stops COMMAND with STOP_SIGNAL
# (TERM), so that the run saves, and its own status is 1. The launchers call it. Not tested on a GPU yet.
set -uo pipefail
: "${ENGINE_DIR:?a folder that all nodes see}"
mkdir -p "$ENGINE_DIR"
nodes=$((${ENGINE_NODES:-0} > 0 ? ENGINE_NODES : 1))
there() { find "$ENGINE_DIR" -maxdepth 1 -name 'url-*' ! -name '*.new' | sort; }

engine=()
while [ "$1" != -- ]; do
    engine+=("$1")
    shift
done
shift
servers=
if [ ${#engine[@]} -gt 0 ]; then
    rm -f "$ENGINE_DIR"/url-* # of a run that was killed
    "${engine[@]}" &
    servers=$!
fi
engine_runs() { [ -z "$servers" ] || kill -0 "$servers" 2> /dev/null; }

# shellcheck disable=SC2329 # The trap calls it.
end() {
    touch "$ENGINE_DIR/over" # node.sh looks for it.
    while [ -n "$servers" ] && engine_runs; do
        touch "$ENGINE_DIR/over"
        sleep 0.2
    done
}
trap end EXIT
trap 'exit 143' TERM INT HUP USR1 # While the servers start, there is nothing to save.

deadline=$((SECONDS + ${START_SECONDS:-900} + 60))
until [ "$(there | wc -l)" -ge "$nodes" ]; do
    if [ $SECONDS -ge $deadline ] || ! engine_runs; then
        echo "beside.sh: $(there | wc -l) of $nodes nodes with servers answer; see $ENGINE_DIR/logs-*" >&2
        exit 1
    fi
    sleep 0.5
done
mapfile -t files < <(there)
urls=$(cat "${files[@]}" | paste -sd,)
echo "servers: $urls"

"$@" --engine-url "$urls" &
run=$!
for signal in TERM INT HUP USR1; do
    # shellcheck disable=SC2064 # The signal is to be named now.
    trap "kill -s $signal $run 2> /dev/null" $signal
done
lost=false
while kill -0 $run 2> /dev/null; do
    for file in "${files[@]}"; do
        if ! $lost && [ ! -e "$file" ]; then
            echo "beside.sh: the servers of ${file##*/url-} have ended; stopping the run" >&2
            lost=true
            kill -s "${STOP_SIGNAL:-TERM}" $run 2> /dev/null
        fi
    done
    sleep 0.5
done
wait $run
status=$?
if $lost; then exit 1; fi
exit $status
