#!/bin/sh
# What every image has below its environment: Python, tini, certificates, the user.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# libgomp1: torch and scikit-build wheels; the rest is Python's own.
apt-get install -y -qq --no-install-recommends ca-certificates libgomp1 libstdc++6 python3 tini
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/debconf /var/log/apt /var/log/dpkg.log /tmp/prepare.sh
python3 - << 'P'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"this base has Python {sys.version.split()[0]}; expected 3.11 or newer")
P
groupadd --gid 10001 arriero
useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin arriero
# Mounted in earnest; here so that an image runs alone.
install -d -o 10001 -g 10001 -m 0750 /var/lib/arriero /store
