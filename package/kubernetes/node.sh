#!/bin/sh
# What the containers of the DaemonSets run, on the node whose root is at $HUSK_NODE.
#   node.sh install   copies the files and lets the engines know Husk, then waits
#   node.sh remove    waits until no pod runs in a machine, takes all back, then waits
# A second run finds nothing to do. An upgrade replaces files: running pods keep theirs.
set -eu
node=${HUSK_NODE:-/host}
# How a program of the node is run, in the node's own mounts.
enter=${HUSK_ENTER:-nsenter --target 1 --mount --}
tarball=${HUSK_TARBALL:-/husk}
done=${HUSK_DONE:-/run/husk-done}
pause=${HUSK_PAUSE:-5}

husk() {
    # shellcheck disable=SC2086 # several words
    $enter /usr/bin/husk "$@"
}
is_installed() { [ -f "$node/usr/share/husk/files" ]; }
# What cannot be found out ends this script, and with it the container.
has_pods() {
    pods=$(husk --json ps) || { echo "whether there are pods is not known: nothing is removed" >&2; exit 1; }
    [ "$pods" != "[]" ]
}
wait_for_pods() {
    while has_pods; do
        echo "waiting for pods in machines to end"
        sleep "$pause"
    done
}

rm -f "$done"
case ${1-} in
    install)
        "$tarball/install.sh" --root "$node"
        # Its findings are for the log: pods say themselves what they lack.
        husk check || true
        husk install --yes
        ;;
    remove)
        if is_installed; then
            wait_for_pods
            husk uninstall --yes
            # One that came meanwhile needs the handler to its end.
            while has_pods; do
                husk install --yes
                wait_for_pods
                husk uninstall --yes
            done
            "$tarball/install.sh" --remove --root "$node"
        fi
        ;;
    *) sed -n '2,5s/^# //p' "$0" >&2; exit 2 ;;
esac
touch "$done"
echo "done: $1"
[ -n "${HUSK_ONCE-}" ] || { trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done; }
