#!/usr/bin/env bash
# Runs the tests; needs nothing set up.
#   bash tools/test.sh                  the default suite (CPU, no network, a few minutes on two cores)
#   bash tools/test.sh --slow           the slow tests instead
#   bash tools/test.sh tests/data -x    anything pytest takes
set -euo pipefail
export TORCHMASK_EXTRAS=dev
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [ "${1:-}" = "--slow" ]; then
    shift
    set -- -m slow "$@"
fi
exec "$PYTHON" -m pytest "$@"
