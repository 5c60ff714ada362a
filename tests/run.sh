#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets up, builds and tests Millrace: what a developer runs before a commit and what CI runs after it.
#
#   tests/run.sh             packages, preset release, every test but `slow` and `gpu` (tests/gpu.sh); ends with ctest's
#                            summary and what was skipped. Where there is Go it first builds a Kubernetes control plane
#                            for the chart, once (6 minutes on two cores)
#   tests/run.sh --slow      also the tests labelled `slow`
#   tests/run.sh --asan      the unit tests under AddressSanitizer and UBSan (preset asan)
#   tests/run.sh --tsan      the unit tests under ThreadSanitizer (preset tsan)
#   tests/run.sh --fuzz [S]  every fuzz target for S seconds (60) with libFuzzer (tests/fuzz/README.md)
#   tests/run.sh --soak [M]  a cluster under load, deaths and drains for M minutes (10); nothing may be left over
#   tests/run.sh --lint      clang-format and shellcheck over the tree, clang-tidy over what differs from HEAD~1
#   tests/run.sh -R REGEX    only the tests whose names match
#
# Exit status: 0 all passed, 1 something failed (its name is on the last lines), 2 it could not be built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

JOBS="${JOBS:-$(nproc)}"

main() {
  local preset=release labels=() filter=() mode=test slow=slow seconds=60 minutes=10
  while (($#)); do
    case "$1" in
      --slow) slow="" ;;
      --asan) preset=asan; labels=(-L unit) ;;
      --tsan) preset=tsan; labels=(-L unit) ;;
      --lint) mode=lint ;;
      --soak) mode=soak; if [[ "${2:-}" =~ ^[0-9]+$ ]]; then minutes="$2"; shift; fi ;;
      --fuzz) mode=fuzz; if [[ "${2:-}" =~ ^[0-9]+$ ]]; then seconds="$2"; shift; fi ;;
      -R) [[ $# -ge 2 ]] || usage; filter=(-R "$2"); shift ;;
      *) usage ;;
    esac
    shift
  done
  if [[ $mode == lint ]]; then
    deploy/setup.sh --lint
    lint
    return
  fi
  if [[ $mode == fuzz ]]; then
    deploy/setup.sh --fuzz || exit 2
    build fuzz
    tests/fuzz/run.sh "$seconds"
    return
  fi
  deploy/setup.sh || exit 2
  # Other people's clients: without them the rest is worth running, and their suites say that they were skipped.
  [[ $preset != release ]] || deploy/setup.sh --clients || true
  build "$preset"
  if [[ $mode == soak ]]; then
    exec /usr/bin/python3 -B tests/cluster/soak.py "$minutes"
  fi
  if [[ $preset == release ]]; then
    local tools
    for tools in chart kubernetes dashboards images prometheus collector; do chart_tools "$tools"; done
    # What needs a card is tests/gpu.sh's.
    labels=(-LE "gpu${slow:+|$slow}")
  fi
  run_tests "$preset" "${labels[@]}" "${filter[@]}"
}

usage() {
  sed -n '5,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

build() {
  local log
  cmake --preset "$1" > /dev/null || { cmake --preset "$1"; exit 2; }
  # Ninja's own progress on a terminal; quiet in a log, where only a failure is worth reading.
  if [[ -t 1 ]]; then
    cmake --build --preset "$1" -j "$JOBS" || exit 2
  else
    log="$(mktemp)"
    cmake --build --preset "$1" -j "$JOBS" > "$log" 2>&1 || { tail -n 60 "$log"; exit 2; }
    rm -f "$log"
  fi
}

# Helm and its like are built from Go modules, where there is Go; what needs them is skipped elsewhere, in so many words.
chart_tools() {
  timeout 1800 tests/helm/tools.sh "$1" ||
    echo "run: tests of the chart that need more are SKIPPED: the line above says why" >&2
}

# Tests that start whole clusters or measure time carry RUN_SERIAL; the rest share the cores.
run_tests() {
  local preset="$1" log status=0
  shift
  log="$(mktemp)"
  ctest --test-dir "build/$preset" --output-on-failure --no-tests=error -j "$JOBS" "$@" > "$log" 2>&1 || status=1
  if ((status)); then
    grep -vE '^ *[0-9]+/[0-9]+ Test .* Passed ' "$log" | grep -vE '^ +Start +[0-9]+:' | tail -n 400
  else
    sed -n '/tests passed/,$p' "$log"
  fi
  say_skipped "build/$preset/Testing/Temporary/LastTest.log"
  rm -f "$log"
  return "$status"
}

# Why something was skipped is on its own line, and ctest keeps that to itself.
say_skipped() {
  grep -h '^SKIPPED' "$1" || true
}

lint() {
  local sources changed
  mapfile -t sources < <(git ls-files '*.h' '*.cc' '*.cu')
  clang-format-16 --dry-run --Werror "${sources[@]}"
  git ls-files '*.sh' .ci/run | xargs shellcheck
  [[ -f build/release/compile_commands.json ]] || cmake --preset release > /dev/null
  mapfile -t changed < <(git diff --name-only --diff-filter=d HEAD~1 -- '*.cc')
  if ((${#changed[@]})); then clang-tidy-16 --quiet -p build/release "${changed[@]}"; fi
  echo "lint: clean"
}

# tests/helm/skips_test.py calls single functions.
if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then main "$@"; fi
