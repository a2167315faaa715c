#!/usr/bin/env bash
# Runs the tests: all of them in two processes, or, with arguments, pytest with these. Sets up an environment first if
# there is none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$("${PYTHON:-python3}" scripts/environment.py test)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ $# -eq 0 ] && [ "$(nproc)" -gt 1 ]; then
    # in the order of their folders: the files with the longest tests come first, and the workers end together
    set -- -n 2 --dist loadfile --no-loadscope-reorder
fi
exec "$PYTHON" -m pytest "$@"
