#!/usr/bin/env bash
# Test the oldest supported versions: every direct dependency at its lower bound, in a venv of its own.
#
#   scripts/test_oldest.sh                                  # core, the oldest supported Python
#   PYTHON=3.12 scripts/test_oldest.sh rlo-core tests/core  # a package, a Python, its tests
#
# PYTHON is a version or the path of an interpreter; UV is the uv to use.
set -euo pipefail
cd "$(dirname "$0")/.."
package="${1:-rlo-core}"
tests="${2:-tests/core}"
python="${PYTHON:-3.10}"
uv="${UV:-.venv/bin/uv}"
venv=".venv-oldest"

"$uv" venv --quiet --clear --python "$python" "$venv"
packages=(-e "packages/rlo-core[all]")
if [ "$package" != rlo-core ]; then
  packages+=(-e "packages/$package")
fi
"$uv" pip install --quiet --python "$venv/bin/python" --resolution lowest-direct \
  "${packages[@]}" "pytest>=8.2" "hypothesis>=6.100" "expecttest>=0.2"
"$uv" pip freeze --quiet --python "$venv/bin/python" \
  | grep -iE '^(torch|numpy|click|packaging|matplotlib|scikit-learn|rich|jinja2|torchmetrics|datasets)=='
"$venv/bin/python" --version
# Old releases meet new versions of what they depend on themselves, and warn of it.
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q -p no:cacheprovider \
  -W ignore::DeprecationWarning -W ignore::FutureWarning "$tests"
