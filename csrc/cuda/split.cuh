// How a product is split over the device, and put together again.
//
// The output is cut into tiles, each tile's sum into units; the units of all tiles, one after the other, are dealt out
// in equal runs, one to a CTA, so that every multiprocessor has the same work whatever the shape. A tile that one CTA
// computes whole is written at once. Else each of its CTAs stores its partial sum, and the last to arrive adds them up,
// in the order of the CTAs: the result does not depend on the order in which they ran.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "../launch.h"

namespace qlora::cuda {

struct Split {
  int tiles, units, ctas;  // units: of a tile
  int unit_steps;          // of the kernel (kStepK, kStepN), in a unit
  int run, longer_runs;    // a CTA has `run` units, the first `longer_runs` CTAs one more

  bool splits_tiles() const { return units > 1 && tiles % ctas != 0; }
  __host__ __device__ int begin(int cta) const { return cta * run + (cta < longer_runs ? cta : longer_runs); }
  // The CTA that computes this one of all units.
  __host__ __device__ int cta_of(int unit) const {
    const int in_longer = longer_runs * (run + 1);
    return unit < in_longer ? unit / (run + 1) : longer_runs + (unit - in_longer) / run;
  }
  __host__ __device__ int first_cta(int tile) const { return cta_of(tile * units); }
  __host__ __device__ int last_cta(int tile) const { return cta_of((tile + 1) * units - 1); }
  // Where the CTA puts its partial sum of the tile. If CTAs are more than tiles, each next piece along the units has
  // the next CTA or the next tile; else a CTA has two unfinished tiles at most, its first and its last.
  __host__ __device__ int partial_slot(int cta, int tile) const {
    return tiles < ctas ? cta + tile : 2 * cta + (begin(cta) / units != tile);
  }
  __host__ __device__ int partial_slots() const { return ctas + std::min(ctas, tiles); }
};

// What is to be split: `layers` times `tiles` of `steps` each, fewer than 2^31. The steps of a unit are powers of two.
struct Work {
  std::int64_t tiles, steps, layers;
  std::int64_t most_unit_steps, least_unit_steps;
  std::int64_t tile_values, weight_bytes;
};

// For each layer as many CTAs as the device holds at once, but no more than are worth it, nor than may store partial
// sums: in all, 24 MB (an H100's L2 has 50) or a quarter of the weight. The largest units that still give every CTA
// one, if any do.
//
// What is worth it: a CTA reads weight_bytes / ctas of weights, the last to arrive ctas / tiles partial sums, from L2,
// where it gets some 8 times as many bytes a clock. More CTAs than make both equal would finish later.
inline Split make_split(const Work& work, std::int64_t resident_ctas) {
  const std::int64_t tile_bytes = 4 * work.tile_values;
  const std::int64_t slots = std::max<std::int64_t>(24 << 20, work.weight_bytes / 4) / (work.layers * tile_bytes);
  const std::int64_t by_memory = std::max(slots - work.tiles, slots / 2);
  const double worth = std::sqrt(8.0 * work.weight_bytes / tile_bytes * work.tiles);
  const std::int64_t most = std::min({resident_ctas / work.layers, by_memory, std::int64_t{std::llround(worth)}});
  std::int64_t unit = std::max(work.most_unit_steps, work.least_unit_steps);
  const auto units = [&] { return ceil_div(work.steps, unit); };
  while (unit > work.least_unit_steps && work.tiles * units() < most) unit /= 2;
  const std::int64_t total = work.tiles * units(), ctas = std::clamp<std::int64_t>(most, 1, total);
  return {static_cast<int>(work.tiles), static_cast<int>(units()),      static_cast<int>(ctas),
          static_cast<int>(unit),       static_cast<int>(total / ctas), static_cast<int>(total % ctas)};
}

// How many CTAs the device holds at once, if registers allow `most_per_sm`. CUDA keeps 1 KB of shared memory a CTA.
inline std::int64_t resident_ctas(const DeviceLimits& limits, int shared_bytes, int most_per_sm) {
  const int by_memory = limits.shared_bytes_per_sm / (shared_bytes + 1024);
  return static_cast<std::int64_t>(limits.num_sms) * std::clamp(by_memory, 1, most_per_sm);
}

// Where the CTAs of `layers` equal splits meet: arrivals[layers][tiles], partial sums [layers][partial_slots]
// [tile_values]; nothing if no tile is split.
struct Meeting {
  std::int64_t arrivals_bytes, partials_bytes;

  Meeting(const Split& split, std::int64_t layers, std::int64_t tile_values)
      : arrivals_bytes(split.splits_tiles() ? ceil_div(layers * split.tiles * 4, 16) * 16 : 0),
        partials_bytes(arrivals_bytes == 0 ? 0 : layers * split.partial_slots() * tile_values * 4) {}

  std::int64_t bytes() const { return arrivals_bytes + partials_bytes; }
  unsigned* arrivals(void* workspace) const { return static_cast<unsigned*>(workspace); }
  float* partials(void* workspace) const {
    return reinterpret_cast<float*>(static_cast<char*>(workspace) + arrivals_bytes);
  }
};

// What both fused kernels get.
struct ProductArguments {
  const void* x;
  Packed4bit w;
  const void* bias;
  void* out;
  int M, N, K;
  int blocksize_log2;
  Split split;
  unsigned* arrivals;
  float* partials;
};

// Launches a fused kernel on the CTAs of `layers` equal splits.
template <typename Kernel>
cudaError_t launch_product(Kernel* kernel, const Product4bit& p, const Split& split, int layers, const Meeting& meeting,
                           int threads, int shared_bytes, void* workspace, cudaStream_t stream) {
  const ProductArguments arguments = {p.x,
                                      p.w,
                                      p.bias,
                                      p.out,
                                      static_cast<int>(p.M),
                                      static_cast<int>(p.N),
                                      static_cast<int>(p.K),
                                      std::countr_zero(static_cast<unsigned>(p.w.blocksize)),
                                      split,
                                      meeting.arrivals(workspace),
                                      meeting.partials(workspace)};
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess && meeting.arrivals_bytes > 0) {
    error = cudaMemsetAsync(arguments.arrivals, 0, meeting.arrivals_bytes, stream);
  }
  if (error != cudaSuccess) return error;
  kernel<<<dim3(split.ctas, layers), threads, shared_bytes, stream>>>(arguments);
  return cudaGetLastError();
}

// Tells every thread of the last of `contributors` CTAs to arrive that it is the last; the partial sums of all are then
// visible to it. All threads of the CTA must call it, after storing their part of the CTA's sum.
__device__ inline bool last_to_arrive(unsigned* arrivals, int contributors) {
  __threadfence();
  __syncthreads();
  const bool last = threadIdx.x == 0 && atomicAdd(arrivals, 1u) + 1 == static_cast<unsigned>(contributors);
  if (!__syncthreads_or(last)) return false;
  __threadfence();
  return true;
}

// The sum of values [i, i + 4) over the CTAs that computed the tile, in their order. One multiprocessor reads them
// all: several are on their way at once.
__device__ inline float4 sum_of_partials(const float* partials, const Split& split, int tile, std::int64_t tile_values,
                                         std::int64_t i) {
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (int cta = split.first_cta(tile); cta <= split.last_cta(tile); ++cta) {
    const float* partial = partials + split.partial_slot(cta, tile) * tile_values + i;
    const float4 values = __ldcg(reinterpret_cast<const float4*>(partial));
    sum.x += values.x, sum.y += values.y, sum.z += values.z, sum.w += values.w;
  }
  return sum;
}

}  // namespace qlora::cuda
