{{/*
SPDX-License-Identifier: Apache-2.0
What the schema cannot see: values that are each allowed and cannot work together. Every problem is named at once, with
what to write instead. The binary checks the document again when it starts.

Each define appends sentences to the list in .problems, so that one file reads as a list of rules. Every template asks
for millrace.validate first, because Helm renders them in an order of its own and a later one would fail on its own terms.
*/}}

{{- define "millrace.validate" -}}
{{- $check := dict "root" . "problems" list -}}
{{- include "millrace.checkSecurity" $check -}}
{{- include "millrace.checkReplicas" $check -}}
{{- include "millrace.checkPorts" $check -}}
{{- include "millrace.checkTimers" $check -}}
{{- include "millrace.checkExperts" $check -}}
{{- include "millrace.checkModel" $check -}}
{{- include "millrace.checkDevices" $check -}}
{{- include "millrace.checkMemory" $check -}}
{{- include "millrace.checkEnvironment" $check -}}
{{- include "millrace.checkExtras" $check -}}
{{- if not $check.problems -}}{{- include "millrace.checkSize" $check -}}{{- end -}}
{{- if $check.problems -}}
{{- fail (printf "\n\n%d problem(s) in the values of millrace:\n  - %s\n" (len $check.problems) (join "\n  - " $check.problems)) -}}
{{- end -}}
{{- end -}}

{{/* dict "check" $check "text" "..." */}}
{{- define "millrace.problem" -}}
{{- $_ := set .check "problems" (append .check.problems .text) -}}
{{- end -}}

{{- define "millrace.checkSecurity" -}}
{{- $values := .root.Values -}}
{{- if not (or $values.tls.enabled $values.allowInsecure) -}}
{{- include "millrace.problem" (dict "check" . "text" "tls.enabled: found false: traffic between pods would be neither encrypted nor authenticated; leave it true, or if the network is yours alone write --set allowInsecure=true") -}}
{{- end -}}
{{- if not (or $values.auth.existingSecret $values.allowInsecure) -}}
{{- include "millrace.problem" (dict "check" . "text" "auth.existingSecret: found nothing: whoever reaches a port could use it and drain workers; name a Secret with keys.json (millrace key makes a key), or for a demo write --set tls.enabled=false,allowInsecure=true") -}}
{{- end -}}
{{- if and $values.transfer.seal (not $values.tls.enabled) -}}
{{- include "millrace.problem" (dict "check" . "text" "transfer.seal: found true with tls.enabled false: the keys of the seal are agreed on over TLS and would be anybody's; leave tls.enabled true, or transfer.seal false") -}}
{{- end -}}
{{- if and (not $values.allowInsecure) (not $values.transfer.seal) (has $values.transfer.listen_address (list "" "0.0.0.0" "::")) -}}
{{- include "millrace.problem" (dict "check" . "text" "transfer.listen_address: found every interface, allowed the one that only workers share, such as eth0 or net1: blocks are not sealed; or write --set transfer.seal=true, or allowInsecure=true") -}}
{{- end -}}
{{- if and $values.tls.certManager.enabled (not $values.tls.certManager.issuerRef.name) -}}
{{- include "millrace.problem" (dict "check" . "text" "tls.certManager.issuerRef.name: found nothing, wanted an issuer that signs for this release") -}}
{{- end -}}
{{- $tag := default .root.Chart.AppVersion $values.image.tag -}}
{{- if and (eq $tag "latest") (not $values.image.digest) (not $values.unsafe.latestTag) -}}
{{- include "millrace.problem" (dict "check" . "text" "image.tag: found latest: workers of two builds refuse each other and nobody could tell which is which; name a version or a digest, or write --set unsafe.latestTag=true") -}}
{{- end -}}
{{- $check := . -}}
{{- range $role := list "router" "prefill" "decode" "expert" -}}
{{- $r := index $values $role -}}
{{- range $field := list "podSecurityContext" "securityContext" -}}
{{- $context := index $r $field -}}
{{- $asRoot := or (and (hasKey $context "runAsUser") (eq (int $context.runAsUser) 0)) (and (hasKey $context "runAsNonRoot") (not $context.runAsNonRoot)) -}}
{{- if and $asRoot (not $values.unsafe.runAsRoot) -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.%s: asks for user 0: no part of millrace needs it; leave it out, or write --set unsafe.runAsRoot=true" $role $field)) -}}
{{- end -}}
{{- if and (or $context.privileged $context.allowPrivilegeEscalation) (not $values.unsafe.privileged) -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.%s: asks for privileges; leave it out, or write --set unsafe.privileged=true" $role $field)) -}}
{{- end -}}
{{- end -}}
{{- if and $r.hostNetwork (not $values.unsafe.hostNetwork) -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.hostNetwork: found true: no NetworkPolicy reaches such a pod; leave it out, or write --set unsafe.hostNetwork=true" $role)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "millrace.checkReplicas" -}}
{{- $values := .root.Values -}}
{{- if gt (int $values.router.replicas) 1 -}}
{{- include "millrace.problem" (dict "check" . "text" (printf "router.replicas: found %d, allowed 1: workers hold one stream to one router; a second router is a second release with its own workers" (int $values.router.replicas))) -}}
{{- end -}}
{{- $check := . -}}
{{- range $role := list "router" "prefill" "decode" -}}
{{- if lt (int (index $values $role).replicas) 1 -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.replicas: found 0, %s needs at least 1: a request goes through a router, a prefill and a decode worker" $role $role)) -}}
{{- end -}}
{{- end -}}
{{- range $role := list "router" "expert" -}}
{{- if (index $values $role).autoscaling.enabled -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.autoscaling.enabled: found true, allowed only for prefill and decode: %s" $role (ternary "one router serves a set of workers" "which experts a member holds depends on how many there are" (eq $role "router")))) -}}
{{- end -}}
{{- end -}}
{{- range $role := list "prefill" "decode" -}}
{{- $scaling := (index $values $role).autoscaling -}}
{{- if and $scaling.enabled (gt (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.autoscaling: minReplicas %d is above maxReplicas %d" $role (int $scaling.minReplicas) (int $scaling.maxReplicas))) -}}
{{- end -}}
{{- if and $scaling.enabled $scaling.keda.enabled (not $scaling.keda.prometheusAddress) -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.autoscaling.keda.prometheusAddress: found nothing, wanted the URL of Prometheus" $role)) -}}
{{- end -}}
{{- if and $scaling.keda.enabled (not $scaling.enabled) -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.autoscaling.keda.enabled: found true with %s.autoscaling.enabled false: set both" $role $role)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "millrace.checkPorts" -}}
{{- $values := .root.Values -}}
{{- $check := . -}}
{{- $data := $values.network.dataPorts -}}
{{- if ge (int $data.first) (int $data.last) -}}
{{- include "millrace.problem" (dict "check" . "text" (printf "network.dataPorts: first %d is not below last %d" (int $data.first) (int $data.last))) -}}
{{- end -}}
{{- range $role := list "router" "prefill" "decode" "expert" -}}
{{- $seen := dict -}}
{{- range $name, $port := (index $values $role).ports -}}
{{- $key := int $port | toString -}}
{{- if hasKey $seen $key -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.ports: %s and %s are both %s; each listener needs its own port, and what is public must not be what is internal" $role (get $seen $key) $name $key)) -}}
{{- end -}}
{{- $_ := set $seen $key $name -}}
{{- if and (ne $role "router") (ge (int $port) (int $data.first)) (le (int $port) (int $data.last)) -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.ports.%s: %s lies in network.dataPorts %d to %d, which the block transport draws from" $role $name $key (int $data.first) (int $data.last))) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "millrace.checkTimers" -}}
{{- $values := .root.Values -}}
{{- $check := . -}}
{{- $heartbeat := int (default 500 $values.timers.heartbeat_ms) -}}
{{- $dead := int (default 3000 $values.timers.dead_after_ms) -}}
{{- if lt $dead (mul 3 $heartbeat | int) -}}
{{- include "millrace.problem" (dict "check" . "text" (printf "timers.dead_after_ms: found %d, allowed at least 3 * timers.heartbeat_ms = %d" $dead (mul 3 $heartbeat))) -}}
{{- end -}}
{{- $lease := int (default 10000 $values.timers.lease_ttl_ms) -}}
{{- if lt $lease (mul 3 $heartbeat | int) -}}
{{- include "millrace.problem" (dict "check" . "text" (printf "timers.lease_ttl_ms: found %d, allowed at least 3 * timers.heartbeat_ms = %d: a lease is renewed every third of its time, and no oftener than a worker is heard" $lease (mul 3 $heartbeat))) -}}
{{- end -}}
{{- $limit := int (default 0 $values.router.config.max_tokens_limit) -}}
{{- $tokens := int (default 0 $values.router.config.default_max_tokens) -}}
{{- if and $limit (gt $tokens $limit) -}}
{{- include "millrace.problem" (dict "check" . "text" (printf "router.config.default_max_tokens: found %d, allowed at most router.config.max_tokens_limit = %d" $tokens $limit)) -}}
{{- end -}}
{{- range $role := list "router" "prefill" "decode" "expert" -}}
{{- $given := int (index $values $role).terminationGracePeriodSeconds -}}
{{- $needed := include "millrace.drainSeconds" (dict "root" $check.root "role" $role) | int -}}
{{- if and $given (lt $given $needed) -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.terminationGracePeriodSeconds: found %d, allowed at least %d = %s.preStopSeconds + timers.drain_grace_ms / 1000 + 10: the kubelet would kill a pod that still drains" $role $given $needed $role)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "millrace.checkExperts" -}}
{{- $expert := .root.Values.expert -}}
{{- $check := . -}}
{{- $replicas := int $expert.replicas -}}
{{- $count := int .root.Values.modelFacts.routedExperts -}}
{{- $size := include "millrace.groupSize" .root | int -}}
{{- if and (eq $replicas 0) (or $expert.shares $expert.leaderWorkerSet.enabled) -}}
{{- include "millrace.problem" (dict "check" . "text" "expert.replicas: found 0, wanted a pool for expert.shares or expert.leaderWorkerSet") -}}
{{- end -}}
{{- if and $expert.shares (ne (len $expert.shares) $replicas) -}}
{{- include "millrace.problem" (dict "check" . "text" (printf "expert.shares: found %d entries, wanted one for each of expert.replicas = %d" (len $expert.shares) $replicas)) -}}
{{- end -}}
{{- if and $replicas (not $expert.shares) (ne (mod $replicas (max 1 $size)) 0) -}}
{{- include "millrace.problem" (dict "check" . "text" (printf "expert.replicas: found %d, wanted a multiple of expert.groupSize = %d" $replicas $size)) -}}
{{- end -}}
{{- if and $replicas (lt $size $replicas) (eq $count 0) -}}
{{- include "millrace.problem" (dict "check" . "text" "modelFacts.routedExperts: found 0, wanted their number: groups of experts are cut by it (millrace inspect MODEL --json: architecture.n_routed_experts)") -}}
{{- end -}}
{{- if and $replicas $count (not $expert.shares) (gt $size $count) -}}
{{- include "millrace.problem" (dict "check" . "text" (printf "expert.replicas: %d pods share %d experts, which leaves some without any" $size $count)) -}}
{{- end -}}
{{- if and $expert.config.experts $replicas -}}
{{- include "millrace.problem" (dict "check" . "text" "expert.config.experts: one value for all pods would give them the same experts; use expert.shares") -}}
{{- end -}}
{{- if and $expert.shares $count -}}
{{- $held := dict -}}
{{- range $i, $share := $expert.shares -}}
{{- $own := dict -}}
{{- range $id := include "millrace.expandExperts" $share | fromJsonArray -}}
{{- $key := int $id | toString -}}
{{- if hasKey $own $key -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "expert.shares[%d]: expert %s twice" $i $key)) -}}
{{- end -}}
{{- $_ := set $own $key true -}}
{{- $_ := set $held $key true -}}
{{- if ge (int $id) $count -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "expert.shares[%d]: expert %s, allowed 0 to %d" $i $key (sub $count 1))) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $missing := list -}}
{{- range $id := until $count -}}{{- if not (hasKey $held (toString $id)) -}}{{- $missing = append $missing (toString $id) -}}{{- end -}}{{- end -}}
{{- if $missing -}}
{{- include "millrace.problem" (dict "check" . "text" (printf "expert.shares: no pod holds expert %s" (join ", " $missing))) -}}
{{- end -}}
{{- end -}}
{{- if and .root.Values.prefill.config.local_experts (eq $replicas 0) -}}
{{- include "millrace.problem" (dict "check" . "text" "prefill.config.local_experts: there is no pool (expert.replicas is 0), so the worker holds all experts anyway") -}}
{{- end -}}
{{- end -}}

{{- define "millrace.checkModel" -}}
{{- $values := .root.Values -}}
{{- $store := $values.modelStore -}}
{{- if and (ne $store.type "image") (not (hasPrefix (printf "%s/" (trimSuffix "/" $store.mountPath)) $values.model.path)) -}}
{{- include "millrace.problem" (dict "check" . "text" (printf "model.path: found %s, wanted a folder below modelStore.mountPath = %s" $values.model.path $store.mountPath)) -}}
{{- end -}}
{{- if and (eq $store.type "hostPath") (not $store.hostPath) -}}
{{- include "millrace.problem" (dict "check" . "text" "modelStore.hostPath: found nothing, wanted a folder of the nodes") -}}
{{- end -}}
{{- if and $store.hostPath (ne $store.type "hostPath") -}}
{{- include "millrace.problem" (dict "check" . "text" (printf "modelStore.hostPath: found %s with modelStore.type %s: one of the two is meant" $store.hostPath $store.type)) -}}
{{- end -}}
{{- if and $store.verify.enabled (ne $store.type "claim") -}}
{{- include "millrace.problem" (dict "check" . "text" (printf "modelStore.verify.enabled: found true with modelStore.type %s: only a claim is the same volume for the Job and the workers" $store.type)) -}}
{{- end -}}
{{- if and $store.fetch.enabled (not $store.verify.enabled) -}}
{{- include "millrace.problem" (dict "check" . "text" "modelStore.fetch.enabled: found true with modelStore.verify.enabled false: what was fetched must be verified; set both") -}}
{{- end -}}
{{- if and $store.fetch.enabled (not $store.fetch.image) -}}
{{- include "millrace.problem" (dict "check" . "text" "modelStore.fetch.image: found nothing, wanted the image that fills the claim") -}}
{{- end -}}
{{- $context := int $values.model.max_context_tokens -}}
{{- if and $context (lt $context 128) -}}
{{- include "millrace.problem" (dict "check" . "text" (printf "model.max_context_tokens: found %d, allowed at least 128: one page" $context)) -}}
{{- end -}}
{{- if and (eq $values.model.device "cuda") (eq $values.model.numerics "exact") -}}
{{- include "millrace.problem" (dict "check" . "text" "model.numerics: found exact with model.device cuda: exact runs on the CPU only") -}}
{{- end -}}
{{- end -}}

{{/* A worker on a device drives one; the router loads no weights. */}}
{{- define "millrace.checkDevices" -}}
{{- $values := .root.Values -}}
{{- $check := . -}}
{{- range $role := include "millrace.roles" .root | fromJsonArray -}}
{{- $limits := default dict (index $values $role).resources.limits -}}
{{- $gpus := int (default 0 (get $limits $values.gpu.resourceName)) -}}
{{- $isExpert := eq $role "expert" -}}
{{- $key := ternary "expert.config.device" "model.device" $isExpert -}}
{{- $device := ternary (default "cpu" $values.expert.config.device) $values.model.device $isExpert -}}
{{- $drives := and (ne $role "router") (eq $device "cuda") -}}
{{- if and $drives (ne $gpus 1) -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.resources.limits: found %d of %s, wanted 1 with %s cuda: a worker drives one device, more devices are more workers" $role $gpus $values.gpu.resourceName $key)) -}}
{{- else if and (gt $gpus 0) (not $drives) -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.resources.limits: found %d of %s, which would lie idle: %s" $role $gpus $values.gpu.resourceName (ternary "the router loads no weights" (printf "%s is cpu" $key) (eq $role "router")))) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Weights, pages and slots, and a tenth more, must fit: in the memory limit on a CPU, in the GPU on a GPU. */}}
{{- define "millrace.checkMemory" -}}
{{- $values := .root.Values -}}
{{- $facts := $values.modelFacts -}}
{{- $check := . -}}
{{- $pool := gt (int $values.expert.replicas) 0 -}}
{{- $defaults := dict "prefill" (dict "pages" 256 "slots" 8) "decode" (dict "pages" 1024 "slots" 32) -}}
{{- range $role := include "millrace.roles" .root | fromJsonArray -}}
{{- $values_ := index $values $role -}}
{{- $limits := default dict $values_.resources.limits -}}
{{- $device := ternary (default "cpu" $values.expert.config.device) $values.model.device (eq $role "expert") -}}
{{- $onGpu := eq $device "cuda" -}}
{{- $where := ternary "gpu.memory" (printf "%s.resources.limits.memory" $role) $onGpu -}}
{{- $limit := include "millrace.bytes" (ternary $values.gpu.memory (default "" $limits.memory) $onGpu) | int64 -}}
{{- if and (ne $role "router") $facts.weightBytes $limit (ne $values.model.numerics "exact") -}}
{{- $weights := int64 $facts.weightBytes -}}
{{- $pages := int64 0 -}}
{{- $slots := int64 0 -}}
{{- if eq $role "expert" -}}
{{- $weights = divf (float64 $facts.routedExpertBytes) (include "millrace.groupSize" $check.root | float64) | ceil | int64 -}}
{{- else -}}
{{- if $pool -}}{{- $weights = sub $weights (int64 $facts.routedExpertBytes) -}}{{- end -}}
{{- $pages = mul (int64 (default (get $defaults $role).pages $values_.config.cache_pages)) (int64 $facts.pageBytes) -}}
{{- $slots = mul (int64 (default (get $defaults $role).slots $values_.config.max_sequences)) (int64 $facts.slotBytes) -}}
{{- end -}}
{{- $sum := add $weights $pages $slots -}}
{{- $needed := mulf (float64 $sum) 1.1 | ceil | int64 -}}
{{- if lt $limit $needed -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s: found %d bytes for %s, wanted at least %d = 1.1 * (weights %d + pages %d + slots %d)" $where $limit $role $needed $weights $pages $slots)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Environment variables are UCX's and the ecosystem's; a secret in values would be in the release's history. */}}
{{- define "millrace.checkEnvironment" -}}
{{- $values := .root.Values -}}
{{- $check := . -}}
{{- range $role := list "router" "prefill" "decode" "expert" -}}
{{- range (index $values $role).extraEnv -}}
{{- if hasPrefix "MILLRACE_" .name -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.extraEnv: %s: millrace has no settings in the environment but test faults; settings are in the document (model, transfer, timers, %s.config)" $role .name $role)) -}}
{{- end -}}
{{- if and (hasKey $values.network.ucx .name) (ne $role "router") -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.extraEnv: %s is set by network.ucx already" $role .name)) -}}
{{- end -}}
{{- if and (regexMatch "(?i)(token|secret|passw|api_?key|credential)" .name) (hasKey . "value") -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "%s.extraEnv: %s looks like a secret and is given inline; use valueFrom.secretKeyRef with an existing Secret" $role .name)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $name, $value := $values.modelStore.fetch.env -}}
{{- if regexMatch "(?i)(token|secret|passw|api_?key|credential)" $name -}}
{{- include "millrace.problem" (dict "check" $check "text" (printf "modelStore.fetch.env: %s looks like a secret and is given inline; use modelStore.fetch.existingSecret" $name)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "millrace.checkExtras" -}}
{{- $values := .root.Values -}}
{{- if and $values.ingress.enabled (not $values.ingress.hosts) -}}
{{- include "millrace.problem" (dict "check" . "text" "ingress.hosts: found none, wanted at least one: a rule without a host would answer for every name") -}}
{{- end -}}
{{- if and $values.httpRoute.enabled (not $values.httpRoute.parentRefs) -}}
{{- include "millrace.problem" (dict "check" . "text" "httpRoute.parentRefs: found none, wanted the Gateway that the route belongs to") -}}
{{- end -}}
{{- if and $values.inferencePool.enabled (not $values.inferencePool.endpointPicker.name) -}}
{{- include "millrace.problem" (dict "check" . "text" "inferencePool.endpointPicker.name: found nothing, wanted the Service of the endpoint picker") -}}
{{- end -}}
{{- if and $values.networkPolicy.enabled (not $values.networkPolicy.operators) -}}
{{- include "millrace.problem" (dict "check" . "text" "networkPolicy.operators: found none: an empty list would open the operator ports to everybody; name who scrapes") -}}
{{- end -}}
{{- end -}}

{{/* Last, since the document of wrong values may not even render. */}}
{{- define "millrace.checkSize" -}}
{{- $bytes := include "millrace.document" .root | len -}}
{{- if gt $bytes 1048576 -}}
{{- include "millrace.problem" (dict "check" . "text" (printf "cluster.json: found %d bytes, allowed 1048576: fewer workers in one release" $bytes)) -}}
{{- end -}}
{{- end -}}
