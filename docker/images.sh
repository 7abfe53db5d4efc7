#!/usr/bin/env bash
# Build the images with docker, podman or buildah, whichever there is.
#
#   docker/images.sh [control] [worker] [llama]        default: all three
#
#   BUILDER         docker, podman or buildah
#   IMAGE_REGISTRY  before the names: registry.example.org/team
#   IMAGE_TAG       default: the version in pyproject.toml
#   BUILD_ARGS      more arguments of the builder: "--build-arg TORCH_INDEX_URL=..."
#   PIP_CONF, CA    files for pip in the build: its configuration, a CA bundle
#   WHEELS          directory of packages to take before the index's
#   LLAMA_CACHE     what docker/build_llama.py keeps; default: its directory on this machine
set -euo pipefail
cd "$(dirname "$0")/.."

works() {
  case $1 in
    docker) docker info > /dev/null 2>&1 ;;
    *) command -v "$1" > /dev/null 2>&1 ;;
  esac
}
builder=${BUILDER:-}
if [ -z "$builder" ]; then
  for candidate in docker podman buildah; do
    if works "$candidate"; then builder=$candidate && break; fi
  done
elif ! works "$builder"; then
  echo "BUILDER=$builder does not work here (docker needs its daemon)" >&2
  exit 1
fi
if [ -z "$builder" ]; then
  echo "Images need docker (with its daemon), podman or buildah; none of them works here." >&2
  echo "Debian, Ubuntu: apt-get install buildah" >&2
  exit 1
fi

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
revision=$(git rev-parse --short=12 HEAD 2> /dev/null || true)
tag=${IMAGE_TAG:-$version}
prefix=${IMAGE_REGISTRY:+$IMAGE_REGISTRY/}
llama_version=$(sed -n 's/^LLAMA_CPP_PYTHON := //p' Makefile)
cache=${LLAMA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/arriero/llama}

options=(--file docker/Dockerfile)
options+=(--build-arg "VERSION=$version" --build-arg "REVISION=$revision")
options+=(--build-arg "LLAMA_CPP_PYTHON=$llama_version")
options+=(--build-arg "LLAMA_CMAKE_ARGS=${LLAMA_CMAKE_ARGS:-}")
options+=(--build-arg "TORCH_INDEX_URL=${TORCH_INDEX_URL:-}")
[ -n "${PIP_CONF:-}" ] && options+=(--secret "id=pip_conf,src=$PIP_CONF")
[ -n "${CA:-}" ] && options+=(--secret "id=ca,src=$CA")
[ -n "${WHEELS:-}" ] && options+=(--build-context "wheels=$WHEELS")
[ -d "$cache" ] && options+=(--build-context "llama-cache=$cache")
# shellcheck disable=SC2206  # several words on purpose
options+=(${BUILD_ARGS:-})

case $builder in
  docker) build=(docker build) ;;
  podman) build=(podman build --format oci --layers) ;;
  # Without a daemon, and inside of containers: no namespaces of its own.
  buildah) build=(buildah bud --format oci --layers --isolation "${BUILDAH_ISOLATION:-chroot}") ;;
esac

targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(control worker llama)
for target in "${targets[@]}"; do
  image=${prefix}arriero-$target:$tag
  echo "building $image with $builder"
  "${build[@]}" "${options[@]}" --target "$target" --tag "$image" .
done
case $builder in
  buildah) buildah images --filter "label=org.opencontainers.image.version=$version" ;;
  *) "$builder" images --filter "label=org.opencontainers.image.version=$version" ;;
esac
