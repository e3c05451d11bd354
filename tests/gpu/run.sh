#!/usr/bin/env bash
# The checks that need a GPU, and the table for tests/benchmarks/README.md: tests/gpu/run.sh [WHEELS [OUT]]
# Needs no network; about five minutes. WHEELS: a folder with wheels of what this Python lacks.
# OUT: where table.md and the log go. PYTHON: the Python that has torch, python3 by default.
# MEASURE: arguments of measure.py, such as "--only training". TESTS=no: without the tests.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} wheels=${1:-} out=${2:-outputs/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD/scripts:$PWD/notebooks${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl || exit
  export PYTHONPATH=$site:$PYTHONPATH
fi
status=0
[ "${TESTS:-}" = no ] || {
"$python" -m pytest tests/gpu -c /dev/null --rootdir . --confcutdir tests/gpu -p no:cacheprovider -q -rA \
  2>&1 | tee "$out/tests.log" | tail -n 60
status=$?
}
"$python" tests/gpu/measure.py ${MEASURE:-} 2>"$out/measure.log" | tee "$out/table.md"
tail -n 5 "$out/measure.log"
exit $status
