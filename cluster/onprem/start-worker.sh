#!/usr/bin/env bash
# Starts Ray on a host with the labels of its group.
#
#   start-worker.sh HOSTS HEAD:PORT [further options of `ray start`]
#
# HOSTS is a table of address, group and spot (cluster/onprem/hosts). The host is the one with one of this machine's
# addresses; M2MKD_HOST_IP says which where that is not clear.
set -euo pipefail

if [[ $# -lt 2 ]]; then
    echo "start-worker.sh: expected HOSTS HEAD:PORT, found: $*" >&2
    exit 2
fi
hosts=$1
head=$2
shift 2

found=""
for ip in ${M2MKD_HOST_IP:-$(hostname -I)}; do
    found=$(awk -v ip="$ip" '$1 == ip {print $2, $3; exit}' "$hosts")
    if [[ -n $found ]]; then
        break
    fi
done
read -r group spot <<< "$found" || true
if [[ ! $group =~ ^(cpu|incubate|finetune)$ || ! $spot =~ ^(true|false)$ ]]; then
    echo "start-worker.sh: $hosts has no line 'ADDRESS cpu|incubate|finetune true|false' for this host" \
        "(${M2MKD_HOST_IP:-$(hostname -I)}), found: '$found'. Add it." >&2
    exit 1
fi

market=on-demand
if [[ $spot == true ]]; then
    market=spot
fi
# Ray makes `ray.io/market-type` of it, which the planner reads.
export RAY_NODE_MARKET_TYPE=$market
exec ray start --address="$head" --object-manager-port=8076 --metrics-export-port=8080 \
    --labels="m2mkd.node-group=$group,m2mkd.spot=$spot" "$@"
