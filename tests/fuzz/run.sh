#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs every libFuzzer executable of the preset `fuzz`, one after the other.
#
#   tests/fuzz/run.sh [SECONDS of each target, default 60]
#
# Exit status: 0 nothing was found, 1 something was (its file is named), 2 usage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SECONDS_EACH="${1:-60}"
BIN=build/fuzz/bin
FOUND=build/fuzz/findings
KEPT=.cache/fuzz

[[ "$SECONDS_EACH" =~ ^[1-9][0-9]{0,5}$ ]] || { echo "usage: tests/fuzz/run.sh [SECONDS]" >&2; exit 2; }
mkdir -p "$FOUND" "$KEPT"
status=0
for target in $("$BIN/fuzz_replay_test" --seeds "$KEPT"); do
  folders=("$KEPT/$target")
  if [[ -d "tests/fuzz/corpus/$target" ]]; then folders+=("tests/fuzz/corpus/$target"); fi
  log="$FOUND/$target.log"
  if "$BIN/fuzz_$target" -max_total_time="$SECONDS_EACH" -timeout=5 -rss_limit_mb=2048 -max_len=65536 \
    -print_final_stats=1 -artifact_prefix="$FOUND/$target-" "${folders[@]}" > "$log" 2>&1; then
    echo "$target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") executions, nothing found"
  else
    status=1
    echo "$target: FOUND $(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1) (log: $log)"
  fi
done
exit "$status"
