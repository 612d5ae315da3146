"""The recorder and the Device, on launchers that each do one thing wrong."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import library
import pytest
import torch
from launcher import Device, under_schedules
from ptx import PTXError
from recorded_gpu import LaunchError
from torch import Tensor

# launch_quantize_absmax is the one that is called; n says what it does.
SOURCE = r"""
#include "../launch.h"

namespace qlora::cuda {
namespace {

struct Two {
  double* sums;
  float* offset;
};

__global__ void toy_kernel(const float* absmax, std::int64_t n, Two two, std::uint8_t* codes, float* nested_absmax,
                           int first_code) {
  extern __shared__ float shared[];
  shared[threadIdx.x] = absmax[threadIdx.x];
  __syncthreads();
  const unsigned i = threadIdx.x ^ 1;
  codes[i] = static_cast<std::uint8_t>(first_code + i);
  nested_absmax[0] = static_cast<float>(n == 12 ? i : n);
  *two.offset = shared[0] + static_cast<float>(two.sums[0]);
}

}  // namespace

cudaError_t launch_quantize_absmax(const float* absmax, std::int64_t n, double* sums, std::uint8_t* codes,
                                   float* nested_absmax, float* offset, cudaStream_t stream) {
  const Two two = {sums, offset};
  const unsigned threads = n > 2 ? 2 : static_cast<unsigned>(n);
  switch (n) {
    case 2:  // nothing wrong
      cudaMemsetAsync(sums, 0, 8, stream);
      cudaFuncSetAttribute(toy_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 * 1024);
      toy_kernel<<<1, threads, 100 * 1024, stream>>>(absmax, n, two, codes, nested_absmax, 7);
      break;
    case 3:  // more shared memory than asked for
      cudaFuncSetAttribute(toy_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 48 * 1024);
      toy_kernel<<<1, threads, 48 * 1024 + 16, stream>>>(absmax, n, two, codes, nested_absmax, 7);
      break;
    case 4:  // more than there is
      cudaFuncSetAttribute(toy_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 * 1024);
      break;
    case 5:
      toy_kernel<<<0, threads, 16, stream>>>(absmax, n, two, codes, nested_absmax, 7);
      break;
    case 6:
      toy_kernel<<<1, 2048, 16, stream>>>(absmax, n, two, codes, nested_absmax, 7);
      break;
    case 7:  // on the default stream
      toy_kernel<<<1, threads, 16>>>(absmax, n, two, codes, nested_absmax, 7);
      break;
    case 8:
      cudaMemsetAsync(sums, 0, 16, stream);
      break;
    case 9:  // writes only some of the output
      toy_kernel<<<1, threads, 16, stream>>>(absmax, n, two, codes, nested_absmax, 7);
      break;
    case 10:
    case 12:  // different values to one address
      toy_kernel<<<1, 12, 64, stream>>>(absmax, n, two, codes, nested_absmax, 7);
      break;
    default:
      return cudaErrorNotSupported;
  }
  return cudaGetLastError();
}

cudaError_t launch_quantize_4bit(const void*, DType, std::int64_t, std::int64_t, QuantType, std::uint8_t*, float*,
                                 cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t launch_dequantize_4bit(const Packed4bit&, std::int64_t, const Slice&, DType, void*, cudaStream_t) {
  return cudaErrorNotSupported;
}
bool takes_fused(const Product4bit&) { return false; }
std::int64_t linear_4bit_workspace_bytes(const Product4bit&, const DeviceLimits&) { return 0; }
std::int64_t linear_4bit_dgrad_workspace_bytes(const Product4bit&, const DeviceLimits&) { return 0; }
cudaError_t launch_dropout_mask(const std::int64_t*, std::uint32_t, std::int64_t, std::uint8_t*, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t launch_linear_4bit(const Product4bit&, const DeviceLimits&, void*, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t launch_linear_4bit_dgrad(const Product4bit&, const DeviceLimits&, void*, cudaStream_t) {
  return cudaErrorNotSupported;
}
std::int64_t adamw_table_bytes(std::int64_t) { return 0; }
void fill_adamw_table(const AdamwSlice*, std::int64_t, const AdamwOptions&, void*) {}
cudaError_t launch_adamw(const void*, std::int64_t, std::int64_t, const AdamwOptions&, cudaStream_t) {
  return cudaErrorNotSupported;
}

}  // namespace qlora::cuda
"""


@pytest.fixture(scope="module")
def csrc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("csrc")
    (folder / "cuda").mkdir()
    for header in library.CSRC.glob("*.h"):
        shutil.copy(header, folder)
    (folder / "cuda" / "toy.cu").write_text(SOURCE)
    return folder


def absmax(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float32) + 0.5


def test_arguments_attributes_and_memsets_arrive(csrc: Path) -> None:
    device = Device(csrc=csrc)
    codes, nested_absmax, offset = device.quantize_absmax(absmax(2))
    assert codes.tolist() == [7, 8]
    assert nested_absmax.tolist() == [2.0]
    assert offset == 0.5  # and the workspace's 0.0
    assert [result.statistics.shared_bytes for result in device.results] == [100 * 1024]
    assert device.results[0].traffic["absmax"].read.bytes == 8


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (3, LaunchError, "quantize_absmax: CUDA error 1$"),
        (4, LaunchError, "quantize_absmax: CUDA error 1$"),
        (5, LaunchError, "quantize_absmax: CUDA error 9$"),
        (6, LaunchError, "quantize_absmax: CUDA error 9$"),
        (7, LaunchError, r"got stream 0x5eed and used \{0\}"),
        (8, PTXError, r"memset of 16 bytes at workspace\[8 bytes\]"),
        (9, PTXError, "7 of 9 bytes of codes were never written"),
        (10, PTXError, r"OUT OF BOUNDS global load of 4 bytes .*absmax\[40 bytes\] offset 40"),
        (11, LaunchError, "quantize_absmax: CUDA error 801$"),
        (12, PTXError, r"ERROR store-collision x11: .*st\.global"),
    ],
    ids=[
        *("shared", "most-shared", "grid", "threads", "stream"),
        *("memset", "unwritten", "bounds", "returned", "collision"),
    ],
)
def test_what_is_wrong_with_a_launch_is_said(csrc: Path, n: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Device(csrc=csrc, workspace=0).quantize_absmax(absmax(n))


def test_the_end_of_a_grid_is_run_and_watched_as_a_whole_one(csrc: Path) -> None:
    """As of the tensors of which only the end is there."""
    good, bad = (Device(csrc=csrc, workspace=0) for _ in range(2))
    good._skipped = bad._skipped = Fraction(1, 2)  # of one CTA none
    codes, nested_absmax, _ = good.quantize_absmax(absmax(2))
    assert (codes.tolist(), nested_absmax.tolist()) == ([7, 8], [2.0])
    with pytest.raises(PTXError, match="ERROR store-collision"):
        bad.quantize_absmax(absmax(12))


def test_an_error_is_reported_once(csrc: Path) -> None:
    """cudaGetLastError forgets it, as CUDA's does."""
    with pytest.raises(LaunchError):
        Device(csrc=csrc).quantize_absmax(absmax(5))
    Device(csrc=csrc).quantize_absmax(absmax(2))


def test_a_result_that_depends_on_the_schedule(csrc: Path) -> None:
    results = iter([1.0, 1.0, 2.0])
    with pytest.raises(PTXError, match="the result depends on the schedule"):
        under_schedules(lambda device: torch.tensor(next(results)), csrc=csrc)


def test_source_that_nvcc_refuses(csrc: Path, tmp_path: Path) -> None:
    shutil.copytree(csrc, tmp_path / "csrc")
    (tmp_path / "csrc" / "cuda" / "toy.cu").write_text('#include "../launch.h"\nint x = "";\n')
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"toy\.cu"):
            Device(csrc=tmp_path / "csrc")
