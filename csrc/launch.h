// The kernel launchers: raw pointers, a stream, no torch.
//
// A launcher enqueues its kernels on `stream` of the current device and returns at once: it neither allocates nor
// waits, so it can be captured into a CUDA graph. It returns the first error of its calls, or cudaErrorInvalidValue for
// a dtype or a product that it does not take. Sizes may be 0, and nothing is launched then (but quantize_absmax still
// writes an offset of 0); a product's may not.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "adamw.h"
#include "codec.h"

namespace qlora::cuda {

// packed[ceil(n / 2)], on a 4-byte boundary, and absmax[ceil(n / blocksize)] of weight[n].
cudaError_t launch_quantize_4bit(const void* weight, DType dtype, std::int64_t n, std::int64_t blocksize,
                                 QuantType quant_type, std::uint8_t* packed, float* absmax, cudaStream_t stream);

// codes[n], nested_absmax[ceil(n / 256)] and nested_offset[1] of absmax[n]; group_sums[ceil(n / 256)] is workspace.
cudaError_t launch_quantize_absmax(const float* absmax, std::int64_t n, double* group_sums, std::uint8_t* codes,
                                   float* nested_absmax, float* nested_offset, cudaStream_t stream);

// The slice of the weight [*, K], dense, into out of that dtype. K need not be a multiple of the blocksize.
cudaError_t launch_dequantize_4bit(const Packed4bit& w, std::int64_t K, const Slice& slice, DType dtype, void* out,
                                   cudaStream_t stream);

// kept[n], on a 16-byte boundary, of bool: each with probability kept_below / 2^32, by *seed and its index alone.
cudaError_t launch_dropout_mask(const std::int64_t* seed, std::uint32_t kept_below, std::int64_t n, std::uint8_t* kept,
                                cudaStream_t stream);

// What the split of a product over the device depends on.
struct DeviceLimits {
  int num_sms;
  int shared_bytes_per_sm;  // cudaDevAttrMaxSharedMemoryPerMultiprocessor
};

// A product with few rows and a 4-bit weight [N, K], decoded inside one kernel.
struct Product4bit {
  const void* x;     // linear_4bit: x[M, K]; linear_4bit_dgrad: grad[M, N]
  Packed4bit w;      // [N, K]
  const void* bias;  // [N] or null; linear_4bit only
  void* out;         // linear_4bit: y[M, N]; linear_4bit_dgrad: grad_x[M, K], on a 4-byte boundary
  std::int64_t M, N, K;
  DType dtype;  // of x, bias and out: BFloat16 or Float16
};

// The compute capability's major number from which the fused kernels are there: mma of 16 x 8 x 16 and cp.async.
constexpr int kLeastFusedMajor = 8;

// The most rows that the fused kernels are meant for: with more, decoding slices for a dense product is faster.
constexpr std::int64_t kMostFusedRows = 64;

// Whether the fused kernels take it: 16-bit dtype, 1 to kMostFusedRows rows, whole blocks in a row, blocksize at most
// 256, N even, and x, packed and absmax on 16-byte boundaries.
bool takes_fused(const Product4bit& product);

// y = x @ W^T + bias. workspace: linear_4bit_workspace_bytes, on a 16-byte boundary, of any content.
std::int64_t linear_4bit_workspace_bytes(const Product4bit& product, const DeviceLimits& limits);
cudaError_t launch_linear_4bit(const Product4bit& product, const DeviceLimits& limits, void* workspace,
                               cudaStream_t stream);

// grad_x = grad @ W, likewise.
std::int64_t linear_4bit_dgrad_workspace_bytes(const Product4bit& product, const DeviceLimits& limits);
cudaError_t launch_linear_4bit_dgrad(const Product4bit& product, const DeviceLimits& limits, void* workspace,
                                     cudaStream_t stream);

// The table of n slices that the kernel reads: filled in host memory, on an 8-byte boundary, then copied to the device
// by the caller, who knows which memory is pinned and when it may be written again. It holds all that the hypers say.
std::int64_t adamw_table_bytes(std::int64_t n);
void fill_adamw_table(const AdamwSlice* slices, std::int64_t n, const AdamwOptions& options, void* table);

// The update of those n slices, `blocks` = adamw_blocks of them, in one launch. `table`: on the device, on an 8-byte
// boundary.
cudaError_t launch_adamw(const void* table, std::int64_t n, std::int64_t blocks, const AdamwOptions& options,
                         cudaStream_t stream);

}  // namespace qlora::cuda
