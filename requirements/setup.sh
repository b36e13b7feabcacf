#!/usr/bin/env bash
# Make the virtual environment VENV with the locked packages and this project in it (editable), or do nothing when it
# is up to date: the stamp inside holds what it was made from, so a fresh checkout with older files counts as well.
set -euo pipefail

venv=${1:?usage: setup.sh VENV}
python=$(bash requirements/prerequisites.sh "$venv")
version=$("$python" -c 'import platform; print(platform.python_version())')
wanted=$({ printf '%s\n' "$version" "$PWD"; cat setup.py requirements/lock.txt; } | cksum)

if [ -e "$venv/.stamp" ] && [ "$(cat "$venv/.stamp")" = "$wanted" ]; then
    exit 0
fi

echo "== environment: Python $version in $venv (the first time this takes some minutes)"
rm -f "$venv/.stamp"
if ! "$venv/bin/python" -c "import platform, sys; sys.exit(platform.python_version() != '$version')" 2>/dev/null; then
    "$python" -m venv --clear "$venv"
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
if ! "$venv/bin/python" -m pip install -qq -c requirements/lock.txt -e ".[dev]"; then
    echo "setup: pip could not install the packages; its reason stands above. Run the same command again to go on." >&2
    exit 1
fi
printf '%s\n' "$wanted" >"$venv/.stamp"
