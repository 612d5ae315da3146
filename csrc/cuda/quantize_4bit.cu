// quantize_4bit: blockwise 4-bit quantization (QLoRA paper, section 3; the bytes: csrc/codec.h).
//
//   absmax[b] = max |w| over block b;  code[i] = number of bounds below w[i] / absmax[b], as that rank's code
#include "../launch.h"
#include "pairs.cuh"

namespace qlora::cuda {
namespace {

// A thread takes 8 weights, so a CTA takes whole blocks of every blocksize.
constexpr int kThreads = 512;
constexpr int kPerThread = 8;
constexpr int kWarp = 32;

template <typename T>
__device__ void load_whole(const T* weight, float (&value)[kPerThread]) {
  const uint4 words = *reinterpret_cast<const uint4*>(weight);
  const std::uint32_t word[] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack_pair(word[i], T{});
    value[2 * i] = two.x;
    value[2 * i + 1] = two.y;
  }
}

__device__ void load_whole(const float* weight, float (&value)[kPerThread]) {
#pragma unroll
  for (int i = 0; i < kPerThread; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(weight + i);
    value[i] = four.x;
    value[i + 1] = four.y;
    value[i + 2] = four.z;
    value[i + 3] = four.w;
  }
}

// encode of codec.h as a binary search. bound: the 15 of them, in shared memory; code_of_rank: 4 bits a rank.
__device__ std::uint32_t encode(const float* bound, std::uint64_t code_of_rank, float x) {
  unsigned place = 0;  // 4 * rank: of a bound in bytes, of a code in bits
#pragma unroll
  for (unsigned step = 32; step >= 4; step /= 2) {
    const auto* next = reinterpret_cast<const float*>(reinterpret_cast<const char*>(bound) + place) + (step / 4 - 1);
    if (x > *next) place |= step;
  }
  return static_cast<std::uint32_t>(code_of_rank >> place) & 0xfu;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_4bit_kernel(const T* weight, std::int64_t n, int blocksize_log2, QuantType quant_type,
                         std::uint64_t code_of_rank, std::uint8_t* packed, float* absmax) {
  __shared__ float bound[kNumCodes - 1];  // indexed by data: constant memory would serve one address at a time
  __shared__ std::uint32_t warp_largest[kThreads / kWarp];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kNumCodes - 1) bound[thread] = device_codebooks[static_cast<int>(quant_type)].bound[thread];

  const std::int64_t first = (std::int64_t{blockIdx.x} * kThreads + thread) * kPerThread;
  const int count = static_cast<int>(max(std::int64_t{0}, min(n - first, std::int64_t{kPerThread})));
  float value[kPerThread];
  if (count == kPerThread && reinterpret_cast<std::uintptr_t>(weight) % 16 == 0) {
    load_whole(weight + first, value);
  } else {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) value[i] = i < count ? to_float(weight[first + i]) : 0.0f;
  }

  std::uint32_t largest = 0;  // of |w|, as bits: integers order floats of one sign, and NaN last
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) largest = max(largest, __float_as_uint(value[i]) & 0x7fffffffu);
  const int threads_per_block = (1 << blocksize_log2) / kPerThread;
  for (int lanes = 1; lanes < min(threads_per_block, kWarp); lanes *= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
  }
  if (thread % kWarp == 0) warp_largest[thread / kWarp] = largest;
  __syncthreads();
  const int warps = threads_per_block / kWarp;  // of a block; 0 or 1: its maximum is known
#pragma unroll 1
  for (int i = 0; i < warps; ++i) largest = max(largest, warp_largest[(thread / kWarp & ~(warps - 1)) + i]);

  if (count == 0) return;
  const float inverse = inverse_absmax(__uint_as_float(largest));
  std::uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    word |= encode(bound, code_of_rank, value[i] * inverse) << nibble_shift(i);
  }
  if (count == kPerThread) {
    *reinterpret_cast<std::uint32_t*>(packed + first / 2) = word;
  } else {
#pragma unroll 1
    for (int i = 0; i < count; i += 2) {
      std::uint32_t byte = word >> (4 * i);
      // Behind an odd end lies the code of 0.0, even in a block whose absmax is NaN.
      if (i + 1 == count) byte = (byte & 0xf0u) | encode(bound, code_of_rank, 0.0f);
      packed[(first + i) / 2] = static_cast<std::uint8_t>(byte);
    }
  }
  if ((thread & (threads_per_block - 1)) == 0) absmax[first >> blocksize_log2] = __uint_as_float(largest);
}

// --- launcher -----------------------------------------------------------------------------------------------------

template <typename T>
cudaError_t launch(const void* weight, std::int64_t n, std::int64_t blocksize, QuantType quant_type,
                   std::uint8_t* packed, float* absmax, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  constexpr std::int64_t kPerCta = kThreads * kPerThread;
  std::uint64_t code_of_rank = 0;
  for (int rank = 0; rank < kNumCodes; ++rank) {
    code_of_rank |= std::uint64_t{codebook(quant_type).code_of_rank[rank]} << (4 * rank);
  }
  quantize_4bit_kernel<<<static_cast<unsigned>(ceil_div(n, kPerCta)), kThreads, 0, stream>>>(
      static_cast<const T*>(weight), n, std::countr_zero(static_cast<std::uint64_t>(blocksize)), quant_type,
      code_of_rank, packed, absmax);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_quantize_4bit(const void* weight, DType dtype, std::int64_t n, std::int64_t blocksize,
                                 QuantType quant_type, std::uint8_t* packed, float* absmax, cudaStream_t stream) {
  switch (dtype) {
    case DType::Float32:
      return launch<float>(weight, n, blocksize, quant_type, packed, absmax, stream);
    case DType::Float16:
      return launch<Half>(weight, n, blocksize, quant_type, packed, absmax, stream);
    case DType::BFloat16:
      return launch<BFloat16>(weight, n, blocksize, quant_type, packed, absmax, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qlora::cuda
