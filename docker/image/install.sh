#!/usr/bin/env bash
# install.sh WHEELS: put every wheel below WHEELS into the environment, make the mount points, describe the image.
#
# Runs in the last layer. The wheels of the lock are there already, and nothing here reaches a network. Byte code carries
# no date, so that equal inputs make an equal layer.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: install.sh WHEELS" >&2; exit 2; }
wheels=$1
begun=$(mktemp)

mapfile -t files < <(find "$wheels" -name '*.whl' | sort)
[ ${#files[@]} -gt 0 ] || { echo "install.sh: no wheel below $wheels; expected at least our own" >&2; exit 1; }
pip install --no-index --no-deps --no-compile "${files[@]}"
find /opt/fourstep/lib -newer "$begun" -name '*.py' | sort \
  | python -m compileall -q --invalidation-mode unchecked-hash -i -
pip check

# World-writable and sticky: a new volume takes these modes over, and any UID may then write there.
install -d -m 1777 /weights /outputs /cache

python "$(dirname "$0")/describe.py" /opt/fourstep/image.json
t2v --version

rm -rf "$begun" /tmp/*
