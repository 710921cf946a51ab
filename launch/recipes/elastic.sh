#!/usr/bin/env bash
# Three replicas train one model; kill any of them, or the store, and watch the others go on (about 10 minutes on 2 cores).
#
#   launch/recipes/elastic.sh                      # in a terminal; Ctrl-C ends everything
#   kill -9 PID                                    # in another one: any of the processes that it lists
#   kill -STOP PID; sleep 20; kill -CONT PID       # a replica that stalls, and wakes up to find that it was dropped
#
# What died is started again after 3 seconds. The screen shows who died, who returned, and the time of a step; each replica
# has a log of its own in outputs/elastic/logs. More replicas, or other settings: launch/recipes/elastic.sh COUNT key=value …
set -euo pipefail
count=${1:-3}
shift || true
folder=outputs/elastic
port=${ELASTIC_PORT:-29400}
mkdir -p "$folder/logs"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Each child is a loop that starts its process again until that ends well. It leads a process group, so that Ctrl-C reaches all.
keep() { # NAME COMMAND…
    local name=$1
    shift
    setsid bash -c '
        name=$1; log=$2; shift 2
        until "$@" >>"$log" 2>&1 & child=$!; echo "$(date +%T)  $name is process $child"; wait "$child"; do
            echo "$(date +%T)  $name ended; starting it again in 3 s (its log: $log)"
            sleep 3
        done
        echo "$(date +%T)  $name is done"' keep "$name" "$folder/logs/$name" "$@" 2>/dev/null &
    children+=($!)
}
children=()
trap 'for child in "${children[@]}" ${watcher:-}; do kill -- "-$child" 2>/dev/null || true; done' EXIT

keep store python -m ncclx_py.elastic.store --file "$folder/membership.jsonl" --port "$port"
for ((id = 0; id < count; id++)); do
    keep "replica-$id" torchrun --standalone --nproc-per-node 1 -m distill.train experiment=elastic_replicas \
        engine.replicas.id="$id" engine.replicas.count="$count" engine.replicas.store="127.0.0.1:$port" "$@"
done

# What the store decides, and the pace: both tell the story better than any replica's log.
setsid tail -n 0 -q -F "$folder/logs/store" "$folder/logs/replica-0" 2>/dev/null &
watcher=$!
wait "${children[@]:1}"
echo "model: $folder/final   who took part in which step: $folder/membership.jsonl"
