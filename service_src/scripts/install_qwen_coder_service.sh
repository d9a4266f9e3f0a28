#!/usr/bin/env bash
# Install or update the service on one host of an inventory: playbooks/site.yml, limited to it.
#   install_qwen_coder_service.sh [-i INVENTORY] HOST [OPTION OF ansible-playbook...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
inventory=inventories/lab

usage() { echo "usage: ${0##*/} [-i INVENTORY] HOST [OPTION OF ansible-playbook...]" >&2; exit 2; }
die() { echo "error: $*" >&2; exit 1; }

if [ "${1-}" = -i ]; then inventory=${2-}; shift 2 || usage; fi
host=${1-}
case $host in '' | -*) usage ;; esac
shift
[ -e "$inventory" ] || die "INVENTORY is '$inventory', which does not exist; set it to a folder of inventories/, for example inventories/lab."

make -s .venv/.complete
PATH=$PWD/.venv/bin:$PATH
# the control machine takes part: it checks the inventory, signs and builds
nodes=$(ansible -i "$inventory" qwen_nodes --list-hosts | tail -n +2 | xargs)
case " $nodes " in *" $host "*) ;; *) die "HOST is '$host', which is no host of group qwen_nodes; set it to one of: $nodes." ;; esac
exec ansible-playbook -i "$inventory" playbooks/site.yml --limit "$host,localhost" "$@"
