#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Puts one client of the client tests under .cache/clients, at the version and hashes that the files beside this one
# name, from its registry (PyPI, npm, the Go module proxy). Nothing of the machine is changed.
#
#   tests/clients/install.sh python|node|grpcurl|browser
#
# Safe to run again: a client that is there already costs nothing. Exit status: 0 it is there; 77 it cannot be had, with
# one line that starts with SKIPPED and says why: ctest counts it as skipped, tests/run.sh repeats the line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

CACHE="$(cd ../.. && pwd)/.cache/clients"
NODE_AT_LEAST=18  # of Debian 12; the SDK asks for 20 and what the tests use of it runs on 18
GO_AT_LEAST=19    # 1.19, of Debian 12

main() {
  mkdir -p "$CACHE"
  case "${1:-}" in
    python) once python requirements.txt install_python ;;
    node) once node package-lock.json install_node ;;
    grpcurl) once grpcurl go.sum install_grpcurl ;;
    browser) once browser browser/package-lock.json install_browser ;;
    *) sed -n '3,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
  esac
}

skip() {
  echo "SKIPPED: $*"
  exit 77
}

# once NAME LOCK INSTALL: runs INSTALL unless .cache/clients/NAME was made from this very LOCK.
once() {
  local stamp="$CACHE/$1.stamp" log="$CACHE/$1.log"
  if [[ -f "$stamp" ]] && cmp -s "$stamp" "$2"; then return; fi
  rm -rf "${CACHE:?}/$1" "$stamp"
  "$3" "$log"
  cp "$2" "$stamp"
}

install_python() {
  local python=/usr/bin/python3  # Debian's, whatever else is first on the path
  [[ -x "$python" ]] || skip "python: no $python (apt-get install python3)"
  "$python" -m venv "$CACHE/python" > "$1" 2>&1 || skip "python: no venv (apt-get install python3-venv): $(last "$1")"
  timeout 300 "$CACHE/python/bin/pip" install --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
    -r requirements.txt > "$1" 2>&1 || skip "python: pip could not install requirements.txt: $(last "$1")"
}

install_node() { install_npm node . "$1"; }

# Debian's Chromium; npm brings what drives it and downloads no browser.
install_browser() {
  command -v chromium > /dev/null || skip "browser: no chromium (apt-get install chromium)"
  install_npm browser browser "$1"
}

# install_npm NAME FOLDER LOG: what FOLDER's package-lock.json names, into .cache/clients/NAME.
install_npm() {
  local major
  command -v node > /dev/null || skip "$1: node is not installed (apt-get install nodejs)"
  command -v npm > /dev/null || skip "$1: npm is not installed (apt-get install npm)"
  major="$(node --version)"; major="${major#v}"; major="${major%%.*}"
  ((major >= NODE_AT_LEAST)) || skip "$1: found node $(node --version), needs v$NODE_AT_LEAST or newer"
  mkdir -p "$CACHE/$1"
  cp "$2/package.json" "$2/package-lock.json" "$CACHE/$1/"
  (cd "$CACHE/$1" && timeout 300 npm ci --ignore-scripts --no-audit --no-fund) > "$3" 2>&1 ||
    skip "$1: npm could not install $2/package-lock.json: $(last "$3")"
}

install_grpcurl() {
  local minor
  command -v go > /dev/null || skip "grpcurl: Go is not installed (apt-get install golang-go)"
  minor="$(go env GOVERSION)"; minor="${minor#go1.}"; minor="${minor%%[!0-9]*}"
  ((minor >= GO_AT_LEAST)) || skip "grpcurl: found $(go env GOVERSION), needs go1.$GO_AT_LEAST or newer"
  # The build cache stays beside the program: nothing is written to the home directory.
  GOFLAGS=-mod=readonly GOTOOLCHAIN=local GOMODCACHE="$CACHE/go/mod" GOCACHE="$CACHE/go/build" \
    timeout 600 nice -n 10 go build -trimpath -modcacherw -o "$CACHE/grpcurl" \
    github.com/fullstorydev/grpcurl/cmd/grpcurl > "$1" 2>&1 || skip "grpcurl: Go could not build it: $(last "$1")"
  rm -rf "$CACHE/go"  # a gigabyte that nothing needs any more
}

# The line of a log that says most: the first that speaks of an error, else the last.
last() { grep -m 1 -iE '^(npm )?err(or)?\b' "$1" || tail -n 1 "$1"; }

main "$@"
