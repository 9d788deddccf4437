#!/usr/bin/env bash
# On a machine with a GPU and no network: builds the CUDA part, runs the GPU tests and the GPU benchmarks, writes JSON
# files and prints their tables last. Every step goes on if another fails; the exit code tells.
#
#   benchmarks/gpu.sh [--dry-run] [--no-build] [--seconds N] [--suites "NAME ..."] [FOLDER]
#
#   FOLDER       where the JSON files go; benchmarks/results/<version> if left out
#   --dry-run    the same on the CPU, with tiny sizes and without CUDA
#   --no-build   takes the fastcolor that is installed
#   --seconds N  after which nothing new is begun, and what runs is stopped; 540 if left out. A step has a limit of its own
#                besides: a build 300 s, the tests 240 s, everything else 150 s (as far as there is `timeout`)
#   --suites S   these benchmarks alone, of `python -m benchmarks --list`
#
# PYTHON names the interpreter (python3). It needs torch, triton, numpy, safetensors, pytest, pybind11, scikit-build-core,
# cmake and ninja; peers that are missing are named in the results, and so is the suite of files (pyvips) or films (av)
# that is left out where its package is missing.
set -u

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
device=cuda cuda=ON build=yes folder= limit=540 suites= awaiting=
benchmark_options=() benchmark_size=()
for argument in "$@"; do
  if [ -n "$awaiting" ]; then printf -v "$awaiting" %s "$argument"; awaiting=; continue; fi
  case $argument in
    --seconds) awaiting=limit ;;
    --suites) awaiting=suites ;;
    --dry-run) device=cpu cuda=OFF benchmark_options=(--quick) benchmark_size=(--size 96x64) ;;
    --no-build) build=no ;;
    -*) sed -n '2,/^$/s/^#\( \|$\)//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
    *) folder=$argument ;;
  esac
done
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")
folder=${folder:-$root/benchmarks/results/$version}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
commit=$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# bash would hear of signals when a step has ended; `timeout` is a group of its own, that no terminal sends Ctrl-C to
running=
stopped() { [ -z "$running" ] || { kill "$running" && wait "$running"; } 2> /dev/null; exit "$1"; }
trap 'stopped 130' INT
trap 'stopped 143' TERM
failed=0 summary=()

within() {  # SECONDS COMMAND...: no longer than that, and than what time is left; 124 or 137 where it was stopped
  local most=$1 left=$((limit - SECONDS)) code
  shift
  [ "$left" -ge 1 ] || left=1  # 0 would be no limit at all
  command -v timeout > /dev/null || { "$@"; return; }
  timeout --kill-after=5 $((left < most ? left : most)) "$@" <&0 &
  running=$!
  wait "$running"
  code=$? running=
  return $code
}

step() {  # NAME COMMAND...: runs it, remembers how it went
  local name=$1 begin=$SECONDS
  shift
  if [ "$SECONDS" -ge "$limit" ]; then
    failed=1
    summary+=("LEFT OUT  $name, after $limit s")
    return 0
  fi
  echo "== $name"
  if "$@"; then
    summary+=("passed  $name, $((SECONDS - begin)) s")
  else
    case $? in
      124) summary+=("STOPPED  $name, $((SECONDS - begin)) s: it ran out of its time") ;;
      137) summary+=("KILLED  $name, $((SECONDS - begin)) s") ;;  # past its time too, or for its memory
      *) summary+=("FAILED  $name, $((SECONDS - begin)) s") ;;
    esac
    failed=1
    return 1
  fi
}

install() {  # OPTIONS...: into the scratch folder, fetching nothing
  within 300 "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps --upgrade --target "$scratch/site" "$@" \
    --config-settings=build-dir="$scratch/build" "$root"
}

with_kernels() {  # strict: a kernel that does not compile is a failure here
  FASTCOLOR_STRICT=1 install --config-settings=cmake.define.FASTCOLOR_CUDA=$cuda
}

gpu_tests() {
  # only files that have GPU tests: others may import packages that are not there
  local workers=()
  [ $device = cuda ] && "$python" -c 'import xdist' 2> /dev/null && workers=(-n 6)  # they mostly wait for compilers
  # shellcheck disable=SC2046  # names without spaces; bash 3 has no mapfile
  within 240 "$python" -m pytest $(grep -rl --include='test_*.py' 'mark\.gpu' tests) -m gpu -q ${workers[@]+"${workers[@]}"} \
    -p no:cacheprovider --junit-xml="$scratch/tests.xml"
  local code=$?
  [ -f "$scratch/tests.xml" ] || return $code
  "$python" - "$scratch/tests.xml" "$folder" "$device" "$commit" <<'PYTHON' && return $code
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks import timing

report, folder, device, commit = sys.argv[1:]
suite = next(ElementTree.parse(report).iter("testsuite"))
counts = {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}
bad = [f"{c.get('classname')}::{c.get('name')}" for c in suite.iter("testcase") if c.find("failure") is not None]
result = {**counts, "seconds": float(suite.get("time")), "failed": bad}
timing.write(Path(folder), "tests", device, {**timing.machine(device, commit), "pytest": result}, [])
PYTHON
}

# Away from the repository, whose folder fastcolor/ would hide the installed package.
mkdir "$scratch/run"
cp -r "$root/tests" "$root/benchmarks" "$root/pyproject.toml" "$scratch/run/"
cd "$scratch/run" || exit 2

if [ $build = yes ]; then
  export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
  step "build, FASTCOLOR_CUDA=$cuda" with_kernels ||
    step "install without C++ and CUDA kernels" install --config-settings=wheel.cmake=false
fi
# Skipped tests pass: that the backends are there, and that it is this build that is imported, has to be asked for.
backends() {
  within 150 "$python" - "$device" "${scratch:-}/site" "$build" <<'PYTHON'
import sys

import fastcolor
from fastcolor.ops import _backend

device, site, build = sys.argv[1:]
if build == "yes" and not fastcolor.__file__.startswith(site):
    sys.exit(f"fastcolor is imported from {fastcolor.__file__}, not from this build: use a python without an installed one")
absent = {name: _backend.missing(name) for name in ("cuda", "triton")} if device == "cuda" else {}
for name, why in absent.items():
    print(f"{name}: {why or 'there'}")
sys.exit(any(absent.values()))
PYTHON
}
step "backends are there" backends
step "pytest -m gpu" gpu_tests
# One after the other: what one has measured is written as it ends.
while read -r name module; do
  case " ${suites:-$name} " in *" $name "*) ;; *) continue ;; esac
  size=(${benchmark_size[@]+"${benchmark_size[@]}"}) package=
  case $name in training) package=pyvips ;; video) package=av ;; esac
  if [ -n "$package" ] && ! "$python" -c "import $package" > /dev/null 2>&1 < /dev/null; then
    summary+=("LEFT OUT  benchmark $name: $package is missing")
    continue
  fi
  case $name in training | video | scaling) size=() ;; esac  # have small sizes of their own
  step "benchmark $name" within 150 "$python" -m "$module" --device "$device" --json "$folder" --commit "$commit" \
    ${size[@]+"${size[@]}"} ${benchmark_options[@]+"${benchmark_options[@]}"} > "$scratch/$name.log" 2>&1 < /dev/null || tail -n 20 "$scratch/$name.log"
done < <("$python" -m benchmarks --names)
# Memory, and the barriers and shared memory of kernels, on a few small tests of the CUDA C++ backend. Without torch's
# cache of memory, whose blocks are larger than the tensors in them.
sanitize() {  # TOOL
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 within 150 compute-sanitizer --tool "$1" --error-exitcode 9 "$python" -m pytest -m gpu -q \
    -p no:cacheprovider tests/ops/test_mean_field_gpu.py tests/ops/test_lab_gpu.py tests/ops/test_render_gpu.py \
    -k "cuda and (test_ranks or test_nan or test_empty or (test_gradients and steps) or (test_matches and quadratic) \
        or test_integers or test_address or test_luma_rows)"
}
if [ $device = cuda ] && command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck synccheck; do
    step "compute-sanitizer $tool" sanitize $tool > "$scratch/$tool.log" 2>&1 || tail -n 30 "$scratch/$tool.log"
  done
fi

"$python" -m benchmarks.timing "$folder"
printf '%s\n' "${summary[@]}" "JSON files: $folder"
exit $failed
