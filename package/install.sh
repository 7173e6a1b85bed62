#!/bin/sh
# Installs Husk from its tarball, or removes it.
#   ./install.sh [--root DIR]             copies the files
#   ./install.sh --remove [--root DIR]    removes what was copied
# Afterwards `husk install` lets containerd, Docker and CRI-O know.
set -eu
root= remove=
while [ $# -gt 0 ]; do
    case $1 in
        --root) root=${2%/}; shift ;;
        --remove) remove=1 ;;
        *) sed -n '2,5s/^# //p' "$0" >&2; exit 2 ;;
    esac
    shift
done
list=usr/share/husk/files

if [ -n "$remove" ]; then
    [ -f "$root/$list" ] || { echo "install.sh: $root/$list is missing: nothing was installed by it" >&2; exit 1; }
    if [ -z "$root" ]; then
        pods=$(husk ps 2> /dev/null | tail -n +2) || pods=
        [ -z "$pods" ] || { echo "install.sh: pods run in machines; delete them first:" >&2; echo "$pods" >&2; exit 1; }
    fi
    if [ -x "$root/usr/bin/husk" ]; then
        "$root/usr/bin/husk" uninstall --no-restart --root "$root/" > /dev/null 2>&1 || true
    fi
    # Directories that are empty then go as well; those that the system has are not.
    dirs=$(while read -r file; do dirname "$file"; done < "$root/$list" | sort -ru)
    while read -r file; do echo "$root/$file"; done < "$root/$list" | xargs -d '\n' rm -f --
    for dir in $dirs; do
        while [ "$dir" != . ] && rmdir "$root/$dir" 2> /dev/null; do dir=$(dirname "$dir"); done
    done
    exit 0
fi

tree=$(dirname "$0")/tree
[ -d "$tree" ] || { echo "install.sh: $tree is missing" >&2; exit 1; }
(cd "$tree" && find . -type f | sed 's|^\./||' | LC_ALL=C sort) | while read -r file; do
    mkdir -p "$root/$(dirname "$file")"
    case $file in
        # What the operator wrote stays.
        etc/*) [ ! -e "$root/$file" ] || continue ;;
    esac
    # A program that runs cannot be written to, but replaced.
    cp -p "$tree/$file" "$root/$file.new"
    mv -f "$root/$file.new" "$root/$file"
done
{ (cd "$tree" && find . -type f | sed 's|^\./||'); echo "$list"; } | LC_ALL=C sort > "$root/$list.new"
mv -f "$root/$list.new" "$root/$list"
echo "installed; next: husk check, husk install"
