#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Bandwidth and latency of the UCX transport beside ucx_perftest, in turns within one run, so that whatever else the
# machine does meets both. Median of REPEATS. Peer error handling (-e) is on in both.
#
#   kvtransfer/bench.sh [path of kvtransfer_bench]      needs ucx_perftest (Debian: ucx-utils)
#   UCX_TLS, UCX_NET_DEVICES as usual; REPEATS (5), SECONDS_EACH (1), PORT (13400)
#   MEMORY=cuda: a card's memory, with cuda_transport_bench and a ucx_perftest that knows CUDA in PATH
set -eu
bench=${1:-build/release/bin/kvtransfer_bench}
repeats=${REPEATS:-5} seconds=${SECONDS_EACH:-1} port=${PORT:-13400} memory=${MEMORY:-host}
command -v ucx_perftest >/dev/null || { echo "bench.sh: ucx_perftest not found: apt-get install ucx-utils" >&2; exit 1; }
[ -x "$bench" ] || { echo "bench.sh: $bench not found: give its path" >&2; exit 1; }

# perftest TEST BYTES ITERATIONS COLUMN: that column of the last line
perftest() {
  port=$((port + 1))
  ucx_perftest -p "$port" >/dev/null 2>&1 &
  server=$!
  sleep 0.3
  ucx_perftest 127.0.0.1 -p "$port" -t "$1" -e -m "$memory" -s "$2" -n "$3" -w 100 -O 4 -f 2>/dev/null | tail -1 | awk -v c="$4" '{print $c}'
  wait "$server" 2>/dev/null || true
}
median() { sort -n | awk '{v[NR]=$1} END {print (NR ? (NR % 2 ? v[(NR+1)/2] : (v[NR/2]+v[NR/2+1])/2) : "nan")}'; }

echo "# $(uname -n), $(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2 | sed 's/^ //'), $(nproc) cores, load $(cut -d' ' -f1 /proc/loadavg)"
echo "# commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(ucx_info -v | head -1 | cut -c3-), UCX_TLS=${UCX_TLS:-}, $memory memory, $(date -u +%F)"
echo "test,bytes,ours,ucx_perftest,ratio"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
for bytes in 8192 65536 262144 1048576 8388608 67108864; do
  : >"$tmp/ours"; : >"$tmp/theirs"
  iterations=$((3000000000 / (bytes + 20000))); [ "$iterations" -gt 50000 ] && iterations=50000
  for _ in $(seq "$repeats"); do
    "$bench" bandwidth "$bytes" "$seconds" >>"$tmp/ours"
    perftest ucp_am_bw "$bytes" "$iterations" 6 >>"$tmp/theirs"   # MB/s of 2^20, average
  done
  awk -v b="$bytes" -v o="$(median <"$tmp/ours")" -v t="$(median <"$tmp/theirs")" \
    'BEGIN {t = t * 1048576 / 1e9; printf "bandwidth_GB_s,%d,%.2f,%.2f,%.2f\n", b, o, t, o / t}'
done
for bytes in 8 1024 8192 65536 262144 1048576; do
  : >"$tmp/ours"; : >"$tmp/theirs"; : >"$tmp/wait"
  for _ in $(seq "$repeats"); do
    "$bench" wait "$bytes" "$seconds" >>"$tmp/wait"
    perftest ucp_am_lat "$bytes" 5000 4 >>"$tmp/theirs"           # us, average
    "$bench" latency "$bytes" "$seconds" >>"$tmp/ours"
  done
  for form in wait ours; do
    awk -v f="$form" -v b="$bytes" -v o="$(median <"$tmp/$form")" -v t="$(median <"$tmp/theirs")" \
      'BEGIN {printf "latency_us_%s,%d,%.2f,%.2f,%.2f\n", f == "wait" ? "waiting_thread_drives" : "transport_thread", b, o, t, o / t}'
  done
done
for bytes in 65536 1048576 8388608; do
  printf 'handoff_GB_s,%d,%s,,\n' "$bytes" "$("$bench" handoff "$bytes" "$seconds")"
  printf 'sealed_handoff_GB_s,%d,%s,,\n' "$bytes" "$("$bench" sealed-handoff "$bytes" "$seconds")"
done
for bytes in 1024 65536 1048576; do
  printf 'sealed_latency_us_waiting_thread_drives,%d,%s,,\n' "$bytes" "$("$bench" sealed-wait "$bytes" "$seconds")"
done
