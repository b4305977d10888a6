#!/usr/bin/env bash
# settle.sh MARK: give one date to everything that was written after MARK, and remove MARK.
#
# For the end of a build step: equal inputs then make an equal layer, whenever it is built. Older files are left
# alone, because touching one would copy it into this layer.
set -euo pipefail

[ $# -eq 1 ] && [ -e "$1" ] || { echo "usage: settle.sh MARK (a file made when the step began)" >&2; exit 2; }
mark=$1
date=@315532800 # 1980-01-01, the first moment that a zip file can hold

find / -xdev -newer "$mark" -not -path '/proc*' -not -path '/sys*' -not -path '/dev*' -exec touch -h -d "$date" {} +
rm "$mark"
touch -d "$date" "$(dirname "$mark")"
