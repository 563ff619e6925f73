# shellcheck shell=sh
# A slow link on one machine: two network namespaces with a host name each, joined by a veth pair whose rate is limited in both
# directions. To be sourced from the repository's root; needs root, iproute2 and Open MPI.
#
#   link_open WHO             makes it, and takes it away when the script ends. WHO begins error lines.
#   link_limit MBIT [BURST]   both directions, Mbit/s; BURST (262144): bytes that it lets through at once after a pause
#   link_run COMMAND...       two ranks by mpirun, one on each side
#   link_bytes                bytes that the first side has sent and received so far, headers included

link_open() {
    [ "$(id -u)" = 0 ] || { echo "$1: namespaces and traffic control need root" >&2; exit 1; }
    for tool in ip tc mpirun python3; do
        command -v $tool >/dev/null || { echo "$1: $tool is missing" >&2; exit 1; }
    done
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    trap link_close EXIT
    trap 'exit 130' INT TERM
    link_close
    ip netns add cadre-a
    ip netns add cadre-b
    ip link add veth-a netns cadre-a type veth peer name veth-b netns cadre-b
    ip -n cadre-a addr add 10.77.0.1/24 dev veth-a
    ip -n cadre-b addr add 10.77.0.2/24 dev veth-b
    for side in a b; do
        ip -n cadre-$side link set lo up
        ip -n cadre-$side link set veth-$side up
    done
}

link_close() {
    ip netns del cadre-a 2>/dev/null || true
    ip netns del cadre-b 2>/dev/null || true
}

link_limit() {
    for side in a b; do
        ip netns exec cadre-$side tc qdisc replace dev veth-$side root tbf rate "$1mbit" burst "${2:-262144}" latency 50ms
    done
}

link_run() {
    ip netns exec cadre-a unshare --uts sh -c 'hostname cadre-a; exec "$@"' sh \
        mpirun --mca plm_rsh_agent "$PWD/bench/link_agent" --mca plm_rsh_no_tree_spawn 1 \
        --mca btl tcp,self --mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24 \
        -H cadre-a:1,10.77.0.2:1 -n 2 --bind-to none "$@"
}

link_bytes() {
    ip netns exec cadre-a cat /sys/class/net/veth-a/statistics/tx_bytes /sys/class/net/veth-a/statistics/rx_bytes | tr '\n' ' '
}
