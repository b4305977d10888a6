#!/usr/bin/env bash
# Power the machine off when it has nothing more to do. fourstep-idle.timer calls this once a minute.
#
#   FOURSTEP_SHUTDOWN=never       (default) do nothing
#   FOURSTEP_SHUTDOWN=after-job   once the job that ran since boot has ended, well or badly
#   FOURSTEP_SHUTDOWN=idle        after FOURSTEP_IDLE_MINUTES (15) in which no job ran, nobody was logged in and no
#                                 process used the GPU
#
# Both announce it two minutes ahead; `shutdown -c` cancels, and logging in holds `idle` off altogether.
# A machine that is off by itself goes on costing its disk, and at some providers more: docs/cloud.md.
set -euo pipefail

root=${DESTDIR:-}                            # as with `make install`
run=$root/run/fourstep                       # lost at reboot, which is the point of both files in it
scheduled=$root/run/systemd/shutdown/scheduled # there while a shutdown is waiting
mode=${FOURSTEP_SHUTDOWN:-never}
minutes=${FOURSTEP_IDLE_MINUTES:-15}

fail() { printf 'idle: %s\n' "$*" >&2; exit 2; }

# A job that waits to be restarted is "activating": it has not ended.
job_ended() {
  local state
  state=$(systemctl is-active fourstep-job.service || true) # its status says the same as its word
  [ "$state" = inactive ] || [ "$state" = failed ]
}

nobody_is_here() { [ -z "$(who)" ]; }

# A GPU that cannot be asked (driver gone) is not busy: such a machine must not run, and cost, for ever. Its
# complaint comes on stdout, so only a number counts as a process.
gpu_is_free() {
  local processes
  processes=$(nvidia-smi --query-compute-apps=pid --format=csv,noheader 2>/dev/null || true)
  ! grep -q '^[0-9]' <<<"$processes"
}

power_off() {
  [ ! -e "$scheduled" ] || exit 0 # announced a minute ago
  shutdown -h +2 "Fourstep: $1; cancel with: shutdown -c"
  exit 0
}

after_job() {
  # Only a job of this boot counts. Without that, a machine that is switched on again to fetch its video would
  # go off before anyone could log in.
  if [ -e "$run/worked" ] && job_ended; then
    power_off "the job has ended"
  fi
}

when_idle() {
  local since now
  if ! { job_ended && nobody_is_here && gpu_is_free; }; then
    rm -f "$run/idle-since"
    return
  fi
  read -r now _ <"$root/proc/uptime" # not the wall clock: it may jump by years when a young machine asks the time
  now=${now%.*}
  if [ ! -e "$run/idle-since" ]; then
    mkdir -p "$run"
    printf '%s\n' "$now" >"$run/idle-since"
  fi
  read -r since <"$run/idle-since"
  if [ $((now - since)) -ge $((minutes * 60)) ]; then
    power_off "idle for $minutes minutes"
  fi
}

case $minutes in
  '' | *[!0-9]* | 0* ) fail "FOURSTEP_IDLE_MINUTES is '$minutes'; expected a whole number from 1; mend /etc/fourstep/job.env." ;;
esac
case $mode in
  never) ;;
  after-job) after_job ;;
  idle) when_idle ;;
  *) fail "FOURSTEP_SHUTDOWN is '$mode'; expected never, after-job or idle; mend /etc/fourstep/job.env." ;;
esac
