{{/* Parts of pods that services, Jobs and replicas share. Each takes root and values (a service's section). */}}

{{/*
Environment. `role` is service (serves and calls), room (serves), replica (serves), job or
client (call); `store` says that the store is used.
*/}}
{{- define "arriero.env" -}}
{{- $v := .root.Values -}}
{{- $serves := has .role (list "service" "room" "replica") -}}
{{- $calls := has .role (list "service" "client") -}}
- {name: ARRIERO_HOME, value: /var/lib/arriero}
{{- if and .store (eq $v.store.kind "s3") (eq .role "replica") }}
- {name: ARRIERO_STORE, value: "file:///model"}
{{- else if .store }}
{{- if eq $v.store.kind "s3" }}
- {name: ARRIERO_STORE, value: {{ $v.store.s3.url | quote }}}
- {name: ARRIERO_STORE_CACHE, value: {{ .cache | default "/var/lib/arriero/cache" }}}
{{- if ne .role "fetch" }}
- {name: ARRIERO_STORE_CACHE_BYTES, value: {{ div (mul (include "arriero.bytes" (.cacheSize | default $v.store.s3.cacheSize) | int64) 9) 10 | quote }}}
{{- end }}
{{- with $v.store.s3.endpointUrl }}
- {name: ARRIERO_STORE_ENDPOINT_URL, value: {{ . | quote }}}
{{- end }}
- {name: AWS_REGION, value: {{ $v.store.s3.region | quote }}}
{{- with $v.store.s3.existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ . }}, key: AWS_ACCESS_KEY_ID}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ . }}, key: AWS_SECRET_ACCESS_KEY}}
{{- end }}
{{- else }}
- {name: ARRIERO_STORE, value: "file:///store"}
{{- end }}
{{- if $v.store.quotaBytes }}
- {name: ARRIERO_STORE_QUOTA_BYTES, value: {{ $v.store.quotaBytes | int64 | quote }}}
{{- end }}
{{- end }}
{{- if $serves }}
- {name: ARRIERO_LISTEN, value: {{ printf "%s:%d" $v.listenAddress (.port | default 50051 | int) | quote }}}
- {name: ARRIERO_DRAIN_SECONDS, value: {{ .drainSeconds | default $v.drainSeconds | quote }}}
{{- if $v.tls.enabled }}
- {name: ARRIERO_SERVER_TLS_CERT, value: /etc/arriero/tls/tls.crt}
- {name: ARRIERO_SERVER_TLS_KEY, value: /etc/arriero/tls/tls.key}
{{- if and $v.tls.clientCertificates (not .http) }}
- {name: ARRIERO_SERVER_TLS_CLIENT_CA, value: /etc/arriero/tls/ca.crt}
{{- end }}
{{- else }}
- {name: ARRIERO_SERVER_INSECURE, value: "1"}
{{- end }}
{{- if $v.auth.existingSecret }}
- {name: ARRIERO_SERVER_TOKEN_FILE, value: /etc/arriero/tokens/tokens}
{{- end }}
{{- end }}
{{- if and $serves (not .http) }}
- {name: ARRIERO_HEALTH_LISTEN, value: {{ printf "%s:50052" $v.listenAddress | quote }}}
{{- end }}
{{- if and $calls $v.auth.existingSecret }}
- {name: ARRIERO_TOKEN_FILE, value: /etc/arriero/tokens/tokens}
{{- if not $v.tls.enabled }}
- {name: ARRIERO_INSECURE, value: "1"}
{{- end }}
{{- end }}
{{- if and $v.tls.enabled (ne .role "fetch") }}
- {name: ARRIERO_TLS_CA, value: /etc/arriero/tls/ca.crt}
- {name: ARRIERO_TLS_SERVER_NAME, value: {{ include "arriero.serverName" .root | quote }}}
{{- if $v.tls.clientCertificates }}
- {name: ARRIERO_TLS_CERT, value: /etc/arriero/tls/tls.crt}
- {name: ARRIERO_TLS_KEY, value: /etc/arriero/tls/tls.key}
{{- end }}
{{- end }}
{{- end }}

{{/* Who and where a service is, for those that talk to the Kubernetes API. Takes root, class, owner. */}}
{{- define "arriero.identity" -}}
- name: ARRIERO_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- {name: ARRIERO_RELEASE, value: {{ .root.Release.Name | quote }}}
- {name: ARRIERO_IMAGE, value: {{ include "arriero.image" . | quote }}}
- {name: ARRIERO_OWNER, value: {{ .owner }}}
{{- end }}

{{/* What pipelines may read, and the secrets that they name. Takes root. */}}
{{- define "arriero.sources" -}}
{{- with .root.Values.sources.allowedPaths }}
- {name: ARRIERO_ALLOWED_PATHS, value: {{ join ":" . | quote }}}
{{- end }}
{{- with .root.Values.sources.allowedHosts }}
- {name: ARRIERO_ALLOWED_HOSTS, value: {{ join "," . | quote }}}
{{- end }}
{{- end }}

{{/* envFrom of a room or service. */}}
{{- define "arriero.envFrom" -}}
{{- if and .secrets .root.Values.sources.existingSecret }}
- prefix: ARRIERO_SECRET_
  secretRef: {name: {{ .root.Values.sources.existingSecret }}}
{{- end }}
{{- with .values.envFrom }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/*
Volume mounts. `role` as above; `store` is "rw", "ro" or nothing. Job pods hold no token, and
the private key only where callers must show a certificate.
*/}}
{{- define "arriero.mounts" -}}
{{- $v := .root.Values -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /var/lib/arriero}
{{- if .shm }}
- {name: shm, mountPath: /dev/shm}
{{- end }}
{{- if and .store (eq $v.store.kind "claim") }}
- {name: store, mountPath: /store{{ if eq .store "ro" }}, readOnly: true{{ end }}}
{{- end }}
{{- if and .store (eq $v.store.kind "s3") }}
{{- if eq .role "replica" }}
- {name: model, mountPath: /model, readOnly: true}
{{- else }}
- {name: cache, mountPath: /var/lib/arriero/cache}
{{- end }}
{{- end }}
{{- if $v.tls.enabled }}
- {name: tls, mountPath: /etc/arriero/tls, readOnly: true}
{{- end }}
{{- if and $v.auth.existingSecret (ne .role "job") }}
- {name: tokens, mountPath: /etc/arriero/tokens, readOnly: true}
{{- end }}
{{- with .config }}
- {name: config, mountPath: {{ . }}, readOnly: true}
{{- end }}
{{- with .values.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Volumes that go with the mounts. `home` is a claim's name, or `homeSize` of an emptyDir. */}}
{{- define "arriero.volumes" -}}
{{- $v := .root.Values -}}
- name: tmp
  emptyDir: {sizeLimit: {{ .tmpSize | default "2Gi" }}}
- name: home
  {{- if .home }}
  persistentVolumeClaim: {claimName: {{ .home }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ .homeSize | default "1Gi" }}}
  {{- end }}
{{- with .shm }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ . }}}
{{- end }}
{{- if and .store (eq $v.store.kind "claim") }}
- name: store
  persistentVolumeClaim: {claimName: {{ include "arriero.storeClaim" .root }}}
{{- end }}
{{- if and .store (eq $v.store.kind "s3") }}
{{- if eq .role "replica" }}
- name: model
  # The orchestrator adds what the model takes.
  emptyDir: {sizeLimit: {{ .values.modelVolumeMargin }}}
{{- else }}
- name: cache
  emptyDir: {sizeLimit: {{ .cacheSize | default $v.store.s3.cacheSize }}}
{{- end }}
{{- end }}
{{- if $v.tls.enabled }}
- name: tls
  secret:
    secretName: {{ include "arriero.tlsSecret" .root }}
    defaultMode: 0440
    {{- if and (has .role (list "job" "client")) (not $v.tls.clientCertificates) }}
    items: [{key: ca.crt, path: ca.crt}]
    {{- end }}
{{- end }}
{{- if and $v.auth.existingSecret (ne .role "job") }}
- name: tokens
  secret:
    secretName: {{ $v.auth.existingSecret }}
    defaultMode: 0440
    items: [{key: tokens, path: tokens}]
{{- end }}
{{- with .config }}
- name: config
  configMap: {name: {{ . }}}
{{- end }}
{{- with .values.volumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Where a pod may run. Takes values, perhaps runtimeClass. */}}
{{- define "arriero.scheduling" -}}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.runtimeClassName | default .runtimeClass }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}

{{/* Spread over hosts unless the values say otherwise. Takes values and selector. */}}
{{- define "arriero.spread" -}}
topologySpreadConstraints:
{{- if .values.topologySpreadConstraints }}
  {{- toYaml .values.topologySpreadConstraints | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- .selector | nindent 8 }}
    matchLabelKeys: [pod-template-hash{{ with .keys }}, {{ . }}{{ end }}]
{{- end }}
{{- end }}

{{/* What every pod begins with. Takes root, account. */}}
{{- define "arriero.pod" -}}
{{- with .account }}
serviceAccountName: {{ . }}
{{- end }}
automountServiceAccountToken: {{ .token | default false }}
enableServiceLinks: false
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* What every container begins with. Takes root, class. */}}
{{- define "arriero.container" -}}
image: {{ include "arriero.image" . }}
imagePullPolicy: {{ .root.Values.imagePullPolicy }}
securityContext:
  {{- toYaml .root.Values.securityContext | nindent 2 }}
{{- end }}

{{/* Probes on the plaintext health port. Takes startupSeconds. */}}
{{- define "arriero.probes" -}}
startupProbe:
  grpc: {port: 50052, service: {{ .startup | default "live" }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (.startupSeconds | default 600) 5 }}
readinessProbe:
  grpc: {port: 50052, service: ready}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  grpc: {port: 50052, service: live}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
{{- end }}

{{/* A Kubernetes quantity in bytes. */}}
{{- define "arriero.bytes" -}}
{{- $text := toString . -}}
{{- $units := dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 -}}
{{- $unit := regexFind "[A-Za-z]+$" $text -}}
{{- if $unit -}}
{{- mul (trimSuffix $unit $text | int64) (get $units $unit | int64) -}}
{{- else -}}
{{- $text -}}
{{- end -}}
{{- end }}
