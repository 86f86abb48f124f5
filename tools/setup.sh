#!/usr/bin/env bash
# Makes an environment that can run torchmask, once; sourced by the other scripts. Afterwards $PYTHON is its python.
#   - an active environment that already has torch (a GPU user's) is used as it is, and only what is missing is added;
#   - otherwise ./.venv is made.
# Nothing is installed again while pyproject.toml and constraints.txt stay as they were.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
wanted=${TORCHMASK_EXTRAS:-}   # "" for users, "dev" for the tests

has_torch() { "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; }
pip_install() { "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"; }

if [ ! -x .venv/bin/python ] && has_torch python3; then
    PYTHON=$(command -v python3)
    own_torch=1
else
    [ -x .venv/bin/python ] || { echo "setting up .venv (once; a few minutes)" >&2; python3 -m venv .venv; }
    PYTHON=$root/.venv/bin/python
    own_torch=
fi
export PYTHON

stamp=$("$PYTHON" -c 'import sys; print(sys.prefix)')/.torchmask-${wanted:-run}
now=$(cat pyproject.toml constraints.txt tools/setup.sh | cksum)$root
if [ "$(cat "$stamp" 2>/dev/null)" != "$now" ]; then
    if [ -n "$own_torch" ]; then   # keep the user's torch, whatever its version
        grep -vE '^(torch|torchao)==' constraints.txt > "${TMPDIR:-/tmp}/torchmask-constraints.$$"
        trap 'rm -f "${TMPDIR:-/tmp}/torchmask-constraints.$$"' EXIT
        pip_install -c "${TMPDIR:-/tmp}/torchmask-constraints.$$" -e ".${wanted:+[$wanted]}"
    else
        pip_install -c constraints.txt -e ".${wanted:+[$wanted]}"
    fi
    echo "$now" > "$stamp"
fi
