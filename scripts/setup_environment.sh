#!/bin/sh
# Makes the virtual environment of this checkout and installs mtnlg into it, pinned by constraints.txt.
#
#   sh scripts/setup_environment.sh VENV EXTRAS      e.g.  sh scripts/setup_environment.sh .venv plot,data
#
# Calling it again is instant while pyproject.toml and constraints.txt stay the same. A call that was
# interrupted is simply repeated: the stamp is written last.
set -eu
cd "$(dirname "$0")/.."
venv=$1
extras=$2
key=$(cat pyproject.toml constraints.txt scripts/setup_environment.sh | cksum)-${TORCH_INDEX_URL:-default}
stamp="$venv/mtnlg-$(echo "$extras" | tr ',' '-').stamp"
if [ -x "$venv/bin/mtnlg" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
    exit 0
fi

find_python() {
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3" >&2
    exit 2
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "setup: making $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv" || {
        echo "error: no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    }
fi

install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$@"
}
# torch first: it is the largest, and it alone may come from an index of its own.
if ! "$venv/bin/python" -c 'import torch' >/dev/null 2>&1; then
    echo "setup: installing torch (the largest part)"
    install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
fi
echo "setup: installing mtnlg[$extras]"
install setuptools
install --no-build-isolation --editable ".[$extras]"
echo "$key" >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "setup: ready"
