#!/usr/bin/env bash
# The bridge /api/qwen (docs/QwenGatewayBridge.md): bring the gateways of an inventory to what it says, or show what they serve.
#   configure_qwen_gateway.sh [-i INVENTORY] [apply|show] [OPTION OF ansible-playbook...]
#   configure_qwen_gateway.sh [-i INVENTORY] add-client NAME | revoke NAME
# add-client makes a key, shows it once, and says what to write into the inventory; revoke says what to change there. Both change nothing:
# who may call is said in one place, gateway_clients, and applied from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
inventory=inventories/lab

usage() { echo "usage: ${0##*/} [-i INVENTORY] [apply|show] [OPTION OF ansible-playbook...] | add-client NAME | revoke NAME" >&2; exit 2; }
die() { echo "error: $*" >&2; exit 1; }

case ${1-} in -i | --inventory) inventory=${2-}; shift 2 || usage ;; esac
[ -e "$inventory" ] || die "INVENTORY is '$inventory', which does not exist; set it to a folder of inventories/, for example inventories/lab."
verb=apply
case ${1-} in '' | -*) ;; *) verb=$1; shift ;; esac

# the present clients' names, one a line
clients() {
  ansible -i "$inventory" 'gateways[0]' -m ansible.builtin.debug -a "msg={{ gateway_clients | map(attribute='name') | join(' ') }}" |
    sed -n 's/^ *msg: //p' | tr ' ' '\n'
}

name() {
  [ $# -eq 1 ] || usage
  [[ $1 =~ ^[A-Za-z0-9._-]{1,64}$ ]] || die "NAME is '$1'; set it to 1 to 64 letters, digits, '.', '_' or '-'."
}

make -s .venv/.complete
PATH=$PWD/.venv/bin:$PATH
case $verb in
  apply) exec ansible-playbook -i "$inventory" playbooks/gateway.yml "$@" ;;
  show) exec ansible-playbook -i "$inventory" playbooks/gateway_show.yml "$@" ;;
  add-client)
    name "$@"
    if clients | grep -qxF -- "$1"; then die "NAME is '$1', which is one of gateway_clients already; set it to another, or revoke it first."; fi
    key=$(python3 -c 'import secrets; print(secrets.token_urlsafe(32))')
    hash=$(printf %s "$key" | sha256sum | cut -d ' ' -f 1)
    echo "the key of $1, shown this once; give it to them and keep no copy:"
    echo "  $key"
    echo "add to gateway_clients in $inventory, then run: ${0##*/} -i $inventory apply"
    echo "  - {name: $1, key_sha256: $hash}"
    ;;
  revoke)
    name "$@"
    clients | grep -qxF -- "$1" || die "NAME is '$1', which is none of gateway_clients; set it to one of: $(clients | xargs)."
    echo "set in the entry of $1 in gateway_clients in $inventory, then run: ${0##*/} -i $inventory apply"
    echo "  disabled: true"
    ;;
  *) usage ;;
esac
