{{/*
What a room's Jobs are made from: job.yaml (the runner adds name, labels, parallelism, args,
environment and resources) and profiles.yaml. Takes root, component, values, class.
*/}}
{{- define "arriero.jobs" -}}
{{- $part := merge (dict "role" "job" "shm" .values.job.shmSize "homeSize" .values.job.scratchSize "tmpSize" .values.job.scratchSize) . -}}
{{- $labels := dict "root" .root "component" (printf "%s-job" .component) "managedBy" "arriero" -}}
job.yaml: |
  apiVersion: batch/v1
  kind: Job
  metadata:
    labels:
      {{- include "arriero.labels" $labels | nindent 6 }}
    {{- with .root.Values.commonAnnotations }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    backoffLimit: 0
    template:
      metadata:
        labels:
          {{- include "arriero.labels" $labels | nindent 10 }}
          {{- with .values.job.podLabels }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        annotations:
          kubectl.kubernetes.io/default-container: main
          {{- with .values.job.podAnnotations }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
      spec:
        restartPolicy: Never
        {{- include "arriero.pod" (dict "root" .root "account" (printf "%s-job" (include "arriero.fullname" .root))) | nindent 8 }}
        {{- include "arriero.scheduling" (dict "values" .values.job) | nindent 8 }}
        terminationGracePeriodSeconds: {{ .values.job.graceSeconds }}
        containers:
          - name: main
            {{- include "arriero.container" . | nindent 12 }}
            env:
              {{- include "arriero.env" $part | nindent 14 }}
              {{- with include "arriero.sources" $part | trim }}
              {{- . | nindent 14 }}
              {{- end }}
              {{- with .values.env }}
              {{- toYaml . | nindent 14 }}
              {{- end }}
            {{- with include "arriero.envFrom" $part | trim }}
            envFrom:
              {{- . | nindent 14 }}
            {{- end }}
            volumeMounts:
              {{- include "arriero.mounts" $part | nindent 14 }}
        volumes:
          {{- include "arriero.volumes" $part | nindent 10 }}
profiles.yaml: |
  {{- $profiles := deepCopy .root.Values.profiles }}
  {{- range $name, $profile := .values.profiles }}
  {{- $_ := set $profiles $name (deepCopy $profile) }}
  {{- end }}
  {{- range $name, $profile := $profiles }}
  {{- if $profile.gpusPerNode }}
  {{- $gpus := dict "resources" (dict "limits" (dict $.root.Values.gpu.resourceName ($profile.gpusPerNode | int))) }}
  {{- $_ := mergeOverwrite $profile $gpus }}
  {{- if and $.root.Values.gpu.runtimeClassName (not $profile.runtimeClassName) }}
  {{- $_ := set $profile "runtimeClassName" $.root.Values.gpu.runtimeClassName }}
  {{- end }}
  {{- end }}
  {{- end }}
  {{- toYaml $profiles | nindent 2 }}
{{- end }}
