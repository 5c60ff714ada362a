#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Certificates for a cluster that has no other issuer: a CA, one certificate per role, and one for the public ports.
#
#   deploy/certificates.sh DIR [--trust-domain NAME] [--days N] [--public-names "DNS:api.example,IP:192.0.2.1"]
#
# Writes DIR/ca.pem, DIR/{router,prefill,decode,expert,operator,public}.{pem,key} and DIR/ca.key; keys are mode 0600. A
# CA that is there is kept and used again, so that running it again renews the certificates below it: each file is
# replaced whole, and running processes take the new ones. Keep ca.key away from the cluster.
set -euo pipefail
umask 077

main() {
  local dir="" trust_domain=cluster.local days=365 names="DNS:localhost,IP:127.0.0.1"
  while (($#)); do
    case "$1" in
      --trust-domain) trust_domain="$2"; shift ;;
      --days) days="$2"; shift ;;
      --public-names) names="$2"; shift ;;
      -h | --help) sed -n '3,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
      -*) fail "unknown option $1; try --help" ;;
      *) dir="$1" ;;
    esac
    shift
  done
  [[ -n "$dir" ]] || fail "where to? certificates.sh DIR"
  mkdir -p "$dir"
  work=$(mktemp -d "$dir/.new.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  [[ -e "$dir/ca.key" ]] || make_ca "$dir"
  local role
  for role in router prefill decode expert operator; do
    make_certificate "$dir" "$role" "$days" "URI:spiffe://$trust_domain/millrace/$role,DNS:millrace" clientAuth,serverAuth
  done
  make_certificate "$dir" public "$days" "$names" serverAuth
}

make_ca() {
  new_key "$work/ca.key"
  openssl req -x509 -new -key "$work/ca.key" -days 3650 -subj "/O=millrace/CN=millrace CA" -out "$work/ca.pem" \
    -addext basicConstraints=critical,CA:true,pathlen:0 -addext keyUsage=critical,keyCertSign,cRLSign
  mv "$work/ca.key" "$work/ca.pem" "$1"
}

# DIR NAME DAYS SUBJECT_ALT_NAME EXTENDED_USAGE
make_certificate() {
  new_key "$work/$2.key"
  printf 'subjectAltName=%s\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=%s\nbasicConstraints=CA:false\n' \
    "$4" "$5" > "$work/extensions"
  openssl req -new -key "$work/$2.key" -subj "/O=millrace/CN=millrace $2" -out "$work/request"
  openssl x509 -req -in "$work/request" -CA "$1/ca.pem" -CAkey "$1/ca.key" -CAcreateserial -CAserial "$work/serial" \
    -days "$3" -extfile "$work/extensions" -out "$work/$2.pem" 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
  mv "$work/$2.key" "$work/$2.pem" "$1"
}

new_key() {
  openssl ecparam -name prime256v1 -genkey -noout -out "$1"
}

fail() {
  echo "certificates: $*" >&2
  exit 1
}

main "$@"
