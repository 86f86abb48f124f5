#!/usr/bin/env bash
# Fine-tunes the embedded tiny model on questions about short texts and shows what it learned; needs nothing set up.
#   bash tools/demo.sh [overrides]      e.g.  bash tools/demo.sh epochs=1 optimizer.lr=1e-3
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
output=${TORCHMASK_DEMO_OUTPUT:-outputs/demo}
rm -rf "$output"
exec "$PYTHON" -m torchmask run finetune --config tiny/qa output_dir="$output" "$@"
