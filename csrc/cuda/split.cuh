// How a product is split over the device, and put together again.
//
// The output is cut into tiles, each tile's sum into steps; the steps of all tiles, one after the other, are dealt out
// in equal runs, one to a block, so that every multiprocessor has the same work whatever the shape. A tile that one
// block computes whole is written at once. Else each of its blocks stores its partial sum, and the last to arrive adds
// them up, in the order of the blocks: the result does not depend on the order in which they ran.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "../launch.h"

namespace qlora::cuda {

struct Split {
  int tiles, steps, blocks;
  int run, longer_runs;  // a block has `run` steps, the first `longer_runs` blocks one more

  __host__ __device__ int begin(int block) const { return block * run + (block < longer_runs ? block : longer_runs); }
  // The block that computes this one of all steps.
  __host__ __device__ int block_of(int step) const {
    const int in_longer = longer_runs * (run + 1);
    return step < in_longer ? step / (run + 1) : longer_runs + (step - in_longer) / run;
  }
  __host__ __device__ int first_block(int tile) const { return block_of(tile * steps); }
  __host__ __device__ int last_block(int tile) const { return block_of((tile + 1) * steps - 1); }
  // Where the block puts its partial sum of the tile. If blocks are more, each next piece along the steps has the next
  // block or the next tile; else a block has two unfinished tiles at most, its first and its last.
  __host__ __device__ int partial_slot(int block, int tile) const {
    return tiles < blocks ? block + tile : 2 * block + (begin(block) / steps != tile);
  }
  __host__ __device__ int partial_slots() const { return blocks + std::min(blocks, tiles); }
};

// As many blocks for each of `layers` equal splits as the device holds at once, or as there are steps (fewer than
// 2^31), or as may store partial sums of `tile_values` floats: in all, 8 MB or a quarter of the weight.
inline Split make_split(std::int64_t tiles, std::int64_t steps, std::int64_t layers, std::int64_t tile_values,
                        std::int64_t resident_blocks, std::int64_t weight_bytes) {
  const std::int64_t total = tiles * steps;
  const std::int64_t slots = std::max<std::int64_t>(8 << 20, weight_bytes / 4) / (layers * tile_values * 4);
  const std::int64_t by_memory = std::max(slots - tiles, slots / 2);
  const std::int64_t blocks = std::clamp<std::int64_t>(std::min(resident_blocks / layers, by_memory), 1, total);
  return {static_cast<int>(tiles), static_cast<int>(steps), static_cast<int>(blocks), static_cast<int>(total / blocks),
          static_cast<int>(total % blocks)};
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

// The sum of value i over the blocks that computed the tile, in their order.
__device__ inline float sum_of_partials(const float* partials, const Split& split, int tile, std::int64_t tile_values,
                                        std::int64_t i) {
  float sum = 0.0f;
  for (int block = split.first_block(tile); block <= split.last_block(tile); ++block) {
    sum += __ldcg(partials + split.partial_slot(block, tile) * tile_values + i);
  }
  return sum;
}

}  // namespace qlora::cuda
