#!/usr/bin/env bash
# What must be on the machine before anything is installed. Prints the interpreter to use on stdout; every missing
# thing is one line on stderr, all of them at once, and then the exit status is 1.
set -euo pipefail

venv=${1:?usage: prerequisites.sh VENV}
install_gb=10 # the CUDA build of torch and its libraries take most of it; with the CPU build 2 GB are used
run_gb=1
missing=0
complain() {
    echo "missing: $*" >&2
    missing=1
}

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'
python=""
if [ -n "${PYTHON:-}" ]; then
    if "$PYTHON" -c "$supported" >/dev/null 2>&1; then
        python=$PYTHON
    else
        complain "PYTHON=$PYTHON does not run as Python 3.11 or 3.12; name one that does: make ... PYTHON=python3.12"
    fi
else
    for candidate in python3 python3.12 python3.11; do
        if "$candidate" -c "$supported" >/dev/null 2>&1; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || complain "Python 3.11 or 3.12 (python3, python3.12, python3.11 were tried): install it, or make ... PYTHON=/path/to/it"
fi

if [ -n "$python" ]; then
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        complain "the venv module of $python (Debian: apt install python3-venv)"
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        complain "Python.h of $python, with which DeepSpeed compiles its collectives (Debian: apt install python3-dev)"
fi

compiler=${CXX:-c++}
echo '#include <atomic>' | "$compiler" -std=c++17 -x c++ -fsyntax-only - >/dev/null 2>&1 ||
    complain "a C++17 compiler: '$compiler' does not run (Debian: apt install g++, or set CXX)"

need_gb=$install_gb
[ -e "$venv/.stamp" ] && need_gb=$run_gb
free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
[ "$free_kb" -ge $((need_gb * 1024 * 1024)) ] ||
    complain "free disk: $need_gb GB wanted in $PWD, $((free_kb / 1024 / 1024)) GB there; free some, or clone elsewhere"

[ "$missing" -eq 0 ] || exit 1
echo "$python"
