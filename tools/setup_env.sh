#!/bin/sh
# Makes the environment for the Makefile, which calls it from the root of the checkout:
#   setup_env.sh check                  fail with one line if $PYTHON cannot make an environment
#   setup_env.sh stale VENV STAMP       print a word if the finished environment VENV does not fit any more
#   setup_env.sh install VENV STAMP     make or update VENV; write STAMP last
# PYTHON: the interpreter to use. TORCH=latest: the newest releases instead of constraints.txt.
set -eu

min_minor=10

fail() {
    echo "resnet-triton: $*" >&2
    exit 1
}

version_of() { # -E -s: whatever PYTHONPATH and PYTHONHOME say; Python 2 knows these two
    "$1" -E -s -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

check_python() {
    hint="choose another one, for example: make test PYTHON=python3.11"
    command -v "$PYTHON" >/dev/null 2>&1 || fail "$PYTHON was not found; Python >= 3.$min_minor is needed; $hint"
    version=$(version_of "$PYTHON") || fail "$PYTHON does not run; Python >= 3.$min_minor is needed; $hint"
    case $version in
        3.*) [ "${version#3.}" -ge "$min_minor" ] || version="$version!" ;;
        *) version="$version!" ;;
    esac
    case $version in
        *!) fail "$PYTHON is Python ${version%!}, but Python >= 3.$min_minor is needed; $hint" ;;
    esac
    "$PYTHON" -I -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$PYTHON (Python $version) has no venv module; on Debian and Ubuntu: apt install python$version-venv; or $hint"
}

case ${1:?check, stale or install} in
    check)
        check_python
        echo "$PYTHON is Python $version: good"
        exit
        ;;
    stale)
        [ -f "$3" ] || exit 0
        if [ "$(cat "$3")" != "$(pwd -P)" ]; then
            echo moved
        elif ! version=$(version_of "$2/bin/python"); then
            echo broken
        elif [ -n "${PYTHON:-}" ] && [ "$version" != "$(version_of "$PYTHON")" ]; then
            echo python
        fi
        exit
        ;;
    install) ;;
    *) fail "unknown command $1" ;;
esac

venv=$2
stamp=$3
ours=$venv/.resnet-triton # marks an environment as made by this script; holds a word while pip runs
case ${TORCH:-} in
    '') set -- -c constraints.txt ;;
    latest) set -- --upgrade --upgrade-strategy eager ;;
    *) fail "TORCH=$TORCH is not known; leave it out for the tested versions, or say TORCH=latest" ;;
esac

check_python
have=$(version_of "$venv/bin/python" || true)
if [ -f "$ours" ] && { [ -s "$ours" ] || [ "$have" != "$version" ]; }; then
    rm -rf "$venv" # an installation that was cut short can look complete to pip: start again
elif [ -n "$have" ] && [ "$have" != "$version" ]; then
    [ "${have#3.}" -ge "$min_minor" ] 2>/dev/null || fail "$venv holds Python $have; remove it and run make again"
elif [ -d "$venv" ] && [ -z "$have" ]; then # its Python does not run
    case $venv in
        .venv*) rm -rf "$venv" ;;
        *) fail "$venv exists and is no working Python environment; remove it or choose another VENV=" ;;
    esac
fi
rm -f "$stamp"
if [ ! -x "$venv/bin/python" ]; then
    "$PYTHON" -I -m venv "$venv" || fail "$PYTHON could not make $venv; see the lines above"
    : >"$ours"
fi
"$venv/bin/python" -I -c 'import pip' 2>/dev/null || "$venv/bin/python" -I -m ensurepip >/dev/null

echo "resnet-triton: installing into $venv (PyTorch for CUDA takes about 5 GB and a few minutes the first time)"
case $(pwd -P)/$venv in
    *' '*/.venv*) echo "resnet-triton: torch.compile cannot build for the CPU below a folder whose name has a space;" \
        "its tests need VENV=/a/folder/without" ;;
esac
quiet=-q
[ ! -t 1 ] || quiet=
extra=
[ "${TORCH:-}" != latest ] || extra="torch torchvision numpy"
trap 'exit 130' INT TERM
[ ! -f "$ours" ] || echo installing >"$ours"
status=0
# shellcheck disable=SC2086  # $quiet and $extra are lists of words
"$venv/bin/python" -I -m pip install --disable-pip-version-check $quiet "$@" $extra -e ".[test,bench,dev]" || status=$?
# 128 and up: killed by a signal
[ ! -f "$ours" ] || [ "$status" -ge 128 ] || : >"$ours"
[ "$status" -eq 0 ] || fail "pip could not install the packages; see the lines above, then run make again"
pwd -P >"$stamp"
