#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a fresh Debian 12 checkout to an answer: installs what is missing, builds, and starts the demo cluster.
#
# The cluster is a router, a prefill worker, a decode worker and two expert workers, each its own process on this
# machine's CPU, serving the demo checkpoint in deploy/demo/model over HTTP on 127.0.0.1:8080. Ctrl-C drains it.
#
#   deploy/quickstart.sh                     start, ask one question, stay up until Ctrl-C
#   deploy/quickstart.sh --once              start, ask one question, drain; the exit status tells whether it worked
#   deploy/quickstart.sh --once "Hi there"   the same with your own question
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

QUESTION="Introduce yourself."

main() {
  local arguments=(--ask "$QUESTION")
  case "${1:-}" in
    "") ;;
    --once) arguments=(--once "${2:-$QUESTION}") ;;
    *) sed -n '8,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 64 ;;
  esac
  deploy/setup.sh
  build
  exec build/release/bin/millrace up --config deploy/demo/cluster.json "${arguments[@]}"
}

# One line that moves on a terminal, a line per tenth in a log; the compiler's words only when it fails.
build() {
  local log status=0
  log="$(mktemp)"
  echo "quickstart: building build/release/bin/millrace (a few minutes the first time, seconds after)"
  if ! cmake --preset release > "$log" 2>&1; then
    tail -n 30 "$log" >&2
    echo "quickstart: configuring failed; the lines above say why" >&2
    exit 1
  fi
  NINJA_STATUS="[%f/%t %es] " cmake --build --preset release --target millrace -j "$(nproc)" 2>&1 |
    tee "$log" | show_progress || status=$?
  if ((status)); then
    tail -n 40 "$log" >&2
    echo "quickstart: the build failed; the lines above say why" >&2
    exit 1
  fi
  rm -f "$log"
}

show_progress() {
  local line done_count total tenth last_tenth=-1
  while IFS= read -r line; do
    [[ "$line" =~ ^\[([0-9]+)/([0-9]+)\ ([0-9.]+)s\]\ (.*) ]] || continue
    done_count=${BASH_REMATCH[1]} total=${BASH_REMATCH[2]}
    if [[ -t 1 ]]; then
      printf '\r\033[K[%3d%%] %d of %d, %.0f s: %.60s' $((100 * done_count / total)) "$done_count" "$total" \
        "${BASH_REMATCH[3]}" "${BASH_REMATCH[4]##*/}"
    else
      tenth=$((10 * done_count / total))
      if ((tenth > last_tenth)); then
        last_tenth=$tenth
        echo "quickstart: built $done_count of $total files"
      fi
    fi
  done
  if [[ -t 1 ]]; then printf '\r\033[K'; fi
}

main "$@"
