#!/usr/bin/env bash
# Two machines, played by one: a fit of four ranks under two torchrun agents, each in a network, a process table and a
# host name of its own. Needs root (network namespaces).
#
#     benchmarks/two_nodes.sh end     to the end: the ensemble of three tickets
#     benchmarks/two_nodes.sh power   the second machine goes down in ticket training
#     benchmarks/two_nodes.sh cable   the network between the two is cut in ticket training
#
# PYTHON chooses the interpreter (.venv/bin/python by default), OUT where everything is left (a new directory by default).
set -euo pipefail
case "${1:-}" in end | power | cable) ;; *) sed -n '2,10s/^# \?//p' "$0"; exit 2 ;; esac
cd "$(dirname "$0")/.."
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
tag=eb$$
damage=null; [ "$1" = end ] || damage='"of the machine"'
scenario='{"moment": "none", "rank": null, "damage": '$damage', "launcher": "torchrun", "nodes": 2,
           "assignment": [[0], [1], [2, 3]]}'

clean_up() {
    kill -KILL ${agents[@]:-} 2>/dev/null || true  # each is the parent of its machine's process table
    wait 2>/dev/null || true
    ip netns del "${tag}a" 2>/dev/null || true
    ip netns del "${tag}b" 2>/dev/null || true
}
trap clean_up EXIT

ip netns add "${tag}a"
ip netns add "${tag}b"
ip link add "${tag}v" netns "${tag}a" type veth peer name "${tag}v" netns "${tag}b"
for node in a:1 b:2; do
    ip -n "$tag${node%:*}" addr add "10.77.0.${node#*:}/24" dev "${tag}v"
    ip -n "$tag${node%:*}" link set "${tag}v" up
    ip -n "$tag${node%:*}" link set lo up
done

# The command of node 0 is the one that users type on every node. `is_host` stands for the host name by which a machine
# finds out that it is meant by --rdzv-endpoint, --local-addr for the address that such a name leads to.
agents=()
for number in 0 1; do
    node=$([ $number = 0 ] && echo a || echo b)
    GLOO_SOCKET_IFNAME="${tag}v" OMP_NUM_THREADS=1 PYTHONPATH=$PWD ip netns exec "$tag$node" \
        unshare --uts --pid --fork --kill-child --mount-proc bash -c 'hostname "$0"; "$@"' "node$number" \
        "${PYTHON:-.venv/bin/python}" -m torch.distributed.run --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d \
        --rdzv-endpoint=10.77.0.1:29500 --rdzv-id=tickets --rdzv-conf=is_host=$((1 - number)) \
        --local-addr=10.77.0.$((number + 1)) benchmarks/faults.py --rank "$out" "$scenario" \
        >"$out/node$number.log" 2>&1 &
    agents+=($!)
done

if [ "$1" != end ]; then
    for _ in $(seq 300); do
        [ -e "$out/checkpoints/ticket_2/last.ckpt" ] && [ -e "$out/checkpoints/ticket_0/last.ckpt" ] && break
        sleep 0.2
    done
    sleep 3
    case "$1" in
        power) kill -KILL "${agents[1]}" ;;
        cable) ip -n "${tag}b" link set "${tag}v" down ;;
    esac
    SECONDS=0
    # The ranks, not the agents: torchrun's own agent may look for the other for minutes where the cable is cut.
    while pgrep -f "python[^ ]* -u benchmarks/faults.py --rank $out" >/dev/null && [ $SECONDS -lt 90 ]; do
        sleep 0.2
    done
    echo "seconds until no rank is left: $SECONDS"
else
    code=0
    wait "${agents[0]}" || code=$?
    echo "exit code of node 0: $code"
fi
for rank in 0 1 2 3; do
    grep -h -A6 -e "who trains what" "$out/stderr_$rank" | head -6 || true
    grep -h -e "^MultiTicketStrategy: rank" -e "the state at step" "$out/stderr_$rank" | sed "s,$out/,,; s/^/[rank $rank] /" || true
done
(cd "$out" && find tickets -maxdepth 2 -type d -o -name '*.ckpt' | sort)
