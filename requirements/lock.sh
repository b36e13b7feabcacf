#!/usr/bin/env bash
# Resolve the ranges of setup.py anew, in a scratch environment, and write requirements/lock.txt.
set -euo pipefail

scratch=build/lock
python=$(bash requirements/prerequisites.sh "$scratch")
"$python" -m venv --clear "$scratch"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$scratch/bin/python" -m pip install -qq ".[dev]"
{
    echo "# Made by 'make lock'; used as constraints: pip install -c requirements/lock.txt -e '.[dev]'"
    # Without local labels: torch==2.13.0 fits the CPU and the CUDA builds alike. Without what torch pins by itself.
    "$scratch/bin/python" -m pip freeze --all |
        sed -E 's/(==[^+]+)\+.*$/\1/' |
        grep -viE '^(maskclip|pip|wheel|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)( @|==)'
} >requirements/lock.txt
rm -rf "$scratch"
echo "requirements/lock.txt: $(grep -c == requirements/lock.txt) packages; now run make test"
