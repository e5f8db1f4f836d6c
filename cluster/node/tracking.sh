#!/usr/bin/env bash
# Starts an MLflow server on the head, where the cluster file asks for one (MLFLOW_TRACKING_URI=head), once Ray runs:
#   bash tracking.sh
# It logs to ~/orchestrator-tracking.log, is ready when this returns, and ends when Ray does. Ends with 1, and says why,
# when it does not start.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/env.sh"
[ -n "${TRACKING_SERVER:-}" ] || exit 0
answers() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }   # answers ADDRESS PORT
! answers "$HEAD_IP" 5000 || exit 0   # it runs on, through another `ray up`

log=~/orchestrator-tracking.log
[ -n "${MLFLOW_TRACKING_USERNAME:-}" ] || {
    echo "MLFLOW_TRACKING_URI=head needs a name and a password: write \`export MLFLOW_TRACKING_USERNAME=...\` and" \
        "\`export MLFLOW_TRACKING_PASSWORD=...\` into ~/orchestrator.secrets, and mount it (file_mounts)" >&2
    exit 1
}
# With a bucket, artifacts outlive the head; runs do with a database elsewhere (MLFLOW_BACKEND_STORE_URI).
[ -z "${STORAGE:-}" ] || export MLFLOW_ARTIFACTS_DESTINATION=${MLFLOW_ARTIFACTS_DESTINATION:-$STORAGE/mlflow}
export HOST=${HOST:-0.0.0.0} MLFLOW_SERVER_ALLOWED_HOSTS=$HEAD_IP:5000,localhost:5000
serve() {
    bash "$1/tracking-server.sh" & server=$!
    while answers "$HEAD_IP" 6379 && kill -0 $server 2>/dev/null; do sleep 2; done
    kill $server 2>/dev/null
    wait $server
}
export -f serve answers
export HEAD_IP
# A session of its own, or it would end with the connection that started it.
setsid nohup bash -c 'serve "$1"' orchestrator-tracking "$HERE" >"$log" 2>&1 </dev/null &
for _ in $(seq 120); do
    ! answers "$HEAD_IP" 5000 || exit 0
    kill -0 $! 2>/dev/null || break
    sleep 1
done
cat "$log" >&2
exit 1
