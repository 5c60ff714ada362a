{{/*
SPDX-License-Identifier: Apache-2.0
The one JSON document that every process reads, in the ConfigMap as the binary validates it (docs/configuration.md).

The values give `model`, `transfer`, `timers`, `metrics`, `tracing` and each role's `config` in the document's own spelling; here the addresses
and one entry per pod are added. An entry has the name of its pod, so that a pod finds itself by --name and is the same
worker after a restart.
*/}}

{{/* Keys that are set: 0 and "" mean the default, and what is absent cannot be misread. */}}
{{- define "millrace.present" -}}
{{- $kept := dict -}}
{{- range $key, $value := . -}}{{- if $value -}}{{- $_ := set $kept $key $value -}}{{- end -}}{{- end -}}
{{- toJson $kept -}}
{{- end -}}

{{/* Names of a role's pods, as a JSON list. dict "root" $ "role" name */}}
{{- define "millrace.podNames" -}}
{{- $names := list -}}
{{- $base := printf "%s-%s" (include "millrace.fullname" .root) .role -}}
{{- $count := include "millrace.maxReplicas" (index .root.Values .role) | int -}}
{{- if and (eq .role "expert") .root.Values.expert.leaderWorkerSet.enabled -}}
{{- $size := include "millrace.groupSize" .root | int -}}
{{- range $i := until $count -}}
{{- $group := div $i $size -}}
{{- $member := mod $i $size -}}
{{- $names = append $names (ternary (printf "%s-%d" $base $group) (printf "%s-%d-%d" $base $group $member) (eq $member 0)) -}}
{{- end -}}
{{- else -}}
{{- range $i := until $count -}}{{- $names = append $names (printf "%s-%d" $base $i) -}}{{- end -}}
{{- end -}}
{{- toJson $names -}}
{{- end -}}

{{/* Which experts pod i of the pool holds; "" leaves it to the binary: an even share by position.
dict "root" $ "index" i */}}
{{- define "millrace.expertShare" -}}
{{- $expert := .root.Values.expert -}}
{{- $size := include "millrace.groupSize" .root | int -}}
{{- $count := int .root.Values.modelFacts.routedExperts -}}
{{- if $expert.shares -}}
{{- index $expert.shares .index -}}
{{- else if lt $size (int $expert.replicas) -}}
{{- $member := mod .index $size -}}
{{- printf "%d-%d" (div (mul $member $count) $size) (sub (div (mul (add1 $member) $count) $size) 1) -}}
{{- end -}}
{{- end -}}

{{/* One role's list of entries, as JSON. dict "root" $ "role" name */}}
{{- define "millrace.entries" -}}
{{- $root := .root -}}
{{- $role := .role -}}
{{- $values := index $root.Values $role -}}
{{- $domain := printf "%s-%s.%s.svc.%s" (include "millrace.fullname" $root) $role $root.Release.Namespace $root.Values.clusterDomain -}}
{{- $entries := list -}}
{{- range $i, $name := include "millrace.podNames" . | fromJsonArray -}}
{{- $entry := deepCopy $values.config -}}
{{- $worker := deepCopy (default dict $entry.worker) -}}
{{- $_ := set $worker "name" $name -}}
{{- $_ := set $worker "listen" (printf "0.0.0.0:%d" (int $values.ports.grpc)) -}}
{{- $_ := set $worker "operator_listen" (printf "0.0.0.0:%d" (int $values.ports.operator)) -}}
{{- $_ := set $worker "advertise" (printf "%s.%s:%d" $name $domain (int $values.ports.grpc)) -}}
{{- $_ := set $entry "worker" $worker -}}
{{- if eq $role "expert" -}}
{{- with include "millrace.expertShare" (dict "root" $root "index" $i) -}}{{- $_ := set $entry "experts" . -}}{{- end -}}
{{- end -}}
{{- $entries = append $entries $entry -}}
{{- end -}}
{{- toJson $entries -}}
{{- end -}}

{{- define "millrace.document" -}}
{{- $ports := .Values.router.ports -}}
{{- $router := deepCopy .Values.router.config -}}
{{- $_ := set $router "http_listen" (printf "0.0.0.0:%d" (int $ports.http)) -}}
{{- $_ := set $router "operator_listen" (printf "0.0.0.0:%d" (int $ports.operator)) -}}
{{- $_ := set $router "grpc_listen" (printf "0.0.0.0:%d" (int $ports.grpc)) -}}
{{- $_ := set $router "control_listen" (printf "0.0.0.0:%d" (int $ports.control)) -}}
{{- $_ := set $router "control_address" (include "millrace.controlAddress" .) -}}
{{- $document := dict
  "model" (include "millrace.present" .Values.model | fromJson)
  "router" $router
  "prefill" (include "millrace.entries" (dict "root" . "role" "prefill") | fromJsonArray)
  "decode" (include "millrace.entries" (dict "root" . "role" "decode") | fromJsonArray)
  "transfer" (include "millrace.present" .Values.transfer | fromJson)
  "timers" (include "millrace.present" .Values.timers | fromJson) -}}
{{- range $section := list "metrics" "tracing" -}}
{{- with include "millrace.present" (index $.Values $section) | fromJson -}}{{- $_ := set $document $section . -}}{{- end -}}
{{- end -}}
{{- if int .Values.expert.replicas -}}
{{- $_ := set $document "expert" (include "millrace.entries" (dict "root" . "role" "expert") | fromJsonArray) -}}
{{- end -}}
{{- toPrettyJson $document -}}
{{- end -}}

{{/* A digest of what one role reads of the document, so that a change restarts those that it concerns: another number of
prefill or decode workers restarts nobody, another number of experts the pool. dict "root" $ "role" name */}}
{{- define "millrace.roleChecksum" -}}
{{- $document := include "millrace.document" .root | fromJson -}}
{{- $part := pick $document "model" "router" "transfer" "timers" "metrics" "tracing" -}}
{{- $_ := set $part "pool" (hasKey $document "expert") -}}
{{- if ne .role "router" -}}{{- $_ := set $part "router" (pick $document.router "control_address") -}}{{- end -}}
{{- if eq .role "expert" -}}
{{- $_ := set $part "entries" $document.expert -}}
{{- else if ne .role "router" -}}
{{- $_ := set $part "entry" (index $document .role | first) -}}
{{- end -}}
{{- toJson $part | sha256sum -}}
{{- end -}}
