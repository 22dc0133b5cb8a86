#!/bin/sh
# Makes the virtual environment in .venv, or brings it up to date.
#
#   scripts/make-venv.sh [EXTRA]     EXTRA: an extra of pyproject.toml, such as dev
set -eu

cd "$(dirname "$0")/.."
extra=${1:+[$1]}
python=${PYTHON:-python3}

"$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "make-venv: $python is older than 3.11 or cannot make virtual environments." >&2
    echo "Install python3.11 with python3-venv, or name one: make PYTHON=/path/to/python3" >&2
    exit 1
}
# One that was copied, or whose interpreter has gone, is of no use.
if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    rm -rf .venv
    "$python" -m venv .venv
fi
echo "make-venv: installing Tidegate into .venv"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$extra" || {
    echo "make-venv: pip failed (above). It needs a package index: the network, or PIP_INDEX_URL." >&2
    exit 1
}
