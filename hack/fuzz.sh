#!/bin/bash
# Every fuzz target for SECONDS_EACH seconds, one after another on one core;
# `make fuzz SECONDS=N`. TARGETS="rootfs tar" takes only these. Ends with one
# line of JSON, and with an error if anything was found.
set -euo pipefail
cd "$(dirname "$0")/.."

each=${SECONDS_EACH:-60}
toolchain=${FUZZ_TOOLCHAIN:-nightly}
if ! cargo "+$toolchain" fuzz --version >/dev/null 2>&1; then
    echo "cargo-fuzz is missing, or the toolchain $toolchain; getting cargo-fuzz" >&2
    if ! cargo install cargo-fuzz --locked; then
        echo "what is needed: rustup toolchain install nightly; cargo install cargo-fuzz" >&2
        exit 1
    fi
fi

# What is found along the way is kept from run to run, outside of git.
corpus=fuzz/corpus
mapfile -t all < <(cargo run --quiet --package transship-hostile --example seeds -- "$corpus")
read -ra targets <<<"${TARGETS:-${all[*]}}"

# The same versions as everything else; what is missing there is added.
cp Cargo.lock fuzz/Cargo.lock

# The code behind these doors is safe Rust: what an address sanitizer finds it
# cannot have, and without one a run has three times as many tries.
cargo "+$toolchain" fuzz build --sanitizer none >&2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
runs=0
crashes=0
for target in "${targets[@]}"; do
    mkdir -p "fuzz/regressions/$target"
    log=$work/log
    # Doors behind which files are made do so in memory if there is any.
    if ! TMPDIR=$([ -d /dev/shm ] && echo /dev/shm || echo /tmp) \
        cargo "+$toolchain" fuzz run --sanitizer none "$target" \
        "$corpus/$target" "fuzz/regressions/$target" -- \
        -max_total_time="$each" -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 \
        >"$log" 2>&1; then
        crashes=$((crashes + 1))
        grep -E 'panicked|ERROR|SUMMARY|Test unit written' -A1 "$log" >&2 || tail -20 "$log" >&2
    fi
    here=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | tail -1)
    echo "$target: ${here:-0} runs" >&2
    runs=$((runs + ${here:-0}))
    rmdir --ignore-fail-on-non-empty "fuzz/regressions/$target"
done
echo "{\"targets\":${#targets[@]},\"runs\":$runs,\"crashes\":$crashes}"
[ "$crashes" = 0 ]
