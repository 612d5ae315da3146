// quantize_absmax: double quantization, the absmax of the blocks in 8 bits (QLoRA paper, section 3).
//
//   offset = mean(absmax);  nested_absmax[g] = max |absmax - offset| over group g of 256
//   code = nearest dynamic code of (absmax - offset) / nested_absmax[g]
//
// The mean is part of the format: fp64 sums in index order, of each group and then of the groups. So its chains of
// additions are as long as the format says, and all that can be done is to keep memory latency out of them.
#include "../launch.h"

namespace qlora::cuda {
namespace {

constexpr int kWarp = 32;

// --- the sum of each group: a warp adds up 32 groups that the CTA has brought to shared memory ----------------------

constexpr int kSumThreads = 256;
constexpr int kSumGroups = kWarp;

__global__ void __launch_bounds__(kSumThreads)
    sum_groups_kernel(const float* absmax, std::int64_t n, double* group_sums) {
  __shared__ float values[kSumGroups][kNestedBlocksize + 1];  // odd rows: a column lies in 32 banks
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t first_group = std::int64_t{blockIdx.x} * kSumGroups;
#pragma unroll 8
  for (int group = 0; group < kSumGroups; ++group) {
    const std::int64_t i = (first_group + group) * kNestedBlocksize + thread;
    values[group][thread] = i < n ? absmax[i] : 0.0f;  // a zero behind the end changes no sum
  }
  __syncthreads();
  if (thread >= kSumGroups || (first_group + thread) * kNestedBlocksize >= n) return;
  double sum = 0.0;
#pragma unroll 16
  for (int i = 0; i < kNestedBlocksize; ++i) sum += static_cast<double>(values[thread][i]);
  group_sums[first_group + thread] = sum;
}

static_assert(kSumThreads == kNestedBlocksize, "a thread brings one value of each group");

// --- their mean: one thread adds a tile while the others bring the next one -----------------------------------------

constexpr int kMeanTile = 512;

__global__ void __launch_bounds__(kMeanTile)
    mean_kernel(const double* group_sums, std::int64_t num_groups, std::int64_t n, float* nested_offset) {
  __shared__ double tiles[2][kMeanTile];
  const int thread = static_cast<int>(threadIdx.x);
  double total = 0.0;
  const auto sum_at = [&](std::int64_t group) { return group < num_groups ? group_sums[group] : 0.0; };
  tiles[0][thread] = sum_at(thread);
  int current = 0;
  for (std::int64_t begin = 0; begin < num_groups; begin += kMeanTile, current ^= 1) {
    __syncthreads();  // the current tile is there, and the other one has been added
    tiles[current ^ 1][thread] = sum_at(begin + kMeanTile + thread);
    if (thread == 0) {
#pragma unroll 16
      for (int i = 0; i < kMeanTile; ++i) total += tiles[current][i];
    }
  }
  if (thread == 0) *nested_offset = n == 0 ? 0.0f : static_cast<float>(total / static_cast<double>(n));
}

// --- the codes: a warp a group --------------------------------------------------------------------------------------

constexpr int kCodeThreads = 256;

__global__ void __launch_bounds__(kCodeThreads)
    quantize_absmax_kernel(const float* absmax, std::int64_t n, const float* nested_offset, std::uint8_t* codes,
                           float* nested_absmax) {
  __shared__ float bound[kNumDynamicCodes - 1];  // indexed by data: constant memory would serve one address at a time
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kNumDynamicCodes - 1) bound[thread] = device_dynamic_codebook.bound[thread];

  const int lane = thread % kWarp;
  const std::int64_t group = (std::int64_t{blockIdx.x} * kCodeThreads + thread) / kWarp;
  const float offset = *nested_offset;
  constexpr int kPerLane = kNestedBlocksize / kWarp;
  float value[kPerLane];
  std::uint32_t largest = 0;  // of |absmax - offset|, as bits: integers order floats of one sign, and NaN last
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const std::int64_t i = group * kNestedBlocksize + j * kWarp + lane;
    value[j] = i < n ? absmax[i] - offset : 0.0f;
    largest = max(largest, __float_as_uint(value[j]) & 0x7fffffffu);
  }
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
  }
  const float inverse = inverse_group_absmax(__uint_as_float(largest));
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const std::int64_t i = group * kNestedBlocksize + j * kWarp + lane;
    if (i < n) codes[i] = encode_dynamic(bound, value[j] * inverse);
  }
  if (lane == 0 && group * kNestedBlocksize < n) nested_absmax[group] = __uint_as_float(largest);
}

}  // namespace

// --- launcher -----------------------------------------------------------------------------------------------------

cudaError_t launch_quantize_absmax(const float* absmax, std::int64_t n, double* group_sums, std::uint8_t* codes,
                                   float* nested_absmax, float* nested_offset, cudaStream_t stream) {
  const std::int64_t num_groups = ceil_div(n, kNestedBlocksize);
  const auto ctas = [&](int groups) { return static_cast<unsigned>(ceil_div(num_groups, groups)); };
  if (n > 0) sum_groups_kernel<<<ctas(kSumGroups), kSumThreads, 0, stream>>>(absmax, n, group_sums);
  mean_kernel<<<1, kMeanTile, 0, stream>>>(group_sums, num_groups, n, nested_offset);  // of nothing: 0
  if (n > 0) {
    quantize_absmax_kernel<<<ctas(kCodeThreads / kWarp), kCodeThreads, 0, stream>>>(absmax, n, nested_offset, codes,
                                                                                    nested_absmax);
  }
  return cudaGetLastError();
}

}  // namespace qlora::cuda
