#!/usr/bin/env bash
# A .gitignore that allows what it names (`/*`, then `!/src`) makes Ray upload nothing at all: Ray matches the folder
# itself too, as `.`, which `/*` takes and nothing gives back. Git keeps src, and so would a reader of the file.
#
# Seen with ray[default] 2.60.0 on Python 3.11, 29 November 2026.
# A folder with src/code.py, notes.txt and that .gitignore, as `ray job submit --working-dir` of a job that lists its files.
# Seen:
#     git keeps: src/code.py
#     the job has: nothing
#     with a line `!/.` besides, the job has: ./src/code.py
# Ray says "Ignoring upload to cluster for these files" and names the ignore file alone; the job starts in an empty folder.
# Exits 0 while this is so.
set -euo pipefail
folder=$(mktemp -d /tmp/ignore-XXXXXX)
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

mkdir -p work/src
echo "print(1)" >work/src/code.py
echo "not for the job" >work/notes.txt
printf '/*\n!/src\n' >work/.gitignore
git init -q work
echo "git keeps: $(git -C work ls-files --others --exclude-standard)" | tee seen.txt
in_the_job() {
    venv/bin/ray job submit --working-dir work -- sh -c 'echo FILES: $(find . -name "*.py" -o -name "*.txt")' 2>&1 |
        sed -n 's/^FILES: *//p'
}
files=$(in_the_job)
echo "the job has: ${files:-nothing}" | tee -a seen.txt
printf '!/.\n' >>work/.gitignore
files=$(in_the_job)
echo "with a line \`!/.\` besides, the job has: ${files:-nothing}" | tee -a seen.txt
diff seen.txt - <<'END'
git keeps: src/code.py
the job has: nothing
with a line `!/.` besides, the job has: ./src/code.py
END
