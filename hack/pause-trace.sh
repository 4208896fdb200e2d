#!/bin/bash
# A time line of the pause of one migration between two nodes of this machine:
# what the container noticed, what our programs and CRIU on both sides logged,
# and every program that was started (the kernel's process events).
#
#   hack/pause-trace.sh [MIB[@MIB_PER_S]]     256 idle; 1024@50 writes 50 MiB/s
#
# PROFILE=release traces a release build. Times of CRIU's logs are right by
# about 1 ms; a line of CRIU's is shown where the next came 1 ms later or more. The shim lets
# CRIU log little: raise LOG_LEVEL in shim/src to 4 to see where CRIU's time goes.
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${PROFILE:-debug}
flags=()
[ "$profile" = debug ] || flags=(--profile "$profile")
cargo build --quiet "${flags[@]}" --workspace --bins
exec "${CARGO_TARGET_DIR:-target}/$profile/bench-trace" "$@"
