#!/usr/bin/env bash
# Starts Ray on a worker and stays until its head is gone: bash worker.sh OPTIONS OF ray start
#
# `ray down` stops the head alone. A worker's raylet then ends by itself, and leaves its agents and its log monitor, so
# what started them waits for that and stops the rest. Returns once Ray runs; ends with 1, and says why, when it does
# not.
set -euo pipefail
own=~/orchestrator-worker-$(uname -n)   # the home folder may be shared
log=$own.log pid=$own.pid

# One of an earlier start would take this one for what its own Ray has left.
old=$(cat "$pid" 2>/dev/null || true)
if [ -n "$old" ] && grep -qs "orchestrator-worker" "/proc/$old/cmdline"; then
    kill -- "-$old" 2>/dev/null || true
fi

rm -f "$log"
stay() {
    ray start --block "$@" || true
    ray stop --grace-period 5
}
export -f stay
# A session of its own, or it would end with the connection that started it.
setsid nohup bash -c 'stay "$@"' orchestrator-worker "$@" >"$log" 2>&1 </dev/null &
echo $! >"$pid"
for _ in $(seq 120); do
    ! grep -qs "Ray runtime started" "$log" || exit 0
    kill -0 "$(cat "$pid")" 2>/dev/null || break
    sleep 1
done
cat "$log" >&2
exit 1
