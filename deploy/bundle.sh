#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Packs what is needed to run Millrace and its GPU tests on a machine that has a card and nothing of ours: the binaries
# of preset cuda, the shared libraries they load (all but glibc), the demo model and its goldens.
#
#   deploy/bundle.sh                   build/millrace-gpu.tar.xz, below 30 MB
#   deploy/bundle.sh --no-data         without model and goldens, for use inside a checkout
#   deploy/bundle.sh --ucx DIR         with the UCX of DIR, such as .cache/cuda/ucx, which moves memory of a card by itself
#   deploy/bundle.sh --out FILE
#
# There: tar xf millrace-gpu.tar.xz && millrace-gpu/tests/gpu.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BINARIES=(millrace cuda_transport_test cuda_transport_bench kvtransfer_bench ops_cuda_test golden_test equality_test remote_experts_test long_context_test cuda_engine_bench tensor_linear_cuda_bench
  packed_experts_cuda_bench hyper_connection_cuda_bench indexer_cuda_bench sparse_attention_cuda_bench)
STAGE="$(mktemp -d)"
trap 'rm -rf "$STAGE"' EXIT

main() {
  local out=build/millrace-gpu.tar.xz data=1 ucx=''
  while (($#)); do
    case "$1" in
      --no-data) data=0 ;;
      --out) out="$2"; shift ;;
      --ucx) ucx="$2"; shift ;;
      *) sed -n '6,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
    esac
    shift
  done
  local root="$STAGE/millrace-gpu" binary
  mkdir -p "$root/bin" "$root/lib" "$root/tests"
  for binary in "${BINARIES[@]}"; do
    [[ -x build/cuda/bin/$binary ]] ||
      { echo "bundle: build/cuda/bin/$binary is missing; cmake --preset cuda && cmake --build --preset cuda" >&2; exit 1; }
    strip -o "$root/bin/$binary" "build/cuda/bin/$binary"
  done
  copy_libraries "$root" "$ucx"
  cp tests/gpu.sh "$root/tests/"
  if ((data)); then
    mkdir -p "$root/deploy/demo" "$root/tests/data"
    cp -r deploy/demo/model deploy/demo/cluster*.json "$root/deploy/demo/"
    cp -r tests/data/demo "$root/tests/data/"
  fi
  tar -C "$STAGE" -cf - millrace-gpu | xz -T0 -6 > "$out"
  echo "bundle: $out, $(du -h "$out" | cut -f1)"
}

# glibc's own parts must be the machine's: they go with its kernel and its loader. UCX opens its transports by name.
copy_libraries() {
  local root="$1" ucx="$2" path modules=/usr/lib/x86_64-linux-gnu/ucx
  if [[ -n $ucx ]]; then
    modules="$ucx/lib/ucx"
    export LD_LIBRARY_PATH="$ucx/lib"
    cp "$ucx/bin/ucx_perftest" "$root/bin/"
  fi
  ldd "${BINARIES[@]/#/build/cuda/bin/}" | awk '/=> \//{print $3}' | sort -u |
    grep -vE '/(libc|libm|libdl|librt|libpthread|libresolv|ld-linux[^/]*)\.so' |
    while read -r path; do strip -o "$root/lib/$(basename "$path")" "$path"; done
  if [[ -d $modules ]]; then
    mkdir -p "$root/lib/ucx"
    for path in "$modules"/lib*.so.0; do strip -o "$root/lib/ucx/$(basename "$path")" "$path"; done
  fi
}

main "$@"
