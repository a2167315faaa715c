#!/usr/bin/env bash
# Runs the tests; further arguments go to pytest. Sets up an environment first if there is none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$("${PYTHON:-python3}" scripts/environment.py test)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m pytest tests "$@"
