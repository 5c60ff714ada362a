{{/*
SPDX-License-Identifier: Apache-2.0
Names, labels, images and quantities. What a pod is: _pod.tpl; what the processes read: _document.tpl; who may call
whom: _network.tpl; what is refused: _validations.tpl.
*/}}

{{/* 40 characters leave room for a role, an ordinal and a revision hash in a label of 63. */}}
{{- define "millrace.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "millrace.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* dict "root" $ "component" "router" */}}
{{- define "millrace.roleSelector" -}}
{{ include "millrace.selector" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Labels of an object; selectors never have the version. dict "root" $ "component" "router" (optional) */}}
{{- define "millrace.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "millrace.selector" .root }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: millrace
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "millrace.image" -}}
{{- $image := .Values.image -}}
{{- $name := $image.repository -}}
{{- with $image.registry }}{{ $name = printf "%s/%s" (trimSuffix "/" .) $name }}{{ end -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default .Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "millrace.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "millrace.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Where workers dial the router. A virtual address: the router's pod may be replaced, the address stays. */}}
{{- define "millrace.controlAddress" -}}
{{ include "millrace.fullname" . }}-control.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}:{{ .Values.router.ports.control }}
{{- end -}}

{{- define "millrace.trustDomain" -}}{{ default .Values.clusterDomain .Values.tls.trustDomain }}{{- end -}}

{{/* The Secret with a role's certificate. dict "root" $ "role" name */}}
{{- define "millrace.tlsSecret" -}}
{{- default (printf "%s-%s-tls" (include "millrace.fullname" .root) .role) (index .root.Values.tls.secrets .role) -}}
{{- end -}}

{{- define "millrace.claim" -}}
{{- default (printf "%s-models" (include "millrace.fullname" .)) .Values.modelStore.claim.existingClaim -}}
{{- end -}}

{{/* Pods a role may ever have: names in the document must exist before an autoscaler asks for them. */}}
{{- define "millrace.maxReplicas" -}}
{{- if .autoscaling.enabled -}}{{ int .autoscaling.maxReplicas }}{{- else -}}{{ int .replicas }}{{- end -}}
{{- end -}}

{{/* Pods of one whole set of experts. */}}
{{- define "millrace.groupSize" -}}
{{- $expert := .Values.expert -}}
{{- if or (eq (int $expert.groupSize) 0) $expert.shares -}}{{ int $expert.replicas }}{{- else -}}{{ int $expert.groupSize }}{{- end -}}
{{- end -}}

{{/* "0-3,7" as a JSON list of numbers; what is no number or range is left out, which the validations notice. */}}
{{- define "millrace.expandExperts" -}}
{{- $ids := list -}}
{{- range $part := splitList "," . -}}
{{- if regexMatch "^[0-9]+(-[0-9]+)?$" $part -}}
{{- $ends := splitList "-" $part -}}
{{- range $id := untilStep (int (first $ends)) (add1 (int (last $ends)) | int) 1 -}}{{- $ids = append $ids $id -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $ids -}}
{{- end -}}

{{/* A Kubernetes quantity in bytes; 0 if it is none. */}}
{{- define "millrace.bytes" -}}
{{- $text := toString . -}}
{{- $units := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- if regexMatch "^[0-9]+(\\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?$" $text -}}
{{- $number := regexFind "^[0-9]+(\\.[0-9]+)?" $text -}}
{{- $unit := get $units (trimPrefix $number $text) -}}
{{- mulf (float64 $number) (float64 $unit) | floor | int64 -}}
{{- else -}}0{{- end -}}
{{- end -}}

{{/* Seconds that a role may take to end: what it is given, or the sum of its parts. dict "root" $ "role" name */}}
{{- define "millrace.drainSeconds" -}}
{{- $drain := int (default 30000 .root.Values.timers.drain_grace_ms) -}}
{{- add (int (index .root.Values .role).preStopSeconds) (ceil (divf $drain 1000) | int) 10 -}}
{{- end -}}
{{- define "millrace.graceSeconds" -}}
{{- $given := int (index .root.Values .role).terminationGracePeriodSeconds -}}
{{- if $given -}}{{ $given }}{{- else -}}{{ include "millrace.drainSeconds" . }}{{- end -}}
{{- end -}}
