{{/* Names, labels and images: what objects are called. */}}

{{- define "arriero.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "arriero.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Labels that find pods; they never change. Takes root and component. */}}
{{- define "arriero.selector" -}}
app.kubernetes.io/name: {{ include "arriero.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/* All labels. Takes root and component. */}}
{{- define "arriero.labels" -}}
{{ include "arriero.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .managedBy | default .root.Release.Service }}
app.kubernetes.io/part-of: arriero
{{- if not .managedBy }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Name, labels and annotations. Takes root, component, name; perhaps labels and annotations. */}}
{{- define "arriero.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "arriero.labels" . | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (.annotations | default dict) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The image of a dependency class. Takes root and class. */}}
{{- define "arriero.image" -}}
{{- $image := index .root.Values.images .class -}}
{{- with .root.Values.imageRegistry }}{{ trimSuffix "/" . }}/{{ end }}{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default .root.Values.imageTag | default .root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "arriero.storeClaim" -}}
{{- .Values.store.claim.existingClaim | default (printf "%s-store" (include "arriero.fullname" .)) -}}
{{- end }}

{{- define "arriero.databaseClaim" -}}
{{- .Values.database.sqlite.existingClaim | default (printf "%s-orchestrator" (include "arriero.fullname" .)) -}}
{{- end }}

{{- define "arriero.tlsSecret" -}}
{{- .Values.tls.existingSecret | default (printf "%s-tls" (include "arriero.fullname" .)) -}}
{{- end }}

{{- define "arriero.serverName" -}}
{{- .Values.tls.serverName | default (printf "%s.%s.svc" (include "arriero.fullname" .) .Release.Namespace) -}}
{{- end }}

{{/* `host:port` of a service's gRPC port. Takes root and component. */}}
{{- define "arriero.address" -}}
{{ include "arriero.fullname" .root }}-{{ .component }}.{{ .root.Release.Namespace }}.svc:50051
{{- end }}
