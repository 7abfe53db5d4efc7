#!/usr/bin/env bash
# Do in each image what it is for: docker/smoke.sh [control] [worker] [llama]
#
#   BUILDER, IMAGE_REGISTRY, IMAGE_TAG   as docker/images.sh; RUNTIME_ARGS: more of `run`
set -euo pipefail
cd "$(dirname "$0")/.."
runner=${BUILDER:-}
if [ -z "$runner" ] || [ "$runner" = buildah ]; then
  if docker info > /dev/null 2>&1; then runner=docker; else runner=podman; fi
fi
command -v "$runner" > /dev/null || { echo "Running images needs docker or podman." >&2 && exit 1; }
tag=${IMAGE_TAG:-$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)}
prefix=${IMAGE_REGISTRY:+$IMAGE_REGISTRY/}
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(control worker llama)
for target in "${targets[@]}"; do
  # shellcheck disable=SC2086  # several words on purpose
  "$runner" run --rm --read-only --tmpfs /tmp:rw,size=4g --network none --cap-drop ALL \
    --security-opt no-new-privileges ${RUNTIME_ARGS:-} \
    --volume "$PWD/docker/smoke.py:/smoke.py:ro" \
    "${prefix}arriero-$target:$tag" python /smoke.py "$target"
done
