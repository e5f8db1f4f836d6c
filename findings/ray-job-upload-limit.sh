#!/usr/bin/env bash
# A job's working directory of 110 MiB is refused, where Ray's own limit for one is 500 MiB: the dashboard that takes the
# package has a limit of its own, 100 MiB a request, and Ray's client does not look at it before it packs and sends.
#
# Seen with ray[default] 2.60.0 on Python 3.11, 29 November 2026.
# `ray job submit --working-dir` of a folder with a file of random bytes, to a head on this machine. Seen:
#     90 MiB: succeeded
#     110 MiB: status code 413, "Maximum request body size 104857600 exceeded"
# Exits 0 while this is so.
set -euo pipefail
folder=$(mktemp -d /tmp/upload-XXXXXX)
head=
trap '[ -z "$head" ] || { kill "$head"; wait "$head" || true; } 2>/dev/null; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip --quiet --disable-pip-version-check install -q "ray[default]==2.60.0"

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
dashboard=$(free_port)
export RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
venv/bin/ray start --head --block --num-cpus=1 --node-ip-address=127.0.0.1 --port="$(free_port)" \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --temp-dir="$folder/ray" \
    --dashboard-agent-listen-port="$(free_port)" --dashboard-agent-grpc-port="$(free_port)" \
    --metrics-export-port="$(free_port)" --ray-client-server-port="$(free_port)" >head.log 2>&1 &
head=$!
for _ in $(seq 60); do venv/bin/ray job list >/dev/null 2>&1 && break; sleep 1; done

mkdir small large
head -c $((90 * 1024 * 1024)) /dev/urandom >small/data
head -c $((110 * 1024 * 1024)) /dev/urandom >large/data
venv/bin/ray job submit --working-dir small -- ls -l data 2>&1 | tee small.txt | grep -q "succeeded"
echo "90 MiB: succeeded"
! venv/bin/ray job submit --working-dir large -- ls -l data >large.txt 2>&1
grep -o "status code 413" large.txt | head -1
grep -o "Maximum request body size 104857600 exceeded" large.txt | head -1
