#!/usr/bin/env bash
# A virtual environment with a CUDA torch, the nvcc that fits it and qlora_ext built for CUDA, from packages alone: it
# takes python3 with venv, g++ and 8 GB of disk, but no CUDA toolkit and no GPU.
#
#   tools/cuda_env.sh [FOLDER]     .venv-cuda by default; an environment that has a torch keeps it
#   TORCH=2.14.1                   the torch for a new environment
#   CUDA_HOME=/usr/local/cuda      use this toolkit instead of the package
#
# qlora_ext is installed as a wheel, not in place, so that the checkout's own _C stays the one that `make test` built.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -le 1 ] || { echo "usage: tools/cuda_env.sh [FOLDER]" >&2; exit 2; }
venv=$(realpath -m "${1:-.venv-cuda}")
python=$venv/bin/python
# Under one name and version an index may have CPU and CUDA wheels, and a pip configuration made for the CPU ones may
# cap torch's version. Hence PyPI and no configuration, unless PIP_CONFIG_FILE names one (for a proxy or a mirror, say).
export PIP_CONFIG_FILE=${PIP_CONFIG_FILE-/dev/null} PIP_DISABLE_PIP_VERSION_CHECK=1

if ! [ -x "$python" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  echo "*" > "$venv/.gitignore" # as Python 3.13 does by itself
fi
export PATH=$venv/bin:$PATH
if ! "$python" -c "import torch" 2> /dev/null; then
  echo "cuda_env: torch ${TORCH:=2.15.0} and the CUDA libraries, about 3 GB to download"
  "$python" -m pip install --quiet "torch==$TORCH" numpy
fi
cuda=$("$python" -c "import torch; print(torch.version.cuda or '')")
[ -n "$cuda" ] || { echo "cuda_env: the torch in $venv has no CUDA" >&2; exit 1; }

# torch stands among the requirements so that the toolkit fits what it pins. nvcc's own of CUDA 13.0 name no versions:
# without nvvm and crt they would be newer, and write what its assembler does not read.
build=(torch "setuptools>=77" ninja numpy)
[ -n "${CUDA_HOME:-}" ] || build+=("cuda-toolkit[nvcc,nvvm,crt,cccl]==$cuda.*")
"$python" -m pip install --quiet "${build[@]}"

echo "cuda_env: qlora_ext for CUDA $cuda"
rm -rf build/cuda/lib* build/cuda/wheel
QLORA_EXT_CUDA=1 "$python" -m pip wheel --quiet --no-build-isolation --no-deps -w build/cuda/wheel .
"$python" -m pip install --quiet --no-deps --force-reinstall build/cuda/wheel/*.whl
"$python" -m pip install --quiet "$(echo build/cuda/wheel/*.whl)[finetune,demo,test]"
echo "cuda_env: done. From any folder but this one, which has a qlora_ext of its own: $python -m qlora_ext.info"
