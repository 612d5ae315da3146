// dropout_mask: which elements dropout keeps. A mask follows from its seed, as on the CPU, so that the backward pass
// draws it again and none is stored. Limit: its bytes, written once.
#include "../launch.h"
#include "../random.h"

namespace qlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 16;  // elements, a byte each, in one store

static_assert(kRandomBlock % kPerThread == 0, "the elements of a thread share a key");

__global__ void __launch_bounds__(kThreads)
    dropout_mask_kernel(const std::int64_t* seed, std::uint32_t kept_below, std::int64_t n, std::uint8_t* kept) {
  const std::int64_t first = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPerThread;
  const std::uint64_t block_key = random_block_key(mix(static_cast<std::uint64_t>(*seed)), first / kRandomBlock);
  const auto in_block = static_cast<std::uint32_t>(first % kRandomBlock);
  alignas(16) std::uint8_t bytes[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) bytes[i] = random32(block_key, in_block + i) < kept_below ? 1 : 0;
  if (n - first >= kPerThread) {
    *reinterpret_cast<uint4*>(kept + first) = *reinterpret_cast<const uint4*>(bytes);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (first + i < n) kept[first + i] = bytes[i];
  }
}

}  // namespace

// --- launcher -----------------------------------------------------------------------------------------------------

cudaError_t launch_dropout_mask(const std::int64_t* seed, std::uint32_t kept_below, std::int64_t n, std::uint8_t* kept,
                                cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const auto ctas = static_cast<unsigned>(ceil_div(n, std::int64_t{kThreads} * kPerThread));
  dropout_mask_kernel<<<ctas, kThreads, 0, stream>>>(seed, kept_below, n, kept);
  return cudaGetLastError();
}

}  // namespace qlora::cuda
