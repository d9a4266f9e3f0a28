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

# jobs, the given number of them at a time, in this order. What fails does not stop the others; summary says it.
failed=""
jobs_at_a_time() {
  local number=$1
  shift
  if [ -z "$failed" ]; then
    failed=$(mktemp -d)
    trap 'rm -rf "$failed"' EXIT
  fi
  if [ "$number" -eq 1 ]; then phase "$*"; else phase "$number at a time, each prints when it has ended: $*"; fi
  printf '%s\n' "$@" | FAILED=$failed LIVE=$([ "$number" -gt 1 ] || echo 1) xargs -P "$number" -n 1 --process-slot-var=LANE scripts/job ||
    [ -n "$(ls "$failed")" ] || say "a job of these was killed, and no other was begun: $*" >"$failed/killed"
}

# a job in the background that yields to everything else; wait for it
idle_job() {
  say "$1: beside what follows, with the processor time that it leaves"
  FAILED=$failed chrt --idle 0 scripts/job "$1" &
}

# why a job failed, in few lines, for a log of which only the end is seen: pytest's summary, ansible's errors, or else the last lines
why() {
  local lines
  lines=$(sed 's/\x1b\[[0-9;]*m//g; s/^ *│ //' "$1" |
    grep -E -A 3 '^(FAILED|ERROR) |^E  |^\[ERROR\]|^fatal: |FAILED! =>|UNREACHABLE! =>' | grep -v '^--$' | cut -c 1-300 | tail -60) || true
  printf '%s\n' "${lines:-$(tail -15 "$1")}"
}

# what took how long, and what failed
summary() {
  local file
  end_phase
  printf '\n'
  printf '%s\n' "${phases[@]}"
  printf '%6ss  in all\n' "$SECONDS"
  [ -n "$failed" ] && [ -n "$(ls "$failed")" ] || return 0
  for file in "$failed"/*; do
    printf '\nFAILED: %s\n' "${file##*/}"
    why "$file"
  done
  die "failed: $(ls -C -w 1000 "$failed")"
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
