{{/* What endpoints are made from: endpoint.yaml (the platform adds name, labels, replicas and the model) and autoscaling.yaml. Takes the root. */}}
{{- define "arriero.platform" -}}
{{- $v := .Values.endpoints -}}
{{- $part := dict "root" . "component" "inference" "values" $v "role" "replica" "store" "ro" "class" "llama" "drainSeconds" $v.drainSeconds "managedBy" "arriero" -}}
{{- $fetch := merge (dict "role" "fetch" "cache" "/model/.cache") $part -}}
{{- $gpu := gt ($v.gpus | int) 0 -}}
endpoint.yaml: |
  apiVersion: apps/v1
  kind: Deployment
  metadata:
    labels:
      {{- include "arriero.labels" $part | nindent 6 }}
    {{- with .Values.commonAnnotations }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    revisionHistoryLimit: 3
    progressDeadlineSeconds: {{ add $v.startupSeconds 600 }}
    strategy:
      type: RollingUpdate
      rollingUpdate: {maxUnavailable: 0, maxSurge: 1}
    template:
      metadata:
        labels:
          {{- include "arriero.labels" $part | nindent 10 }}
          {{- with $v.podLabels }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        annotations:
          kubectl.kubernetes.io/default-container: main
          {{- with $v.podAnnotations }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
      spec:
        {{- include "arriero.pod" (dict "root" . "account" (printf "%s-inference" (include "arriero.fullname" .))) | nindent 8 }}
        {{- include "arriero.scheduling" (dict "values" $v "runtimeClass" (ternary .Values.gpu.runtimeClassName "" $gpu)) | nindent 8 }}
        {{- include "arriero.spread" (dict "values" $v "selector" (include "arriero.selector" $part) "keys" "arriero.dev/endpoint") | nindent 8 }}
        # preStop, then running answers, then what is left.
        terminationGracePeriodSeconds: {{ add 5 $v.drainSeconds 10 }}
        {{- if eq .Values.store.kind "s3" }}
        initContainers:
          # The orchestrator says which artifacts; the replica itself has no access to the bucket.
          - name: model
            {{- include "arriero.container" $part | nindent 12 }}
            args: [python, -m, arriero.inference.delivery]
            env:
              {{- include "arriero.env" $fetch | nindent 14 }}
              - {name: ARRIERO_DELIVERY, value: /model}
              {{- with $v.env }}
              {{- toYaml . | nindent 14 }}
              {{- end }}
            {{- with include "arriero.envFrom" $part | trim }}
            envFrom:
              {{- . | nindent 14 }}
            {{- end }}
            resources:
              {{- toYaml $v.fetchResources | nindent 14 }}
            volumeMounts:
              - {name: tmp, mountPath: /tmp}
              - {name: model, mountPath: /model}
              {{- with $v.volumeMounts }}
              {{- toYaml . | nindent 14 }}
              {{- end }}
        {{- end }}
        containers:
          - name: main
            {{- include "arriero.container" $part | nindent 12 }}
            args: [python, -m, arriero.inference]
            env:
              {{- include "arriero.env" $part | nindent 14 }}
              - {name: ARRIERO_METRICS_LISTEN, value: {{ printf "%s:9090" .Values.listenAddress | quote }}}
              {{- with $v.env }}
              {{- toYaml . | nindent 14 }}
              {{- end }}
            {{- with include "arriero.envFrom" $part | trim }}
            envFrom:
              {{- . | nindent 14 }}
            {{- end }}
            ports:
              - {name: grpc, containerPort: 50051}
              - {name: health, containerPort: 50052}
              - {name: metrics, containerPort: 9090}
            {{- include "arriero.probes" (dict "startup" "ready" "startupSeconds" $v.startupSeconds) | nindent 12 }}
            lifecycle:
              # Clients learn that the replica leaves while it still answers.
              preStop: {sleep: {seconds: 5}}
            resources:
              {{- $resources := deepCopy $v.resources }}
              {{- if $gpu }}
              {{- $resources = merge (dict "limits" (dict .Values.gpu.resourceName ($v.gpus | int))) $resources }}
              {{- end }}
              {{- toYaml $resources | nindent 14 }}
            volumeMounts:
              {{- include "arriero.mounts" $part | nindent 14 }}
        volumes:
          {{- include "arriero.volumes" $part | nindent 10 }}
autoscaling.yaml: |
  {{- toYaml $v.autoscaling | nindent 2 }}
{{- end }}
