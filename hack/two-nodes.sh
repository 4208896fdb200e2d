#!/bin/bash
# Two nodes on this machine, for people: up, down, status, enter NODE [COMMAND…].
# The nodes are those of the integration tests (integration/src).
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${PROFILE:-debug}
bin=${CARGO_TARGET_DIR:-target}/$profile
if [ "${1:-}" = up ] || [ ! -x "$bin/two-nodes" ]; then
    flags=()
    [ "$profile" = debug ] || flags=(--profile "$profile")
    cargo build --quiet "${flags[@]}" --bins
fi
exec "$bin/two-nodes" "$@"
