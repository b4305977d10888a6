#!/usr/bin/env bash
# source.sh URL COMMIT [SHA256]: the source of URL at COMMIT, into the current (empty) directory.
#
# git addresses content by hash, so what was fetched is what the commit names. The digest of the archive is printed
# for the publishing job to record, and compared where one is given.
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: source.sh URL COMMIT [SHA256]" >&2; exit 2; }
url=$1 commit=$2 expected=${3:-}
[[ $commit =~ ^[0-9a-f]{40}$ ]] || { echo "source.sh: $commit is no full commit; expected 40 hex digits" >&2; exit 2; }

git init --quiet .
git fetch --quiet --depth 1 "$url" "$commit"
git -c advice.detachedHead=false checkout --quiet FETCH_HEAD
found=$(git rev-parse HEAD)
[ "$found" = "$commit" ] || { echo "source.sh: $url gave commit $found; expected $commit" >&2; exit 1; }

digest=$(git archive --format=tar HEAD | sha256sum | cut -d' ' -f1)
echo "source $url $commit sha256:$digest"
if [ -n "$expected" ] && [ "$digest" != "$expected" ]; then
  echo "source.sh: the archive of $commit has sha256 $digest; expected $expected" >&2
  exit 1
fi
