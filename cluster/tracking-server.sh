#!/usr/bin/env bash
# An MLflow server for several people: PostgreSQL behind it, artifacts through it, a name and a password before it.
# `make tracking-server` starts it here; on a machine that all nodes reach, with `pip install 'mlflow[auth]' psycopg2-binary`:
#
#     export MLFLOW_TRACKING_USERNAME=NAME MLFLOW_TRACKING_PASSWORD=PASSWORD    # its administrator, from the first start on
#     HOST=0.0.0.0 MLFLOW_SERVER_ALLOWED_HOSTS=ADDRESS:5000 bash tracking-server.sh FOLDER
#
# FOLDER (~/.orchestrator/tracking) keeps runs, artifacts and users. MLFLOW_BACKEND_STORE_URI=postgresql://... takes a
# database that you have; without it one is made in FOLDER and runs as long as the server. MLFLOW_ARTIFACTS_DESTINATION
# takes a bucket in place of FOLDER/artifacts. People and jobs log in by the same two variables and MLFLOW_TRACKING_URI.
# Passwords stand in the environment and in files of this user alone.
set -euo pipefail
umask 077
folder=${1:-${ORCHESTRATOR_HOME:-$HOME/.orchestrator}/tracking}
host=${HOST:-127.0.0.1} port=${PORT:-5000}

fail() {   # fail WHAT DO
    printf 'error: %s\n  do:      %s\n' "$1" "$2" >&2
    exit 2
}
[ -n "${MLFLOW_TRACKING_USERNAME:-}" ] && [ -n "${MLFLOW_TRACKING_PASSWORD:-}" ] ||
    fail "the server has no administrator" "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
[ "${#MLFLOW_TRACKING_PASSWORD}" -ge 12 ] || fail "MLflow takes passwords of 12 characters and more" "choose a longer one"
python -c "import flask_wtf, psycopg2" 2>/dev/null ||
    fail "the server's packages are missing" "pip install 'mlflow[auth]' psycopg2-binary"

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
secret() {   # secret FILE: what it holds, made once
    [ -s "$1" ] || python -c 'import secrets; print(secrets.token_hex(32))' >"$1"
    cat "$1"
}

if [ -z "${MLFLOW_BACKEND_STORE_URI:-}" ]; then
    [ "$(id -u)" != 0 ] || fail "PostgreSQL does not run as root" "run this as another user, or set MLFLOW_BACKEND_STORE_URI"
    programs=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1)
    PATH=${programs:+$programs:}$PATH
    command -v initdb >/dev/null || fail "PostgreSQL is missing" "apt-get install postgresql, or set MLFLOW_BACKEND_STORE_URI"
    password=$(secret "$folder/postgres-password")
    [ -d "$folder/postgres" ] || LC_ALL=C initdb -D "$folder/postgres" -U mlflow -A scram-sha-256 -E UTF8 \
        --pwfile="$folder/postgres-password" >/dev/null
    database=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    pg_ctl -D "$folder/postgres" -w -l "$folder/postgres.log" -o "-h 127.0.0.1 -p $database -k ''" start >/dev/null
    trap 'pg_ctl -D "$folder/postgres" -w -m fast stop >/dev/null' EXIT
    MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2://mlflow:$password@127.0.0.1:$database/postgres
fi

# Everyone may read and write every experiment; who may not is MLflow's to be told (mlflow.server.get_app_client).
cat >"$folder/auth.ini" <<END
[mlflow]
default_permission = EDIT
database_uri = sqlite:///$folder/users.db
admin_username = $MLFLOW_TRACKING_USERNAME
admin_password = $MLFLOW_TRACKING_PASSWORD
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
END
export MLFLOW_BACKEND_STORE_URI MLFLOW_AUTH_CONFIG_PATH=$folder/auth.ini
MLFLOW_FLASK_SERVER_SECRET_KEY=$(secret "$folder/session-key")
export MLFLOW_FLASK_SERVER_SECRET_KEY
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false   # with it the server takes 25 s and 3 GB, without 6 s and 0.5 GB

echo "MLflow at http://$host:$port, kept in $folder; Ctrl-C ends it" >&2
# Not `exec`: what is behind it ends with it.
python -m mlflow server --app-name basic-auth --workers 1 --host "$host" --port "$port" \
    --artifacts-destination "${MLFLOW_ARTIFACTS_DESTINATION:-$folder/artifacts}" &
trap 'kill $! 2>/dev/null' INT TERM
wait $! || wait $! || true
