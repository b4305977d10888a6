#!/usr/bin/env bash
# Make a Debian or Ubuntu machine with an NVIDIA card ready for our images: Docker with Compose, NVIDIA's
# container toolkit, our directories and our systemd units.
#
#   sudo deploy/install.sh            all of it: the job of /etc/fourstep/job.env then starts at every boot
#   sudo deploy/install.sh --engine   without job and units, for whoever starts containers in another way
#
# Run it as often as you like: what is there already is left alone, and nothing is restarted without need.
# Exit status 0: ready. Anything else: one sentence on stderr says what is missing and what to do.
#
#   DRIVER_WAIT=300   seconds to wait for the NVIDIA driver; some images build it at their first boot
#   DESTDIR=          put every file below this directory (as with `make install`)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=${DESTDIR:-}
keyrings=$root/etc/apt/keyrings
sources=$root/etc/apt/sources.list.d

# Who signs the packages: the fingerprints that the two vendors publish. A key that differs is refused, because
# everything that is installed afterwards would be trusted on its word.
docker_fingerprint=9DC858229FC7DD38854AE2D88D81803C0EBFCD88
toolkit_fingerprint=C95B321B61E88C1809C4F759DDCAE044F796ECB0

say() { printf 'install: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

# Debian, Ubuntu, or something that calls itself like one of them (ID_LIKE): the name of Docker's directory.
distribution() {
  local ids
  # shellcheck source=/dev/null
  ids=$(. "$root/etc/os-release" && printf '%s %s' "${ID:-}" "${ID_LIKE:-}")
  case " $ids " in
    *" ubuntu "*) echo ubuntu ;;
    *" debian "*) echo debian ;;
    *) fail "This system is '${ids% }'; expected Debian or Ubuntu; choose another image of your provider." ;;
  esac
}

# The release that packages are built for. Derivatives of Ubuntu name theirs in UBUNTU_CODENAME.
codename() {
  # shellcheck source=/dev/null
  (. "$root/etc/os-release" && printf '%s' "${UBUNTU_CODENAME:-${VERSION_CODENAME:?}}")
}

# At first boot the system's own updates often hold the lock of apt: wait for them, ten minutes at most.
packages() {
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 -qq "$@"
}

wait_for_driver() {
  local left=${DRIVER_WAIT:-300}
  until nvidia-smi -L >/dev/null 2>&1; do
    if [ "$left" -le 0 ]; then
      fail "No NVIDIA driver answers (nvidia-smi -L fails); choose an image of your provider that has one," \
        "or on Ubuntu run: apt-get install ubuntu-drivers-common && ubuntu-drivers install --gpgpu, and reboot."
    fi
    sleep 5
    left=$((left - 5))
  done
}

# add_repository NAME KEY_URL FINGERPRINT ENTRY: an apt source that trusts this one key.
add_repository() {
  local name=$1 url=$2 fingerprint=$3 entry=$4 key got
  key=$keyrings/$name.asc
  mkdir -p "$keyrings" "$sources"
  if [ ! -e "$key" ]; then
    curl --fail --silent --show-error --location --retry 5 --output "$key.part" "$url"
    got=$(gpg --batch --show-keys --with-colons "$key.part" | awk -F: '$1 == "fpr" { print $10; exit }')
    if [ "$got" != "$fingerprint" ]; then
      rm -f "$key.part"
      fail "The signing key of $name has the fingerprint '$got'; expected $fingerprint: not installed."
    fi
    chmod 644 "$key.part"
    mv "$key.part" "$key"
  fi
  printf '%s\n' "$entry" >"$sources/$name.list"
  packages update
}

add_docker_repository() {
  local system
  system=$(distribution)
  add_repository docker "https://download.docker.com/linux/$system/gpg" "$docker_fingerprint" \
    "deb [arch=amd64 signed-by=/etc/apt/keyrings/docker.asc] https://download.docker.com/linux/$system $(codename) stable"
}

install_docker() {
  if ! command -v docker >/dev/null; then
    say "installing Docker"
    add_docker_repository
    packages install --yes docker-ce docker-ce-cli containerd.io docker-buildx-plugin docker-compose-plugin
  elif ! docker compose version >/dev/null 2>&1; then
    # Many images have a Docker of their own, older than Compose v2: add the plugins, leave the engine alone.
    say "adding Compose to the Docker that is here"
    add_docker_repository
    packages install --yes docker-buildx-plugin docker-compose-plugin
  fi
  systemctl enable --now --quiet docker
}

install_toolkit() {
  if ! command -v nvidia-ctk >/dev/null; then
    say "installing NVIDIA's container toolkit"
    add_repository nvidia-container-toolkit https://nvidia.github.io/libnvidia-container/gpgkey \
      "$toolkit_fingerprint" \
      "deb [signed-by=/etc/apt/keyrings/nvidia-container-toolkit.asc] https://nvidia.github.io/libnvidia-container/stable/deb/amd64 /"
    packages install --yes nvidia-container-toolkit
  fi
  # Restarting Docker ends running containers, so only where the runtime is not registered yet.
  if ! docker info --format '{{json .Runtimes}}' | grep -q '"nvidia"'; then
    nvidia-ctk runtime configure --runtime=docker
    systemctl restart docker
  fi
}

# The account that owns weights and videos; containers run with its number, never as root.
make_account() {
  getent passwd fourstep >/dev/null ||
    useradd --system --user-group --home-dir /var/lib/fourstep --shell /usr/sbin/nologin fourstep
}

make_directories() {
  local state=$root/var/lib/fourstep
  mkdir -p "$state"/{weights,outputs}
  chown fourstep:fourstep "$state" "$state"/{weights,outputs}
}

make_job() {
  # The journal of earlier boots is kept only where its directory exists: a job that fails, on a machine that
  # then powers itself off, has its reason there.
  mkdir -p "$root/etc/fourstep" "$root/var/log/journal"
  if [ ! -e "$root/etc/fourstep/job.env" ]; then
    # 600: it may hold a token of the hub.
    install -m 600 "$here/job.env" "$root/etc/fourstep/job.env"
    say "$root/etc/fourstep/job.env is new: write your job there"
  fi
}

install_units() {
  local unit units=$root/etc/systemd/system
  mkdir -p "$units"
  for unit in fourstep-job.service fourstep-idle.service fourstep-idle.timer; do
    sed "s|@HERE@|$here|g" "$here/$unit" >"$units/$unit"
  done
  systemctl daemon-reload
  systemctl enable --quiet fourstep-job.service fourstep-idle.timer
}

main() {
  local mode=${1:-}
  case $mode in
    '' | --engine) ;;
    *) fail "'$mode' is no option; expected --engine or nothing." ;;
  esac
  [ "$(id -u)" = 0 ] || fail "Installing needs root; run: sudo $0"
  [ "$(uname -m)" = x86_64 ] || fail "This machine is $(uname -m); expected x86_64, which the images are built for."
  distribution >/dev/null
  packages update
  packages install --yes ca-certificates curl gpg
  wait_for_driver
  install_docker
  install_toolkit
  make_account
  make_directories
  if [ "$mode" = --engine ]; then
    say "ready to run containers"
    return
  fi
  make_job
  install_units
  say "ready; the job is in $root/etc/fourstep/job.env, and starts with: systemctl start fourstep-job"
}

main "$@"
