#!/usr/bin/env bash
# All that needs a GPU, in 9 minutes: build, tests, compute-sanitizer and benches, into bench/results/*cuda.jsonl.
#
#   tools/gpu_suite.sh [PYTHON]    a Python with a CUDA torch; qlora_ext is installed into its environment
#
# Every part has its time and its log in build/gpu/. A part that fails does not keep the next from running; the exit
# status is the number of those that failed. Packages that the tests want are installed if an index can be reached.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${1:-python3}") || { echo "usage: tools/gpu_suite.sh [PYTHON]" >&2; exit 2; }
python=$(realpath -s "$python")
arch=$("$python" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") \
  || { echo "gpu_suite: $python has no torch that finds a GPU" >&2; exit 2; }
logs=$PWD/build/gpu/logs tree=$PWD/build/gpu/tree
rm -rf build/gpu && mkdir -p "$logs"
failed=0

# part NAME SECONDS COMMAND...
part() {
  local name=$1 seconds=$2 start=$SECONDS status
  shift 2
  timeout --kill-after=5 "$seconds" "$@" > "$logs/$name.log" 2>&1
  status=$?
  if [ $status = 0 ]; then
    echo "ok      $name ($((SECONDS - start)) s)"
  else
    failed=$((failed + 1))
    echo "FAILED  $name ($((SECONDS - start)) s of $seconds, status $status); the end of $logs/$name.log:"
    tail -n 40 "$logs/$name.log"
  fi
}

# For this GPU alone, to save time.
install() {
  set -e
  # ninja compiles several files at a time.
  "$python" -m pip install --quiet --retries 0 --timeout 5 "setuptools>=77" ninja numpy || true
  rm -rf build/cuda/lib* # what an earlier build left would go into the wheel
  QLORA_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=$arch "$python" -m pip wheel --no-build-isolation --no-deps -w build/gpu/wheel .
  "$python" -m pip install --no-deps --force-reinstall build/gpu/wheel/*.whl
  (cd / && "$python" -m qlora_ext.info)
  tools/test_tree.sh "$python" "$tree"
}

# One process a file, with several at a time. A file that needs a package which is not there is told and left out.
tests_of() {
  local log=$logs/$(basename "$1" .py).log status
  (cd "$tree" && "$python" -m pytest -q --durations=3 -p no:cacheprovider "$1") > "$log" 2>&1
  status=$?
  # 5: nothing but slow tests in it
  if [ $status = 0 ] || [ $status = 5 ]; then
    echo "$1: $(tail -n 1 "$log")"
  elif [ $status = 2 ] && missing=$(grep -m 1 "^E *ModuleNotFoundError: No module named" "$log") \
    && ! grep -q "No module named 'qlora_ext" <<< "$missing"; then
    echo "$1: LEFT OUT: ${missing#E *}"
  else
    echo "$1: FAILED, see $log"
    grep -E "^(E  |FAILED|ERROR)" "$log" | tail -n 20
    return 1
  fi
}

# Memory errors and races of our kernels on small inputs; without cuBLAS's own kernels, which are not ours to judge.
sanitize() {
  cd "$tree" && PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 99 "$python" -m pytest -q \
    -p no:cacheprovider tests/ops/test_cuda_calls.py -k "gives_what_the_cpu_gives and not lora and not M300" \
    > "$logs/$1.log" 2>&1 || { echo "$1: status $?"; tail -n 30 "$logs/$1.log"; return 1; }
}

export -f install tests_of sanitize
export python arch logs tree FAIL_WITHOUT_CUDA=1 PIP_DISABLE_PIP_VERSION_CHECK=1
sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2> /dev/null)
export sanitizer

part build 120 bash -c install
timeout 30 "$python" -m pip install --retries 0 --timeout 5 "$(echo build/gpu/wheel/*.whl)[finetune,demo,test]" \
  > "$logs/packages.log" 2>&1 || echo "note    not every package for the tests could be installed, see $logs/packages.log"
# tests/ptx and tests/cuda see neither the build nor the GPU, test_bench.py is the CPU's: `make test` runs them.
export OMP_NUM_THREADS=2
part tests 120 bash -c "find tests -name 'test_*.py' ! -name test_bench.py ! -path 'tests/ptx/*' ! -path 'tests/cuda/*' | sort \
  | xargs -P $((($(nproc) + 1) / 2)) -I {} bash -c 'tests_of {}'"
unset OMP_NUM_THREADS
grep -h "LEFT OUT" "$logs/tests.log"
if [ -n "$sanitizer" ]; then
  part sanitizer 50 bash -c 'sanitize memcheck & memcheck=$!; sanitize racecheck; status=$?; wait $memcheck && exit $status'
else
  echo "note    no compute-sanitizer here"
fi
part benches 140 "$python" bench/bench_cuda.py --budget 110
part optimizer 80 "$python" bench/bench_optimizer.py --device cuda --seconds 0.3
echo "$failed parts failed, in $SECONDS s"
exit $failed
