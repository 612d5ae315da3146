#!/usr/bin/env bash
# Checks a CUDA build without a GPU: it imports, has every op for CUDA, its machine code is within budget, and the tests
# pass on it. Left out are those that `make test` runs as well: the kernels on the PTX interpreter, which do not see the
# build, and whole runs of finetune, trainers, benches and the demo's data, and files of models, which see it only through
# ops that other tests call.
#
#   tools/cuda_check.sh PYTHON [PYTEST_FLAG...]     PYTHON: of an environment that tools/cuda_env.sh made
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
shift
tools/test_tree.sh "$python" build/cuda/tree
cd build/cuda/tree
"$python" -m qlora_ext.info
"$python" -c "from qlora_ext.info import ops_without_cuda as ops; assert not ops(), ops()"
"$python" bench/sass_report.py --check
"$python" -m pytest "$@" --ignore=tests/ptx --ignore=tests/cuda --ignore=tests/bench/test_bench.py \
  --ignore=tests/test_demo_data.py \
  --ignore=tests/interop/test_{bitsandbytes_folders,damaged_folders,diffusers,examples,trl}.py \
  --ignore=tests/finetune/test_{cli,compile,gguf,optimizer,resume,train}.py
