#!/usr/bin/env bash
# The demo on this machine's GPU in bf16, FP8 and INT8, from the image and as users run it; a program then looks at
# the pixels of more videos and says whether they show what was asked.
#
#   .github/gpu-smoke.sh DIRECTORY
#
# Leaves in DIRECTORY (emptied first), for each format: the video, its contact sheet, its events (.jsonl) and its
# score (.txt); version.json, doctor.json and summary.md. Every format is tried even if an earlier one failed; the
# exit status is 1 if any of them did.
#
#   TAG=cu128     which image, fourstep:TAG        PROMPTS=36    videos to score for each format
#   DEVICE=cuda:0 where to compute
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# = 1 ] || { echo "usage: .github/gpu-smoke.sh DIRECTORY" >&2; exit 2; }
out=$1
prompts=${PROMPTS:-36}
device=${DEVICE:-cuda:0}

# Fewer right videos than this are no accident: docs/demo.md has the scores that were measured.
declare -A models=([bf16]=demo [fp8]=demo-fp8 [int8]=demo-int8)
declare -A least=([bf16]=0.90 [fp8]=0.88 [int8]=0.88)

# Only what earlier runs of this script left: DIRECTORY is whatever a caller says.
mkdir -p "$out"
rm -f "$out"/{bf16,fp8,int8}.* "$out"/{version,doctor}.json "$out/summary.md"
out=$(cd "$out" && pwd)

# `env`, because bash's own UID cannot be exported; compose.yaml runs the container as these. The demo's weights
# are in the image; a directory must stand in for others, or the engine would make one for root.
compose() { env UID="$(id -u)" GID="$(id -g)" OUTPUTS="$out" WEIGHTS="$out" docker compose run --rm -T "$@"; }

compose t2v version --json >"$out/version.json"
# For whoever reads a failure; that there are no weights here is nothing that should fail the run.
compose doctor --json >"$out/doctor.json" || echo "gpu-smoke: doctor exits with $?" >&2

failed=()
{
  echo "| format | video | score |"
  echo "|---|---|---|"
} >"$out/summary.md"
for format in bf16 fp8 int8; do
  made=failed score=failed
  if compose t2v --model "${models[$format]}" --device "$device" --output "$format.mp4" --overwrite \
    --contact-sheet --json >"$out/$format.jsonl"; then
    made="$(du -k "$out/$format.mp4" | cut -f 1) kB"
  else
    failed+=("$format video")
  fi
  if compose --entrypoint python t2v -m demo.evaluate --variant "$format" --device "$device" \
    --prompts "$prompts" --at-least "${least[$format]}" >"$out/$format.txt"; then
    score=$(grep -o '^[0-9.]* s a video.*' "$out/$format.txt")
  else
    failed+=("$format score")
  fi
  echo "| $format | $made | $score |" >>"$out/summary.md"
done

cat "$out"/*.txt "$out/summary.md"
if [ ${#failed[@]} -gt 0 ]; then
  (IFS=,; echo "gpu-smoke: failed: ${failed[*]}" >&2)
  exit 1
fi
