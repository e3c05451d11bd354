#!/usr/bin/env bash
# The checks that need a GPU, and the tables for tests/benchmarks/README.md:
#   tests/gpu/run.sh [WHEELS [OUT]]
# Needs no network; ends within six minutes. WHEELS: a folder with wheels of what this Python lacks.
# OUT: where table.md and the logs go. PYTHON: the Python that has torch, python3 by default.
# MEASURE: arguments of measure.py, such as "--only training". TESTS=no: without the tests.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} wheels=${1:-} out=${2:-outputs/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD/scripts:$PWD/notebooks${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  pip=("$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir)
  "${pip[@]}" --target "$site" "$wheels"/*.whl || exit
  export PYTHONPATH=$site:$PYTHONPATH
fi
status=0
if [ "${TESTS:-}" != no ]; then
  pytest=("$python" -m pytest -c /dev/null --rootdir . --confcutdir tests/gpu -p no:cacheprovider)
  timeout 240 "${pytest[@]}" -q -rA --durations=0 tests/gpu/test_gpu.py >"$out/tests.log" 2>&1
  status=$?
  tail -n 60 "$out/tests.log"
  [ "$status" != 124 ] || echo "the tests did not end within 240 s: see $out/tests.log"
fi
measure=("$python" tests/gpu/measure.py --seconds $((330 - SECONDS)) ${MEASURE:-})
timeout $((355 - SECONDS)) "${measure[@]}" 2>"$out/measure.log" | tee "$out/table.md"
[ "${PIPESTATUS[0]}" = 0 ] || status=1
tail -n 5 "$out/measure.log"
exit "$status"
