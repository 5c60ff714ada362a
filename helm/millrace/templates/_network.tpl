{{/*
SPDX-License-Identifier: Apache-2.0
Who may call whom: the table from which every NetworkPolicy is made, and nothing else is.

Membership goes from workers to the router, control from the router to prefill and decode workers, blocks from prefill to
decode workers, rows from both to the pool. `data` is the port range of the block transport (network.dataPorts): answers
return on the caller's connection, so nobody opens one to a prefill worker but the router. RDMA passes policies by; the
fabric's own partitions are what separates tenants there. The kubelet's probes come from the node, which policies do not
stop.
*/}}
{{- define "millrace.calls" -}}
- {from: clients, to: router, ports: [http, grpc]}
- {from: tests, to: router, ports: [http]}
- {from: operators, to: router, ports: [operator]}
- {from: operators, to: prefill, ports: [operator]}
- {from: operators, to: decode, ports: [operator]}
- {from: operators, to: expert, ports: [operator]}
- {from: prefill, to: router, ports: [control]}
- {from: decode, to: router, ports: [control]}
- {from: expert, to: router, ports: [control]}
- {from: router, to: prefill, ports: [grpc]}
- {from: router, to: decode, ports: [grpc]}
- {from: prefill, to: decode, ports: [grpc, data]}
- {from: prefill, to: expert, ports: [grpc, data]}
- {from: decode, to: expert, ports: [grpc, data]}
{{- end -}}

{{/* Roles that run: without a pool no rule names it. */}}
{{- define "millrace.roles" -}}
{{- $roles := list "router" "prefill" "decode" -}}
{{- if int .Values.expert.replicas -}}{{- $roles = append $roles "expert" -}}{{- end -}}
{{- toJson $roles -}}
{{- end -}}

{{/* The ports of one row. dict "root" $ "to" role "ports" list */}}
{{- define "millrace.rulePorts" -}}
{{- $root := .root -}}
{{- $to := .to -}}
{{- range .ports }}
{{- if eq . "data" }}
- {protocol: TCP, port: {{ int $root.Values.network.dataPorts.first }}, endPort: {{ int $root.Values.network.dataPorts.last }}}
{{- else }}
- {protocol: TCP, port: {{ int (index (index $root.Values $to).ports .) }}}
{{- end }}
{{- end }}
{{- end -}}

{{/* The peers of one end of a row; "" is everybody. dict "root" $ "end" name */}}
{{- define "millrace.rulePeers" -}}
{{- if eq .end "clients" -}}
{{- with .root.Values.networkPolicy.clients }}{{ toYaml . }}{{ end -}}
{{- else if eq .end "operators" -}}
{{- toYaml .root.Values.networkPolicy.operators -}}
{{- else -}}
- podSelector:
    matchLabels: {{- include "millrace.roleSelector" (dict "root" .root "component" .end) | nindent 6 }}
{{- end -}}
{{- end -}}
