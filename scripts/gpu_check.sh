#!/usr/bin/env bash
# Checks and measures this source tree on a machine with a CUDA device, in under nine minutes.
#
# usage: scripts/gpu_check.sh [OUT.jsonl] [--quick]
#
# Needs Python >= 3.10 with a CUDA build of torch, triton, transformers and pytest; no network, and
# nothing is installed but what lies in wheels/ beside the tree (into a folder of its own). Every
# stage has its own time limit, and its result is a line of OUT before the next begins, so that a
# stopped run keeps what it had. Copy OUT to benchmarks/results/ as it is.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-gpu_check.jsonl}")
quick=${2:-}
python=${PYTHON:-python3}
beside=$(mktemp -d)
trap 'rm -rf "$beside"' EXIT
for package in packages/*/src; do PYTHONPATH="$PWD/$package${PYTHONPATH:+:$PYTHONPATH}"; done
export PYTHONPATH="$beside:$PYTHONPATH" HF_HUB_OFFLINE=1 TRITON_DEFAULT_FP_FUSION=1 PYTHONUNBUFFERED=1
: > "$out"

missing=()
while read -r name module; do
  "$python" -c "import $module" 2>/dev/null || missing+=("$name")
done <<'LIST'
click click
safetensors safetensors
pytest pytest
timm timm
accelerate accelerate
LIST
if [ "${#missing[@]}" -gt 0 ] && [ -d ../wheels ]; then
  "$python" -m pip install -q --no-index --no-deps --find-links ../wheels --target "$beside" \
    "${missing[@]}" || echo "gpu_check: not all of ${missing[*]} are in ../wheels" >&2
fi

stage() { # name, seconds, command...
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  echo "== $name (at most $limit s)"
  timeout --signal=INT --kill-after=10 "$limit" "$@" --out "$out"
  code=$?
  printf '{"stage": "%s", "exit": %d, "seconds": %d}\n' "$name" "$code" $((SECONDS - begin)) >> "$out"
}

measure=(env "$python" scripts/gpu_measure.py)
stage machine 40 "${measure[@]}" machine
tests() { # as the other stages, but pytest knows no --out
  "$python" -m pytest -m gpu tests/gpu/device -q -x --maxfail=20 -p no:cacheprovider \
    -o addopts="--import-mode=importlib" -W ignore
}
begin=$SECONDS
export -f tests
export python
echo "== tests (at most 200 s)"
timeout --signal=INT --kill-after=10 200 bash -c tests
printf '{"stage": "tests", "exit": %d, "seconds": %d}\n' $? $((SECONDS - begin)) >> "$out"
stage linear 110 "${measure[@]}" linear $quick
stage losses 20 "${measure[@]}" losses $quick
stage quantize 60 "${measure[@]}" quantize $quick
stage packed 50 "${measure[@]}" packed $quick
stage trellis 20 "${measure[@]}" trellis $quick
stage hosts 30 "${measure[@]}" hosts $quick
"$python" scripts/gpu_measure.py table --out "$out"
