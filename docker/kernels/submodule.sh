#!/usr/bin/env bash
# submodule.sh PATH COMMIT: check out the submodule at PATH, which the superproject must name at COMMIT.
set -euo pipefail

[ $# -eq 2 ] || { echo "usage: submodule.sh PATH COMMIT" >&2; exit 2; }
path=$1 commit=$2

named=$(git ls-tree HEAD "$path" | awk '$2 == "commit" { print $3 }')
[ "$named" = "$commit" ] || {
  echo "submodule.sh: $path is ${named:-no submodule} here; expected commit $commit" >&2
  exit 1
}
git submodule --quiet update --init --depth 1 "$path"
found=$(git -C "$path" rev-parse HEAD)
[ "$found" = "$commit" ] || { echo "submodule.sh: $path came at $found; expected $commit" >&2; exit 1; }
echo "submodule $path $found"
