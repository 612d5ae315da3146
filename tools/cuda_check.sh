#!/usr/bin/env bash
# Checks a CUDA build without a GPU: it imports, has every op for CUDA, its machine code is within budget, and the tests
# pass on it. The kernels on the PTX interpreter are left out: `make test` runs those, and they do not see the build.
#
#   tools/cuda_check.sh PYTHON     of an environment that tools/cuda_env.sh made
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
tools/test_tree.sh "$python" build/cuda/tree
cd build/cuda/tree
"$python" -m qlora_ext.info
"$python" -c "from qlora_ext.info import ops_without_cuda as ops; assert not ops(), ops()"
"$python" bench/sass_report.py --check
"$python" -m pytest --ignore=tests/ptx --ignore=tests/cuda
