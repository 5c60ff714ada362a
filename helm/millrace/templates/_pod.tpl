{{/*
SPDX-License-Identifier: Apache-2.0
The pod of a role: the same shape for all four. The workload around it is in router.yaml and workers.yaml.

Probes ask what the process knows of itself, all of them on the operator port: the kubelet has no certificate for the
gRPC ports. A worker is ready when its weights are loaded and no longer when it drains; a worker that makes no progress ends by its own watchdog. The router is ready when a request would
be placed. Liveness asks the operator port, a thread apart from the work: it never depends on a peer, or one dead pool
would restart the whole cluster, nor on the public port, which clients can fill.

Labels are the selector's: a new version of the chart alone restarts no pod.

Call with dict "root" $ "role" name.
*/}}
{{- define "millrace.podTemplate" -}}
{{- $root := .root -}}
{{- $role := .role -}}
{{- $values := index $root.Values $role -}}
{{- $isWorker := ne $role "router" -}}
metadata:
  labels:
    {{- include "millrace.roleSelector" (dict "root" $root "component" $role) | nindent 4 }}
    {{- with $root.Values.commonLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include "millrace.roleChecksum" . }}
    {{- with $root.Values.network.rdma }}
    {{- if and $isWorker .enabled .multusNetworks }}
    k8s.v1.cni.cncf.io/networks: {{ .multusNetworks }}
    {{- end }}
    {{- end }}
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "millrace.serviceAccount" $root }}
  automountServiceAccountToken: false
  # Names of Services in the environment could be taken for settings.
  enableServiceLinks: false
  {{- if $values.hostNetwork }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  terminationGracePeriodSeconds: {{ include "millrace.graceSeconds" . }}
  securityContext:
    {{- include "millrace.podSecurity" . | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $values.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- include "millrace.placement" . | nindent 2 }}
  {{- if $root.Values.modelStore.verify.enabled }}
  initContainers:
    {{- include "millrace.waitForModel" $root | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ $role }}
      image: {{ include "millrace.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [millrace]
      args:
        - {{ $role }}
        - --config
        - /etc/millrace/cluster.json
        - --name
        - $(POD_NAME)
        {{- range $values.extraArgs }}
        - {{ . | quote }}
        {{- end }}
      env:
        - name: POD_NAME
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
        {{- if $isWorker }}
        {{- range $key, $value := $root.Values.network.ucx }}
        - name: {{ $key }}
          value: {{ $value | quote }}
        {{- end }}
        {{- end }}
        {{- with $values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        {{- range $name, $port := $values.ports }}
        - {name: {{ $name }}, containerPort: {{ int $port }}, protocol: TCP}
        {{- end }}
      {{- include "millrace.probes" . | nindent 6 }}
      {{- with int $values.preStopSeconds }}
      # Endpoints forget the pod before it refuses connections.
      lifecycle: {preStop: {exec: {command: [sleep, {{ . | quote }}]}}}
      {{- end }}
      resources:
        {{- include "millrace.resources" $ | nindent 8 }}
      securityContext:
        {{- include "millrace.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/millrace, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        {{- range $lock := include "millrace.locks" $ | fromYamlArray }}
        - {name: {{ $lock.name }}, mountPath: /etc/millrace-{{ $lock.name }}, readOnly: true}
        {{- end }}
        {{- if ne $root.Values.modelStore.type "image" }}
        - {name: models, mountPath: {{ $root.Values.modelStore.mountPath }}, readOnly: true}
        {{- end }}
        {{- with $values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: config
      configMap: {name: {{ include "millrace.fullname" $root }}}
    - name: tmp
      emptyDir: {sizeLimit: 64Mi}
    {{- range $lock := include "millrace.locks" $ | fromYamlArray }}
    - name: {{ $lock.name }}
      secret: {secretName: {{ $lock.secret }}, defaultMode: 0440}
    {{- end }}
    {{- include "millrace.modelVolume" $root | nindent 4 }}
    {{- with $values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* The Secrets that a role's pod reads: name of the volume, and of the Secret. */}}
{{- define "millrace.locks" -}}
{{- if .root.Values.tls.enabled }}
- {name: tls, secret: {{ include "millrace.tlsSecret" . }}}
{{- end }}
{{- if eq .role "router" }}
{{- with .root.Values.tls.public.existingSecret }}
- {name: public-tls, secret: {{ . }}}
{{- end }}
{{- with .root.Values.auth.existingSecret }}
- {name: keys, secret: {{ . }}}
{{- end }}
{{- end }}
{{- end -}}

{{- define "millrace.probes" -}}
{{- $values := index .root.Values .role -}}
{{- if eq .role "router" -}}
startupProbe:
  httpGet: {path: /healthz, port: operator}
  periodSeconds: 2
  failureThreshold: {{ ceil (divf (int $values.startupSeconds) 2) | int }}
readinessProbe:
  httpGet: {path: /readyz, port: operator}
  periodSeconds: 5
  failureThreshold: 2
{{- else -}}
startupProbe:
  httpGet: {path: /readyz, port: operator}
  periodSeconds: 5
  failureThreshold: {{ ceil (divf (int $values.startupSeconds) 5) | int }}
readinessProbe:
  httpGet: {path: /readyz, port: operator}
  periodSeconds: 5
  failureThreshold: 2
{{- end }}
livenessProbe:
  httpGet: {path: /healthz, port: operator}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}

{{- define "millrace.podSecurity" -}}
{{- $default := dict "runAsNonRoot" true "runAsUser" 65532 "runAsGroup" 65532 "fsGroup" 65532 "fsGroupChangePolicy" "OnRootMismatch"
  "seccompProfile" (dict "type" "RuntimeDefault") -}}
{{- if ne .role "router" -}}
{{- $range := .root.Values.network.dataPorts -}}
{{- $_ := set $default "sysctls" (list (dict "name" "net.ipv4.ip_local_port_range" "value" (printf "%d %d" (int $range.first) (int $range.last)))) -}}
{{- end -}}
{{- if (index .root.Values .role).hostNetwork -}}{{- $default = omit $default "sysctls" -}}{{- end -}}
{{- toYaml (mergeOverwrite $default (deepCopy (index .root.Values .role).podSecurityContext)) -}}
{{- end -}}

{{- define "millrace.containerSecurity" -}}
{{- $capabilities := dict "drop" (list "ALL") -}}
{{- if and (ne .role "router") .root.Values.network.rdma.enabled -}}{{- $_ := set $capabilities "add" (list "IPC_LOCK") -}}{{- end -}}
{{- $default := dict "allowPrivilegeEscalation" false "readOnlyRootFilesystem" true "capabilities" $capabilities -}}
{{- toYaml (mergeOverwrite $default (deepCopy (index .root.Values .role).securityContext)) -}}
{{- end -}}

{{/* As given, and an RDMA device where the fabric is used. */}}
{{- define "millrace.resources" -}}
{{- $resources := deepCopy (index .root.Values .role).resources -}}
{{- $rdma := .root.Values.network.rdma -}}
{{- if and (ne .role "router") $rdma.enabled -}}
{{- $device := dict $rdma.resourceName (int $rdma.count) -}}
{{- $_ := set $resources "limits" (merge (default dict $resources.limits) $device) -}}
{{- $_ := set $resources "requests" (merge (default dict $resources.requests) $device) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Pods of one role apart, all workers near each other, unless the values say otherwise. */}}
{{- define "millrace.placement" -}}
{{- $values := index .root.Values .role -}}
topologySpreadConstraints:
{{- if $values.topologySpreadConstraints }}
  {{- toYaml $values.topologySpreadConstraints | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "millrace.roleSelector" (dict "root" .root "component" .role) | nindent 8 }}
{{- end }}
{{- $affinity := deepCopy $values.affinity }}
{{- if and .root.Values.colocateBy (ne .role "router") (not $affinity.podAffinity) }}
{{- $workers := dict "matchLabels" (include "millrace.selector" .root | fromYaml) "matchExpressions" (list (dict "key" "app.kubernetes.io/component" "operator" "In" "values" (list "prefill" "decode" "expert"))) }}
{{- $term := dict "weight" 100 "podAffinityTerm" (dict "topologyKey" .root.Values.colocateBy "labelSelector" $workers) }}
{{- $_ := set $affinity "podAffinity" (dict "preferredDuringSchedulingIgnoredDuringExecution" (list $term)) }}
{{- end }}
{{- with $affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "millrace.modelVolume" -}}
{{- if eq .Values.modelStore.type "claim" -}}
- name: models
  persistentVolumeClaim: {claimName: {{ include "millrace.claim" . }}}
{{- else if eq .Values.modelStore.type "hostPath" -}}
- name: models
  hostPath: {path: {{ .Values.modelStore.hostPath }}, type: Directory}
{{- end -}}
{{- end -}}

{{/* A worker that loads half a checkpoint fails late and by tensor name; waiting for the marker says it at once. */}}
{{- define "millrace.waitForModel" -}}
- name: wait-for-model
  image: {{ include "millrace.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [sh, -ec]
  args:
    - |
      left={{ int .Values.modelStore.verify.timeoutSeconds }}
      until [ -e "$MODEL/.complete" ]; do
        [ "$left" -gt 0 ] || { echo "$MODEL has no .complete: see the Job that verifies it" >&2; exit 1; }
        sleep 5; left=$((left - 5))
      done
  env:
    - {name: MODEL, value: {{ .Values.model.path | quote }}}
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {memory: 64Mi}
  securityContext:
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL]}
  volumeMounts:
    - {name: models, mountPath: {{ .Values.modelStore.mountPath }}, readOnly: true}
{{- end -}}
