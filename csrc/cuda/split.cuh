// How a product is split over the device, and put together again.
//
// The output is cut into tiles, each tile's sum into units; the units of all tiles, one after the other, are dealt out
// in equal runs, one to a block, so that every multiprocessor has the same work whatever the shape. A tile that one
// block computes whole is written at once. Else each of its blocks stores its partial sum, and the last to arrive adds
// them up, in the order of the blocks: the result does not depend on the order in which they ran.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "../launch.h"

namespace qlora::cuda {

struct Split {
  int tiles, units, blocks;  // units: of a tile
  int unit_steps;            // what the kernel computes between two looks at this
  int run, longer_runs;      // a block has `run` units, the first `longer_runs` blocks one more

  __host__ __device__ int begin(int block) const { return block * run + (block < longer_runs ? block : longer_runs); }
  // The block that computes this one of all units.
  __host__ __device__ int block_of(int unit) const {
    const int in_longer = longer_runs * (run + 1);
    return unit < in_longer ? unit / (run + 1) : longer_runs + (unit - in_longer) / run;
  }
  __host__ __device__ int first_block(int tile) const { return block_of(tile * units); }
  __host__ __device__ int last_block(int tile) const { return block_of((tile + 1) * units - 1); }
  // Where the block puts its partial sum of the tile. If blocks are more, each next piece along the units has the next
  // block or the next tile; else a block has two unfinished tiles at most, its first and its last.
  __host__ __device__ int partial_slot(int block, int tile) const {
    return tiles < blocks ? block + tile : 2 * block + (begin(block) / units != tile);
  }
  __host__ __device__ int partial_slots() const { return blocks + std::min(blocks, tiles); }
};

// What is to be split: `layers` times `tiles` of `steps` each, fewer than 2^31. The steps of a unit are powers of two.
struct Work {
  std::int64_t tiles, steps, layers;
  std::int64_t most_unit_steps, least_unit_steps;
  std::int64_t tile_values, weight_bytes;
};

// For each layer as many blocks as the device holds at once, or as are worth it, or as may store partial sums: in all,
// 24 MB (an H100's L2 has 50) or a quarter of the weight. The largest units that are as many, if any are.
//
// What is worth it: a block reads weight_bytes / blocks of weights, the last to arrive blocks / tiles partial sums,
// from L2, where it gets some 8 times as many bytes a clock. More blocks than make both equal would finish later.
inline Split make_split(const Work& work, std::int64_t resident_blocks) {
  const std::int64_t tile_bytes = 4 * work.tile_values;
  const std::int64_t slots = std::max<std::int64_t>(24 << 20, work.weight_bytes / 4) / (work.layers * tile_bytes);
  const std::int64_t by_memory = std::max(slots - work.tiles, slots / 2);
  const double worth = std::sqrt(8.0 * work.weight_bytes / tile_bytes * work.tiles);
  const std::int64_t most = std::min({resident_blocks / work.layers, by_memory, std::int64_t{std::llround(worth)}});
  std::int64_t unit = std::max(work.most_unit_steps, work.least_unit_steps);
  const auto units = [&] { return (work.steps + unit - 1) / unit; };
  while (unit > work.least_unit_steps && work.tiles * units() < most) unit /= 2;
  const std::int64_t total = work.tiles * units(), blocks = std::clamp<std::int64_t>(most, 1, total);
  return {static_cast<int>(work.tiles), static_cast<int>(units()),        static_cast<int>(blocks),
          static_cast<int>(unit),       static_cast<int>(total / blocks), static_cast<int>(total % blocks)};
}

// How many blocks the device holds at once, if registers allow `most_per_sm`. CUDA keeps 1 KB of shared memory a block.
inline std::int64_t resident_blocks(const DeviceLimits& limits, int shared_bytes, int most_per_sm) {
  const int by_memory = limits.shared_bytes_per_sm / (shared_bytes + 1024);
  return static_cast<std::int64_t>(limits.num_sms) * std::clamp(by_memory, 1, most_per_sm);
}

// Where the blocks of `layers` equal splits meet: arrivals[layers][tiles], partial sums [layers][partial_slots]
// [tile_values]; nothing if no tile is split.
struct Meeting {
  std::int64_t arrivals_bytes, partials_bytes;

  Meeting(const Split& split, std::int64_t layers, std::int64_t tile_values)
      : arrivals_bytes(split.tiles % split.blocks == 0 ? 0 : (layers * split.tiles * 4 + 15) / 16 * 16),
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

// Launches a fused kernel on the blocks of `layers` equal splits.
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
  kernel<<<dim3(split.blocks, layers), threads, shared_bytes, stream>>>(arguments);
  return cudaGetLastError();
}

// Tells every thread of the last of `contributors` blocks to arrive that it is the last; the partial sums of all are
// then visible to it. All threads of the block must call it, after storing their part of the block's sum.
__device__ inline bool last_to_arrive(unsigned* arrivals, int contributors) {
  __threadfence();
  __syncthreads();
  const bool last = threadIdx.x == 0 && atomicAdd(arrivals, 1u) + 1 == static_cast<unsigned>(contributors);
  if (!__syncthreads_or(last)) return false;
  __threadfence();
  return true;
}

// The sum of values [i, i + 4) over the blocks that computed the tile, in their order. One multiprocessor reads them
// all: several are on their way at once.
__device__ inline float4 sum_of_partials(const float* partials, const Split& split, int tile, std::int64_t tile_values,
                                         std::int64_t i) {
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (int block = split.first_block(tile); block <= split.last_block(tile); ++block) {
    const float* partial = partials + split.partial_slot(block, tile) * tile_values + i;
    const float4 values = __ldcg(reinterpret_cast<const float4*>(partial));
    sum.x += values.x, sum.y += values.y, sum.z += values.z, sum.w += values.w;
  }
  return sum;
}

}  // namespace qlora::cuda
