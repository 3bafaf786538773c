#!/usr/bin/env bash
# Test the oldest supported versions: every direct dependency at its lower bound, in a venv of its own.
#
#   scripts/test_oldest.sh                          # every package in turn, the oldest supported Python
#   scripts/test_oldest.sh rlo-hf                   # one package, its extras and its tests
#   PYTHON=3.11 scripts/test_oldest.sh 'rlo-hf[trl,peft]'  # with these extras; TRL is not for 3.10
#   PYTHON=3.12 scripts/test_oldest.sh rlo-core -k links  # the rest goes to pytest
#
# PYTHON is a version or the path of an interpreter; UV is the uv to use. The last lines sum up.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-3.10}"
uv="${UV:-.venv/bin/uv}"
venv=".venv-oldest"
log="$(mktemp)"
trap 'rm -f "$log"' EXIT

tests_of() {
  case "$1" in
    rlo-core) echo tests/core ;;
    rlo-timm) echo tests/timm ;;
    rlo-hf\[trl*) echo tests/hf/test_trl.py tests/hf/test_hosts.py ;;
    # Reading GGUF asks for a newer transformers than the rest does.
    rlo-hf\[gguf]) echo tests/hf/test_finetune.py ;;
    rlo-hf) echo tests/hf ;;
    # The newer torch that compressed-tensors asks for is not the oldest: a run of its own.
    rlo-gptq\[compressed-tensors]) echo tests/gptq/formats tests/gptq/test_tune.py ;;
    rlo-gptq) echo tests/gptq ;;
    rlo-stylegan) echo tests/stylegan ;;
    *\[*) tests_of "${1%%\[*}" ;;
    *) echo "test_oldest.sh: package must be one of packages/*, got $1" >&2; return 2 ;;
  esac
}

# All extras, if no others are asked for and they go together.
requirement_of() {
  case "$1" in
    *\[*) echo "packages/$1" ;;
    rlo-gptq) echo "packages/$1[gguf,peft]" ;;
    rlo-hf) echo "packages/$1[peft]" ;;
    rlo-stylegan) echo "packages/$1" ;;
    *) echo "packages/$1[all]" ;;
  esac
}

# Bounds that the resolver passes by, though it can meet them: it settles what they depend on first.
pins_of() {
  case "$1" in
    rlo-hf) echo transformers==5.11.0 datasets==3.0.0 ;;
    rlo-hf\[gguf]) echo transformers==5.20.0 ;;
    rlo-hf\[*) echo transformers==5.11.0 ;;
  esac
}

# What was found of what the package asks for; another package may forbid its bound.
versions() {
  "$venv/bin/python" - "$1" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from packaging.requirements import Requirement
from packaging.version import Version

found = {}
for wanted in map(Requirement, requires(sys.argv[1]) or ()):
    try:
        found[wanted.name] = version(wanted.name)
    except PackageNotFoundError:
        continue
    floor = next((s.version for s in wanted.specifier if s.operator == ">="), "0")
    if Version(found[wanted.name]).release[: len(Version(floor).release)] != Version(floor).release:
        found[wanted.name] += f" (above its bound {floor})"
print(f"Python {sys.version.split()[0]}", *map(" ".join, sorted(found.items())), sep=", ")
PYTHON
}

# check PACKAGE[EXTRAS] [PYTEST ARGUMENTS]
check() {
  local package="${1%%\[*}" tests requirements pins
  tests="$(tests_of "$1")"
  pins="$(pins_of "$1")"
  requirements=(-e "$(requirement_of "$1")")
  if [ "$package" != rlo-core ]; then requirements+=(-e packages/rlo-core); fi
  shift
  if [ -e "${1:-}" ]; then tests=""; fi
  "$uv" venv --quiet --clear --python "$python" "$venv" &&
  "$uv" pip install --quiet --python "$venv/bin/python" --resolution lowest-direct \
    "${requirements[@]}" $pins "pytest>=8.2" "hypothesis>=6.100" "expecttest>=0.2" &&
  versions "$package" &&
  # Old releases meet new versions of what they depend on themselves, and warn of it.
  OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q -p no:cacheprovider \
    -W ignore::DeprecationWarning -W ignore::FutureWarning $tests "$@"
}

if [ $# -eq 0 ]; then set -- all; fi
if [ "$1" = all ]; then
  packages=(rlo-core rlo-timm rlo-hf 'rlo-hf[gguf]' rlo-gptq 'rlo-gptq[compressed-tensors]' rlo-stylegan)
else
  tests_of "$1" >/dev/null
  packages=("$1")
fi
shift
summary=()
failed=0
for package in "${packages[@]}"; do
  echo "== $package"
  # `tee` shows it as it goes; the status is the check's (pipefail).
  if check "$package" "$@" 2>&1 | tee "$log"; then verdict=ok; else verdict=FAILED; failed=1; fi
  summary+=("$(printf '%-29s %-6s %s' "$package" "$verdict" "$(tail -n 1 "$log")")")
done
printf '%s\n' "" "${summary[@]}"
exit "$failed"
