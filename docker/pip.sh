#!/bin/sh
# One step of a build, in the environment /opt/arriero:
#   pip.sh torch REQUIREMENT INDEX_URL
#   pip.sh requirements EXTRA...     what the extras need, at the pinned versions
#   pip.sh project                   the code, then nothing that only a build needs
#   pip.sh llama VERSION             wheel and converter of llama.cpp, to /out
set -eu
[ -f /run/secrets/pip_conf ] && export PIP_CONFIG_FILE=/run/secrets/pip_conf
[ -f /run/secrets/ca ] && export PIP_CERT=/run/secrets/ca SSL_CERT_FILE=/run/secrets/ca
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# Packages that were handed in come first.
if ls /wheels/*.whl > /dev/null 2>&1; then
  export PIP_FIND_LINKS="/wheels ${PIP_FIND_LINKS:-}"
fi

environment() {
  [ -x /opt/arriero/bin/python ] && return
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv
  python3 -m venv /opt/arriero
  pip install --quiet --upgrade pip "setuptools>=77"
}

pip() { /opt/arriero/bin/python -m pip "$@"; }

step=$1
shift
environment
case $step in
  torch)
    pip install --quiet ${2:+--index-url "$2"} "$1"
    ;;
  requirements)
    python3 requirements.py "$@" > /tmp/requirements.txt
    pip install --quiet --constraint constraints.txt --requirement /tmp/requirements.txt
    ;;
  project)
    pip install --quiet --no-deps --no-build-isolation .
    pip check
    pip uninstall --quiet --yes setuptools wheel pip 2> /dev/null || true
    # Headers, static libraries and tests of packages: nothing compiles here.
    site=$(/opt/arriero/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    rm -rf "$site"/torch/include "$site"/torch/share/cmake "$site"/torch/test
    # Kernels for GPUs beside a torch that knows none.
    if grep -qs '^cuda.*= None' "$site"/torch/version.py; then
      rm -f "$site"/bitsandbytes/libbitsandbytes_cuda*.so
    fi
    # The asyncio half of the Kubernetes client, which nothing here uses.
    rm -rf "$site"/kubernetes/aio
    find "$site" -name '*.a' -delete
    ;;
  llama)
    export XDG_CACHE_HOME=/out/cache
    mkdir -p /out/cache/arriero/llama
    cp -R /llama-cache/. /out/cache/arriero/llama/ 2> /dev/null || true
    python3 docker/build_llama.py --python /opt/arriero/bin/python --version "$1" --keep /out/wheel
    cp -R /opt/arriero/share/arriero/llama.cpp /out/converter
    rm -rf /out/cache
    ;;
esac
