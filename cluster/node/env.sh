# What every process on a node inherits: Ray, the jobs that it starts, and each shell (setup.sh has ~/.bashrc and the
# login shell's profile read it, because Ray's launcher runs plain `ray stop` in a login shell). POSIX sh.
. ~/orchestrator.names   # from the cluster file: what only the user knows
# Your own exports, such as an MLflow server's user and password: a file of yours, mounted, never in the cluster file.
[ ! -f ~/orchestrator.secrets ] || . ~/orchestrator.secrets
[ ! -f ~/orchestrator.head ] || . ~/orchestrator.head   # HEAD_IP, from the cluster file's start commands

case ":$PATH:" in
    *":$VENV/bin:"*) ;;
    *) export PATH="$VENV/bin:$PATH" ;;
esac

# Without a token anyone who reaches the dashboard's port can run code here.
export RAY_AUTH_MODE=token
# `ray job stop` kills 3 s after its first signal unless told otherwise; a run needs longer to write a checkpoint.
export RAY_JOB_STOP_WAIT_TIME_S=120
# After a cut link the rest trained on within 18 s so, 75 s with Ray's defaults (measured, Ray 2.60.0).
export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=2000 RAY_health_check_failure_threshold=3
# `ray down` stops the head alone. A worker that has lost its head for so long ends by itself; Ray waits 60 s.
export RAY_gcs_rpc_server_reconnect_timeout_s=15
# Ray would run workers at niceness 15, where anything else on the node starves them.
export RAY_worker_niceness=0
# DeepSpeed's operators are compiled once per node, not once per job.
export TORCH_EXTENSIONS_DIR="$HOME/.cache/torch_extensions"

# Runs, prepared data and the default MLflow store, where all nodes see them. Without SHARED they stay on each node's
# disk, and a run that outlives its node names a bucket: `checkpoint.storage=s3://BUCKET/runs`.
[ -z "${SHARED:-}" ] || export ORCHESTRATOR_HOME="$SHARED/orchestrator"
# A server on the head (tracking.sh), or the one that was named.
[ "${MLFLOW_TRACKING_URI:-}" != head ] || TRACKING_SERVER=yes MLFLOW_TRACKING_URI=

if [ -n "${HEAD_IP:-}" ]; then
    HEAD_IP=$(getent ahostsv4 "$HEAD_IP" | awk '{print $1; exit}')   # it may be a name
    # This node's address and interface on the way to the head. Ray may fall back to 127.0.0.1, and Gloo and NCCL may
    # pick an interface that leads nowhere.
    NODE_IP=$(ip -4 route get "$HEAD_IP" | sed -n 's/.* src \([0-9.]*\).*/\1/p')
    GLOO_SOCKET_IFNAME=$(ip -4 -o addr show to "$NODE_IP" | awk '{print $2; exit}')
    NCCL_SOCKET_IFNAME=$GLOO_SOCKET_IFNAME
    # Drivers and tools find this cluster, whatever else runs on the node.
    RAY_ADDRESS=$HEAD_IP:6379
    export NODE_IP GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME RAY_ADDRESS
    [ -z "${TRACKING_SERVER:-}" ] || MLFLOW_TRACKING_URI=http://$HEAD_IP:5000
fi
[ -z "${MLFLOW_TRACKING_URI:-}" ] || export MLFLOW_TRACKING_URI
