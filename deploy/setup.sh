#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what building and testing Millrace needs on Debian 12: packages by apt and, with --cuda, a CUDA 13.0 compiler
# and UCX's CUDA build from pinned PyPI wheels under .cache/cuda.
#
# Safe to run again: what is there already is left alone, and when nothing is missing neither apt nor the network is
# touched. Runs as root or through sudo. On failure it prints one line that says what to do and exits non-zero.
#
#   deploy/setup.sh          build and test packages
#   deploy/setup.sh --clients  the above, and what the client tests fetch their clients with: nodejs, npm, golang-go,
#                            python3-venv; and chromium (350 MB), for the status page; a node, npm, go or chromium that
#                            is on the path already is not installed again
#   deploy/setup.sh --fuzz   the above build packages and clang-16 with its sanitizers
#   deploy/setup.sh --lint   the above, clang-format-16, clang-tidy-16 and shellcheck
#   deploy/setup.sh --cuda   the above build packages and the CUDA toolchain (about 420 MB on disk)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BUILD_PACKAGES=(cmake ninja-build ccache g++ pkg-config git
  libgrpc++-dev protobuf-compiler protobuf-compiler-grpc libprotobuf-dev libabsl-dev
  libucx-dev ucx-utils libboost1.81-dev nlohmann-json3-dev libsimdjson-dev libpcre2-dev prometheus-cpp-dev
  libspdlog-dev libxxhash-dev libssl-dev libhwy-dev curl ca-certificates)
TEST_PACKAGES=(libgtest-dev libgmock-dev libbenchmark-dev python3 python3-yaml yamllint nftables iproute2 openssl)
# By the command that each brings: nodejs of another origin comes with its own npm, which Debian's package conflicts with.
declare -A CLIENT_COMMANDS=([node]=nodejs [npm]=npm [go]=golang-go [chromium]=chromium)
LINT_PACKAGES=(clang-format-16 clang-tidy-16 shellcheck)
FUZZ_PACKAGES=(clang-16 libclang-rt-16-dev)
CUDA_PACKAGES=(python3 python3-pip)

# The set that is known to work together: nvcc needs the crt and nvvm of its own release.
CUDA_WHEELS=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85 libucx-cu13==1.22.0)

main() {
  local packages=("${BUILD_PACKAGES[@]}" "${TEST_PACKAGES[@]}") with_cuda=0 argument
  for argument in "$@"; do
    case "$argument" in
      --clients) packages+=(python3-venv); add_clients ;;
      --fuzz) packages+=("${FUZZ_PACKAGES[@]}") ;;
      --lint) packages+=("${LINT_PACKAGES[@]}") ;;
      --cuda) with_cuda=1; packages+=("${CUDA_PACKAGES[@]}") ;;
      -h | --help) sed -n '3,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
      *) fail "unknown option $argument; try --help" ;;
    esac
  done
  install_packages "${packages[@]}"
  if ((with_cuda)); then install_cuda; fi
}

# Adds to main's list of packages.
add_clients() {
  local tool
  for tool in "${!CLIENT_COMMANDS[@]}"; do
    command -v "$tool" > /dev/null || packages+=("${CLIENT_COMMANDS[$tool]}")
  done
}

fail() {
  echo "setup: $*" >&2
  exit 1
}

install_packages() {
  if ! command -v dpkg-query > /dev/null || ! command -v apt-get > /dev/null; then
    fail "this is not a Debian system; install the equivalents of: $*"
  fi
  local missing=() package
  for package in "$@"; do
    [[ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2> /dev/null)" == installed ]] || missing+=("$package")
  done
  if ((${#missing[@]} == 0)); then return; fi

  local as_root=()
  if ((EUID != 0)); then
    command -v sudo > /dev/null || fail "needs root to install ${missing[*]}; run it as root or install sudo"
    as_root=(sudo)
  fi
  echo "setup: installing ${#missing[@]} packages: ${missing[*]}"
  local log
  log="$(mktemp)"
  # One retry after `update`: package lists of a fresh machine are empty, those of an old one point at gone versions.
  # Waiting for the lock bounds a race with unattended upgrades.
  local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -y -q -o DPkg::Lock::Timeout=120
    --no-install-recommends)
  if ! "${apt[@]}" update > "$log" 2>&1; then
    echo "setup: apt-get update failed, going on with the lists at hand: $(last_error "$log")" >&2
  fi
  "${apt[@]}" install "${missing[@]}" > "$log" 2>&1 ||
    fail "apt-get install failed: $(last_error "$log") (whole output: $log)"
  rm -f "$log"
}

last_error() { grep -E '^(E|Err|W):?' "$1" | tail -n 1 || tail -n 1 "$1"; }

# Lays out .cache/cuda/toolkit (bin, include, lib, nvvm) and .cache/cuda/ucx (lib, bin, include).
install_cuda() {
  local root=.cache/cuda stamp
  stamp="$root/wheels.txt"
  if [[ -f "$stamp" && "$(cat "$stamp")" == "${CUDA_WHEELS[*]}" ]]; then return; fi
  echo "setup: fetching ${CUDA_WHEELS[*]} from PyPI"
  rm -rf "$root"
  mkdir -p "$root"
  local log
  log="$(mktemp)"
  # --target keeps them out of every Python environment; only the files inside matter to us.
  /usr/bin/python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --target "$root/wheels" "${CUDA_WHEELS[@]}" > "$log" 2>&1 ||
    fail "could not fetch the CUDA wheels: $(tail -n 1 "$log") (is PyPI reachable? whole output: $log)"
  rm -f "$log"
  ln -sfn wheels/nvidia/cu13 "$root/toolkit"
  ln -sfn wheels/libucx "$root/ucx"
  chmod +x "$root"/toolkit/bin/* "$root"/toolkit/nvvm/bin/* 2> /dev/null || true
  "$root/toolkit/bin/nvcc" --version > /dev/null ||
    fail "nvcc does not run after unpacking; remove $root and try again"
  # The wheels name versioned libraries only; linkers look for the plain name.
  local library
  for library in "$root"/toolkit/lib/lib*.so.*; do
    [[ -e "${library%%.so.*}.so" ]] || ln -s "$(basename "$library")" "${library%%.so.*}.so"
  done
  echo "${CUDA_WHEELS[*]}" > "$stamp"
  echo "setup: CUDA compiler in $root/toolkit, UCX with CUDA in $root/ucx"
}

main "$@"
