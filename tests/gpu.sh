#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs every test that needs a card, in the source tree or in a bundle of deploy/bundle.sh, and says how many passed.
#
#   tests/gpu.sh                       all of them; ends with "N passed, M failed"
#   tests/gpu.sh --shard 2/3           the second third (each well below 8 minutes)
#   tests/gpu.sh --sanitize TOOL       the operations under compute-sanitizer: memcheck, racecheck or initcheck
#   tests/gpu.sh --filter PATTERN      only cases that match (GoogleTest pattern)
#   tests/gpu.sh --csv FILE            one line a case: suite,case,result,ms (default: gpu_tests.csv)
#
# A skipped case counts as failed: on a machine without a card nothing here means anything. Exit status 0: all passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SUITES=(ops_cuda_test golden_test equality_test remote_experts_test long_context_test)
CLUSTERS=(cluster-cuda cluster-cuda-pool)
SUITE_SECONDS="${SUITE_SECONDS:-420}"

main() {
  local csv=gpu_tests.csv shard=1/1 filter='Cuda*' tool='' suite cluster status=0
  while (($#)); do
    case "$1" in
      --shard) shard="$2"; shift ;;
      --sanitize) tool="$2"; shift ;;
      --filter) filter="$2"; shift ;;
      --csv) csv="$2"; shift ;;
      *) sed -n '5,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
    esac
    shift
  done
  local bin=bin
  [[ -d $bin ]] || bin=build/cuda/bin
  find_libraries
  export GTEST_TOTAL_SHARDS="${shard#*/}" GTEST_SHARD_INDEX=$((${shard%/*} - 1))

  echo "suite,case,result,ms" > "$csv"
  [[ -z $tool ]] || SUITES=(ops_cuda_test)
  for suite in "${SUITES[@]}"; do
    run_suite "$bin/$suite" "$filter" "$tool" "$csv" || status=1
  done
  if [[ -n $tool ]]; then
    sanitize_engine "$bin/millrace" "$tool" "$csv"
  elif ((GTEST_SHARD_INDEX == 0)) && [[ $filter == 'Cuda*' ]]; then
    for cluster in "${CLUSTERS[@]}"; do cluster_answers "$bin/millrace" "$cluster" "$csv"; done
  fi
  summary "$csv" "$status"
}

# A bundle brings its libraries; a source tree may have UCX's CUDA build (deploy/setup.sh --cuda). What needs that runs
# where it is.
find_libraries() {
  if [[ -d lib ]]; then
    export LD_LIBRARY_PATH="$PWD/lib"
    if [[ -d lib/ucx ]]; then export UCX_MODULE_DIR="$PWD/lib/ucx"; fi
  elif [[ -d .cache/cuda/ucx/lib ]]; then
    export LD_LIBRARY_PATH="$PWD/.cache/cuda/ucx/lib" UCX_MODULE_DIR="$PWD/.cache/cuda/ucx/lib/ucx"
  fi
  if [[ -e ${UCX_MODULE_DIR:-}/libuct_cuda.so.0 ]]; then
    SUITES+=(cuda_transport_test)
    CLUSTERS+=(cluster-cuda-direct)
  else
    echo "tests/gpu.sh: this UCX knows no CUDA: no suite of direct transfers"
  fi
}

# Output goes to the terminal as it comes; the case lines are also the record.
run_suite() {
  local binary="$1" filter="$2" tool="$3" csv="$4" command=() log status=0
  log="$(mktemp)"
  if [[ -n $tool ]]; then
    command=("$(sanitizer)" --tool "$tool" --error-exitcode 99 --print-limit 20)
    # Racecheck slows kernels by orders of magnitude: shapes that sweep far are left out.
    if [[ $tool == racecheck ]]; then
      filter='CudaModelOps.*:CudaQuantise.*:CudaTensorLinear.Groups*:CudaPackedExperts.Packing*:CudaSampler.Broken*-*AMillionTokens'
    fi
  fi
  timeout "$SUITE_SECONDS" "${command[@]}" "$binary" --gtest_filter="$filter" --gtest_brief=0 2>&1 | tee "$log" || status=1
  sed -nE 's/^\[ +(OK|FAILED|SKIPPED) +\] ([^ ,]+)(, .*)? \(([0-9]+) ms\)$/\2,\1,\4/p' "$log" |
    while IFS=, read -r name result ms; do echo "$(basename "$binary"),$name,$result,$ms"; done >> "$csv"
  # A crash or a time limit ends a case without a line of its own.
  local started
  started="$(grep -c '^\[ RUN' "$log" || true)"
  local ended
  ended="$(grep -cE "^$(basename "$binary")," "$csv" || true)"
  if ((started > ended)); then
    echo "$(basename "$binary"),$(sed -nE 's/^\[ RUN +\] //p' "$log" | tail -n 1),CRASHED,0" >> "$csv"
  fi
  rm -f "$log"
  return "$status"
}

# The product itself: prefill and decode workers, each with the card, hand over cache through the transport. Their answer
# must be that of one process, wherever experts are: in the workers, or some in a decode worker and the rest with members
# that take turns on the same card; or cache that UCX moves by itself.
cluster_answers() {
  local millrace="$1" cluster_config="$2" csv="$3" number=0 prompt alone cluster result up log waited=0
  log="$(mktemp)"
  timeout 120 "$millrace" up --config "deploy/demo/$cluster_config.json" > "$log" 2>&1 &
  up=$!
  until grep -q '^Ready' "$log" || ((++waited > 300)); do sleep 0.1; done
  for prompt in "Compute 34 + 29." "Spell the word river." "Introduce yourself."; do
    number=$((number + 1))
    alone="$(timeout 60 "$millrace" run deploy/demo/model --device cuda --greedy --quiet --prompt "$prompt" || true)"
    cluster="$(timeout 60 "$millrace" chat --temperature 0 --message "$prompt" || true)"
    result=FAILED
    if [[ -n $alone && $cluster == *"$alone"* ]]; then result=OK; fi
    echo "$cluster_config: $prompt -> $cluster: $result"
    [[ $result == OK ]] || echo "alone: $alone"
    echo "$cluster_config,AnswersAsOneProcess/$number,$result,0" >> "$csv"
  done
  kill -INT "$up"
  wait "$up" || true
  grep -q '^Stopped' "$log" || cat "$log"
  rm -f "$log"
}

# A short answer under the sanitizer: every launch of prefill, of a step and of a replayed step.
sanitize_engine() {
  local millrace="$1" tool="$2" csv="$3" result=FAILED
  if timeout "$SUITE_SECONDS" "$(sanitizer)" --tool "$tool" --error-exitcode 99 --print-limit 20 \
    "$millrace" run deploy/demo/model --device cuda --quiet --greedy --max-tokens 5 --prompt "Hello."; then
    result=OK
  fi
  echo "millrace,RunUnder/$tool,$result,0" >> "$csv"
}

sanitizer() {
  local path
  for path in "$(command -v compute-sanitizer || true)" /usr/local/cuda/bin/compute-sanitizer; do
    if [[ -x $path ]]; then echo "$path"; return; fi
  done
  echo "tests/gpu.sh: compute-sanitizer not found (part of the CUDA toolkit)" >&2
  exit 2
}

summary() {
  local csv="$1" status="$2" passed failed
  passed="$(grep -c ',OK,' "$csv" || true)"
  failed="$(tail -n +2 "$csv" | grep -vc ',OK,' || true)"
  tail -n +2 "$csv" | grep -v ',OK,' | sed 's/^/  not passed: /' || true
  # A sanitizer finds faults in cases that pass, and a suite that did not start has no cases.
  if ((status && failed == 0)); then failed=1; fi
  echo "$passed passed, $failed failed"
  ((passed > 0 && failed == 0))
}

main "$@"
