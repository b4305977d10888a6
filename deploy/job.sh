#!/usr/bin/env bash
# The job of /etc/fourstep/job.env, in the container, as fourstep-job.service runs it.
#
#   job.sh prepare   image, weights and a look at the machine; what is there already costs seconds and no network
#   job.sh run       make the video, or go on with one that was interrupted; exits as `t2v` does
#   job.sh stop      ask the running job to leave; it keeps what is done
#
# A job that is done is not done again at the next boot: .fourstep-done among the outputs names it. Other T2V_
# settings are another job; for the same one once more, remove that file. Both directories may lie on a network
# disk, which then brings an interrupted job to another machine. Containers run as their owners.
#
#   FOURSTEP_WEIGHTS=/var/lib/fourstep/weights     TAG=       cu124 or cu128; empty: by the driver
#   FOURSTEP_OUTPUTS=/var/lib/fourstep/outputs     DESTDIR=   put every other file below this directory
set -euo pipefail

root=${DESTDIR:-}
weights=${FOURSTEP_WEIGHTS:-$root/var/lib/fourstep/weights}
outputs=${FOURSTEP_OUTPUTS:-$root/var/lib/fourstep/outputs}
started=$outputs/.fourstep-started
finished=$outputs/.fourstep-done
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
container=fourstep-job

say() { printf 'job: %s\n' "$*" >&2; }
fail() { say "$2"; exit "$1"; }

# cu128 needs the driver that CUDA 12.8 came with; an older one runs cu124.
image_tag() {
  local driver
  if [ -n "${TAG:-}" ]; then
    echo "$TAG"
    return
  fi
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader) ||
    fail 5 "No NVIDIA driver answers (nvidia-smi fails); reboot, or install one and reboot."
  if [ "${driver%%.*}" -ge 570 ]; then echo cu128; else echo cu124; fi
}

# as_owner_of DIRECTORY ...: Compose with the variables that compose.yaml takes. `env`, because bash's own UID
# cannot be set.
as_owner_of() {
  local owner
  owner=$(stat --format %u:%g "$1")
  shift
  env TAG="$tag" UID="${owner%:*}" GID="${owner#*:}" WEIGHTS="$weights" OUTPUTS="$outputs" \
    docker compose --project-directory "$repository" --file "$repository/compose.yaml" "$@"
}

# What makes this job another one than the last: every setting of the program, in any order.
fingerprint() { env -0 | { grep -z '^T2V_' || true; } | sort -z | sha256sum | cut -d ' ' -f 1; }

is_done() { [ "$(cat "$finished" 2>/dev/null || true)" = "$(fingerprint)" ]; }

get_image() {
  local published=${FOURSTEP_IMAGE:-}
  if [ -n "$published" ]; then
    # Once it is here it stays: a tag that moved since does not change a machine behind its owner's back.
    docker image inspect "$published" >/dev/null 2>&1 || docker pull --quiet "$published"
    docker tag "$published" "fourstep:$tag"
  elif ! docker image inspect "fourstep:$tag" >/dev/null 2>&1; then
    say "building fourstep:$tag, because FOURSTEP_IMAGE is empty"
    as_owner_of "$outputs" build --build-arg "SAGE=${FOURSTEP_SAGE:-off}" t2v
  fi
}

prepare() {
  if is_done; then
    say "this job is done; its video is in $outputs"
    return
  fi
  # From here on the machine works, so it may be powered off afterwards (idle.sh), however this ends.
  mkdir -p "$root/run/fourstep"
  touch "$root/run/fourstep/worked"
  tag=$(image_tag)
  get_image
  as_owner_of "$weights" run --rm -T pull
  as_owner_of "$outputs" run --rm -T doctor
}

# The run file that this job left behind when it was interrupted, as a path in the container; nothing if none.
interrupted() {
  if [ -e "$started" ] && [ "$(cat "$started")" = "$(fingerprint)" ]; then
    find "$outputs" -name '*.run.safetensors' -newer "$started" -printf '%T@ /outputs/%P\n' |
      sort -n | tail -n 1 | cut -d ' ' -f 2-
  fi
}

run() {
  local left arguments=()
  if is_done; then
    return
  fi
  tag=$(image_tag)
  left=$(interrupted)
  if [ -n "$left" ]; then
    say "going on with $left"
    arguments=(resume "$left")
  else
    fingerprint >"$started"
  fi
  remove_container # power was cut: it is still there, and holds the name
  as_owner_of "$outputs" run --rm -T --name "$container" t2v "${arguments[@]}"
  fingerprint >"$finished"
  say "done; the video is in $outputs"
}

# Not there is the usual case, and what is asked for.
remove_container() { docker rm --force "$container" >/dev/null 2>&1 || true; }
stop_container() { docker stop --time 30 "$container" >/dev/null 2>&1 || true; }

case ${1:-} in
  prepare) prepare ;;
  run) run ;;
  stop) stop_container ;;
  *) fail 2 "'${1:-}' is none of prepare, run and stop." ;;
esac
