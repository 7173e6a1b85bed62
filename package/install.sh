#!/bin/sh
# Installs Husk from its tarball, or removes it.
#   ./install.sh [--root DIR]             copies the files
#   ./install.sh --remove [--root DIR]    removes what was copied
# Afterwards `husk install` lets containerd, Docker and CRI-O know.
set -eu
umask 022
root= remove= owner=
while [ $# -gt 0 ]; do
    case $1 in
        --root) root=${2%/}; shift ;;
        --remove) remove=1 ;;
        *) sed -n '2,5s/^# //p' "$0" >&2; exit 2 ;;
    esac
    shift
done
list=usr/share/husk/files
# Root runs these files: they are root's, whoever has unpacked them.
[ "$(id -u)" != 0 ] || owner="-o 0 -g 0"

if [ -n "$remove" ]; then
    [ -f "$root/$list" ] || { echo "install.sh: $root/$list is missing: nothing was installed by it" >&2; exit 1; }
    if [ -z "$root" ]; then
        # containerd calls the shim's program to clean up after a pod.
        pods=$(/usr/bin/husk ps) || { echo "install.sh: whether there are pods is not known: nothing is removed" >&2; exit 1; }
        pods=$(echo "$pods" | tail -n +2)
        [ -z "$pods" ] || { echo "install.sh: pods run in machines; delete them first:" >&2; echo "$pods" >&2; exit 1; }
    fi
    if [ -x "$root/usr/bin/husk" ]; then
        # The command that takes it back goes with the rest.
        "$root/usr/bin/husk" uninstall --no-restart --root "$root/" > /dev/null ||
            { echo "install.sh: the engines would keep a handler without its shim: nothing is removed" >&2; exit 1; }
    fi
    # The machines from which pods begin: some 40 MiB of memory (template_dir).
    rm -rf -- "$root/run/husk-templates"
    # Directories that are empty then go as well; those that the system has are not.
    dirs=$(while read -r file; do dirname "$file"; done < "$root/$list" | sort -ru)
    # One that was being copied when an installation was cut short is there beside it.
    while read -r file; do printf '%s\n' "$root/$file" "$root/$file.new"; done < "$root/$list" | xargs -d '\n' rm -f --
    for dir in $dirs; do
        while [ "$dir" != . ] && rmdir "$root/$dir" 2> /dev/null; do dir=$(dirname "$dir"); done
    done
    exit 0
fi

tree=$(dirname "$0")/tree
[ -d "$tree" ] || { echo "install.sh: $tree is missing" >&2; exit 1; }
ours=$(cd "$tree" && find . -type f | sed 's|^\./||' | LC_ALL=C sort)
note() { # LISTS: the files of ours that may be there, and that of these itself
    mkdir -p "$root/$(dirname "$list")"
    printf '%s\n' "$@" "$list" | sed '/^$/d' | LC_ALL=C sort -u > "$root/$list.new"
    mv -f "$root/$list.new" "$root/$list"
}
before=$(cat "$root/$list" 2> /dev/null || true)
# Before anything is copied, so that what is cut short can be removed.
note "$ours" "$before"
echo "$ours" | while read -r file; do
    mkdir -p "$root/$(dirname "$file")"
    case $file in
        # What the operator wrote stays; it names programs that root runs.
        etc/*) if [ -e "$root/$file" ]; then
            [ -z "$owner" ] || chown 0:0 "$root/$file"
            chmod go-w "$root/$file"
            continue
        fi ;;
    esac
    case $file in
        usr/bin/* | usr/libexec/*) mode=755 ;;
        *) mode=644 ;;
    esac
    # A program that runs cannot be written to, but replaced.
    # shellcheck disable=SC2086 # two words each, or none
    install -p -m "$mode" $owner "$tree/$file" "$root/$file.new"
    mv -f "$root/$file.new" "$root/$file"
done
# What only an earlier version had.
echo "$before" | while read -r file; do
    case $file in
        "" | etc/* | "$list") ;;
        *) [ -e "$tree/$file" ] || rm -f -- "$root/$file" ;;
    esac
done
note "$ours"
echo "installed; next: husk check, husk install"
