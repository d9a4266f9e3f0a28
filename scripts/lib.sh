# Sourced by the other scripts: phases that say what they do and how long they took.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
phases=()
phase_name=""

say() { printf '%s\n' "$*"; }

die() { printf 'error: %s\n' "$*" >&2; exit 1; }

end_phase() {
  [ -z "$phase_name" ] && return
  phases+=("$(printf '%6ss  %s' $((SECONDS - phase_start)) "$phase_name")")
  phase_name=""
}

phase() {
  end_phase
  phase_name=$1 phase_start=$SECONDS
  printf '\n== %s\n' "$1"
}

# jobs two at a time, in this order; each prints when it has ended. What failed is named at the end.
at_the_same_time() {
  phase "two at a time, each prints when it has ended: $*"
  printf '%s\n' "$@" | xargs -P 2 -n 1 --process-slot-var=LANE scripts/job || die "not everything passed: look for FAILED above"
}

summary() {
  end_phase
  printf '\n'
  printf '%s\n' "${phases[@]}"
  printf '%6ss  in all\n' "$SECONDS"
}

# install Debian packages that this machine lacks, saying so: need PURPOSE PACKAGE...
need() {
  local purpose=$1 missing=() package
  shift
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  [ "$(id -u)" -eq 0 ] || die "$purpose needs ${missing[*]}: install them as root (apt-get install ${missing[*]}) and run this again."
  say "installing ${missing[*]}: $purpose needs them"
  apt-get update -qq || say "apt-get update reported errors; going on with what is known"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# stop, and say what to do, unless an inventory's hosts answer: reach INVENTORY
reach() {
  local hint="make its hosts reachable over ssh, or name another fleet with INVENTORY=inventories/..."
  [ -e "$1" ] || die "INVENTORY is '$1', which does not exist; set it to a folder of inventories/, for example inventories/lab."
  [ "$1" != inventories/lab ] || hint="there is no lab: make deploy makes one, or name a fleet of yours with INVENTORY=inventories/..."
  ANSIBLE_TIMEOUT=5 ansible -i "$1" gateways:qwen_nodes -o -m ansible.builtin.raw -a true >/dev/null 2>&1 ||
    die "INVENTORY is '$1', and not all of its hosts answer: $hint"
}
