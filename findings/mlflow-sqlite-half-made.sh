#!/usr/bin/env bash
# MLflow's SQLite store, cut short while its tables are made, can never be opened again.
#
# Seen with mlflow 3.17.2, alembic 1.20.1, SQLAlchemy 2.1.9 and SQLite on Python 3.11, 28 November 2026.
# The first client of a new sqlite:/// store runs all migrations, 3 to 5 s. SQLite commits each statement of a
# migration by itself, so a disk that fills up on the way (here: a limit on file sizes) leaves some of its tables. With
# room again every later client starts that migration anew and fails on what is there already; MLflow 3.17.2 says
#     OperationalError (sqlite3.OperationalError) table spans already exists
# (which table depends on where it stopped). Only deleting the file helps, so make a store beside its place and rename
# it. Exits 0 while this is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip --quiet --disable-pip-version-check install -q mlflow==3.17.2 alembic==1.20.1 SQLAlchemy==2.1.9

cat > open_store.py <<'PY'
import resource, sys
from mlflow import MlflowClient

if len(sys.argv) > 1:
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    MlflowClient(tracking_uri="sqlite:///mlflow.db").search_experiments()
    print("opened")
except Exception as error:
    print(type(error).__name__, str(error).splitlines()[0])
PY
export MLFLOW_LOGGING_LEVEL=CRITICAL MLFLOW_DISABLE_TELEMETRY=true
first=$(venv/bin/python open_store.py 300000 2>/dev/null)
second=$(venv/bin/python open_store.py 2>/dev/null)
rm mlflow.db
third=$(venv/bin/python open_store.py 2>/dev/null)
printf 'without room:    %s\nwith room again: %s\nmade anew:       %s\n' "$first" "$second" "$third"
case $first in *"disk"*) ;; *) echo "changed: the limit did not stop the migration"; exit 1 ;; esac
case $second in *"already exists"*) ;; *) echo "changed: the half-made store opens"; exit 1 ;; esac
test "$third" = opened
