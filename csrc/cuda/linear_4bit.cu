// linear_4bit with few rows: y[M, N] = x[M, K] @ W[N, K]^T + bias, W decoded between memory and the tensor cores.
//
// The weight is the 16-row side of mma.m16n8k16, the rows of x are the 8-column side: tensor cores pay even for one
// row, as they take the multiply-add off the other units. A warp computes 16 * kRowTiles rows of W; a lane reads 8
// bytes of a row at a time, so that the four lanes of a row share one 64-weight quantum, and one absmax scales the
// quantum's sum in fp32. As an mma sums over K in any order, a lane's bytes are used as they lie: no repacking and no
// shuffle. With blocksize 32 a lane takes 4 bytes of each half of the quantum instead, and each half is scaled for
// itself.
//
// Per 32 weights and lane: 16 permutations and 16 loads decode, 2 loads fetch x, 2 the scales, 4 mma and 4
// multiply-adds sum.
#include <bit>
#include <climits>
#include <type_traits>

#include "../launch.h"
#include "absmax.cuh"
#include "pair_table.cuh"
#include "split.cuh"

namespace qlora::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kQuantum = 64;  // weights of a row between two scalings; the K of a slot of x
constexpr int kUnitK = 1024;  // what is dealt out to the blocks: 16 absmax codes of a row, which are read at once

// kColumnTiles: of 8 rows of x. kSmallBlocks: blocksize 32.
template <typename T_, int kColumnTiles_, bool kSmallBlocks_>
struct Config {
  using T = T_;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr bool kSmallBlocks = kSmallBlocks_;
  static constexpr int kHalves = kSmallBlocks ? 2 : 1;
  static constexpr int kRowTiles = kColumnTiles <= 2 ? 1 : 2;  // with many rows x costs more than W: use it twice
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kTileRows = kWarps * kWarpRows;
  static constexpr int kStepQuanta = kColumnTiles <= 2 ? 4 : kColumnTiles * kHalves < 16 ? 2 : 1;
  static constexpr int kUnroll = kColumnTiles > 2              ? 1
                                 : kColumnTiles * kHalves == 1 ? 4
                                                               : 2;  // more would not fit the registers
  static constexpr int kStepK = kStepQuanta * kQuantum;
  static constexpr int kStageSlots = 8 * kColumnTiles * kStepQuanta;
  static constexpr int kStages = kSlots / kStageSlots < 4 ? kSlots / kStageSlots : 4;
  static constexpr int kBlocksPerSm = kColumnTiles <= 2 ? 2 : 1;
  static constexpr int kUnitSteps = kUnitK / kStepK;
  // Shared memory: the pair table with x in its slots, the dynamic codebook, 32 scales of each row.
  static constexpr int kCodebookAt = kTableBytes;
  static constexpr int kScalesAt = kCodebookAt + 4 * kNumDynamicCodes;
  static constexpr int kSharedBytes = kScalesAt + 4 * 32 * kTileRows;
};

struct Arguments {
  const void* x;
  Packed4bit w;
  const void* bias;
  void* y;
  int M, N, K;
  int blocksize_log2;
  Split split;
  unsigned* arrivals;
  float* partials;
};

template <typename C>
__global__ void __launch_bounds__(32 * kWarps, C::kBlocksPerSm)
    linear_4bit_kernel(const __grid_constant__ Arguments args) {
  using T = typename C::T;
  extern __shared__ __align__(16) char shared[];
  auto* codebook = reinterpret_cast<float*>(shared + C::kCodebookAt);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, member = lane % 4;  // mma's row (or column) and its place in the row
  const std::uint32_t lane4 = 4 * lane;
  auto* scales = reinterpret_cast<float*>(shared + C::kScalesAt) + warp * C::kWarpRows * 32;
  const Split& split = args.split;
  const std::int64_t row_bytes = args.K / 2;
  const AbsmaxReader absmax(args.w, args.K >> args.blocksize_log2, codebook);
  const int chunk_blocks = 2 * absmax.run_length;

  for (int begin = split.begin(blockIdx.x); begin < split.begin(opaque(blockIdx.x) + 1);) {
    const int tile = begin / split.steps;
    const int first_unit = begin % split.steps;
    const int end_unit = min(split.steps, first_unit + split.begin(opaque(blockIdx.x) + 1) - begin);
    const int first_step = first_unit * C::kUnitSteps;
    const int end_step = min(end_unit * C::kUnitSteps, (args.K + C::kStepK - 1) / C::kStepK);
    const int warp_row = tile * C::kTileRows + warp * C::kWarpRows;
    const int first_block = first_step * C::kStepK >> args.blocksize_log2;
    const int end_block = end_step * C::kStepK >> args.blocksize_log2;

    // --- what a step needs: weights in registers, x in slots of the table, scales by chunks ---
    const std::uint8_t* row_weights[2 * C::kRowTiles];  // the lane's bytes of its rows, at k = 0
    int row_end[2 * C::kRowTiles];                      // and the k at which they end for this block
#pragma unroll
    for (int i = 0; i < 2 * C::kRowTiles; ++i) {
      const int row = warp_row + 8 * i + group;
      row_weights[i] = args.w.packed + row * row_bytes + member * (C::kSmallBlocks ? 4 : 8);
      row_end[i] = row < args.N ? min(args.K, end_step * C::kStepK) : 0;
    }
    struct Quantum {
      uint2 rows[2 * C::kRowTiles];
    };
    auto load_weights = [&](int k) {
      Quantum quantum;
#pragma unroll
      for (int i = 0; i < 2 * C::kRowTiles; ++i) {
        const std::uint8_t* from = row_weights[i] + k / 2;
        quantum.rows[i] = {0, 0};
        if constexpr (C::kSmallBlocks) {
          if (k < row_end[i]) quantum.rows[i].x = load_once(reinterpret_cast<const std::uint32_t*>(from));
          if (k + 32 < row_end[i]) quantum.rows[i].y = load_once(reinterpret_cast<const std::uint32_t*>(from + 16));
        } else if (k < row_end[i]) {
          quantum.rows[i] = load_once(reinterpret_cast<const uint2*>(from));
        }
      }
      return quantum;
    };
    auto stage_x = [&](int step) {
      const int copies = step < end_step ? args.M * C::kStepQuanta * 8 : 0;
#pragma unroll 1
      for (int i = threadIdx.x; i < copies; i += 32 * kWarps) {
        const int part = i % 8, quantum = i / 8 % C::kStepQuanta, m = i / (8 * C::kStepQuanta);
        const int k = step * C::kStepK + quantum * kQuantum + part * 8;
        const int slot = step % C::kStages * C::kStageSlots + m * C::kStepQuanta + quantum;
        const int swizzled = part ^ (m % 2) * (C::kSmallBlocks ? 4 : 1);
        const T* from = static_cast<const T*>(args.x) + (k < args.K ? static_cast<std::int64_t>(m) * args.K + k : 0);
        cp_async<16>(slot_address(shared, slot) + swizzled * 16, from, k < args.K ? 16 : 0);
      }
      cp_async_commit();
    };
    // A chunk of scales: two runs of each row, one run a lane.
    AbsmaxRun runs[C::kRowTiles];
    auto load_scales = [&](int chunk) {
#pragma unroll
      for (int i = 0; i < C::kRowTiles; ++i) {
        const int row = warp_row + 16 * i + lane / 2, first = chunk * chunk_blocks + lane % 2 * absmax.run_length;
        runs[i] = absmax.read(row, first, first_block, row < args.N ? end_block : 0);
      }
    };
    auto decode_scales = [&](int chunk) {
#pragma unroll
      for (int i = 0; i < C::kRowTiles; ++i) {
        const int row = warp_row + 16 * i + lane / 2, run = lane % 2 * absmax.run_length;
        if (row >= args.N) continue;
        absmax.decode(runs[i], row, chunk * chunk_blocks + run, [&](int block, float4 four) {
          const int place = (run + block) / 4 ^ lane / 2 % 8;
          reinterpret_cast<float4*>(scales)[(16 * i + lane / 2) * 8 + place] = four;
        });
      }
    };

    Quantum ahead[C::kStepQuanta];  // the weights of the next step, loaded while this one is computed
#pragma unroll
    for (int i = 0; i < C::kStepQuanta; ++i) ahead[i] = load_weights(first_step * C::kStepK + i * kQuantum);
    int chunk = first_block / chunk_blocks - 1;
    load_scales(chunk + 1);
    if (begin == split.begin(blockIdx.x)) {  // the first tile: while its weights are on their way
      fill_pair_table<T>(shared, args.w.quant_type);
      for (int i = threadIdx.x; i < kNumDynamicCodes; i += 32 * kWarps) codebook[i] = device_dynamic_codebook.value[i];
    } else {
      __syncthreads();  // all warps are done with the x of the tile before
    }
#pragma unroll
    for (int i = 0; i < C::kStages - 1; ++i) stage_x(first_step + i);

    float sum[C::kRowTiles][C::kColumnTiles][4] = {};
    for (int step = first_step; step < end_step; ++step) {
      cp_async_wait<C::kStages - 2>();
      __syncthreads();
      stage_x(step + C::kStages - 1);
      const int step_block = step * C::kStepK >> args.blocksize_log2;
      if (step_block / chunk_blocks != chunk) {
        chunk = step_block / chunk_blocks;
        decode_scales(chunk);
        __syncwarp();
        load_scales(chunk + 1);
      }

#pragma unroll C::kUnroll
      for (int quantum = 0; quantum < C::kStepQuanta; ++quantum) {
        const int k = step * C::kStepK + quantum * kQuantum;
        std::uint32_t pairs[C::kRowTiles][4][4];
#pragma unroll
        for (int i = 0; i < C::kRowTiles; ++i) {
          const uint2 upper = ahead[0].rows[2 * i], lower = ahead[0].rows[2 * i + 1];
          auto decode = [&](auto which) {  // the operand of one mma: bytes 2 which and 2 which + 1 of both rows
            constexpr int kWhich = decltype(which)::value, kByte = 2 * kWhich % 4;
            const std::uint32_t a = kWhich < 2 ? upper.x : upper.y, b = kWhich < 2 ? lower.x : lower.y;
            pairs[i][kWhich][0] = lookup_pair<kByte>(shared, a, lane4);
            pairs[i][kWhich][1] = lookup_pair<kByte>(shared, b, lane4);
            pairs[i][kWhich][2] = lookup_pair<kByte + 1>(shared, a, lane4);
            pairs[i][kWhich][3] = lookup_pair<kByte + 1>(shared, b, lane4);
          };
          decode(std::integral_constant<int, 0>{});
          decode(std::integral_constant<int, 1>{});
          decode(std::integral_constant<int, 2>{});
          decode(std::integral_constant<int, 3>{});
        }
#pragma unroll
        for (int i = 0; i + 1 < C::kStepQuanta; ++i) ahead[i] = ahead[i + 1];
        ahead[C::kStepQuanta - 1] = load_weights(k + C::kStepK);

#pragma unroll
        for (int half = 0; half < C::kHalves; ++half) {  // what one absmax scales
          const int block = k + 32 * half >> args.blocksize_log2;
          const float* scale = scales + group * 32 + ((block & (chunk_blocks - 1)) ^ 4 * group);
#pragma unroll
          for (int j = 0; j < C::kColumnTiles; ++j) {
            const int slot = step % C::kStages * C::kStageSlots + (8 * j + group) * C::kStepQuanta + quantum;
            const auto* slot_x = reinterpret_cast<const uint4*>(slot_address(shared, slot));
            uint4 x[2 / C::kHalves];
#pragma unroll
            for (int i = 0; i < 2 / C::kHalves; ++i) {
              x[i] = slot_x[C::kSmallBlocks ? (4 * half + member) ^ group % 2 * 4 : (2 * member + i) ^ group % 2];
            }
#pragma unroll
            for (int i = 0; i < C::kRowTiles; ++i) {
              float part[4] = {};
#pragma unroll
              for (int l = 0; l < 2 / C::kHalves; ++l) {
                mma_m16n8k16<T>(part, pairs[i][2 * (half + l)], x[l].x, x[l].y);
                mma_m16n8k16<T>(part, pairs[i][2 * (half + l) + 1], x[l].z, x[l].w);
              }
              sum[i][j][0] = fmaf(part[0], scale[512 * i], sum[i][j][0]);
              sum[i][j][1] = fmaf(part[1], scale[512 * i], sum[i][j][1]);
              sum[i][j][2] = fmaf(part[2], scale[512 * i + 256], sum[i][j][2]);
              sum[i][j][3] = fmaf(part[3], scale[512 * i + 256], sum[i][j][3]);
            }
          }
        }
      }
    }

    // --- the tile's sum: written if this block has all of it, else put together by the last block ---
    const auto* bias = static_cast<const T*>(args.bias);
    auto* y = static_cast<T*>(args.y);
    auto write = [&](int m, int n, float value) {
      if (bias != nullptr) value += to_float(bias[n]);
      y[static_cast<std::int64_t>(m) * args.N + n] = round_to<T>(value);
    };
    auto for_each_sum = [&](auto&& body) {  // body(m, row of the tile, sum)
      const int first_m = opaque(2 * member), first_row = opaque(warp * C::kWarpRows + group);
#pragma unroll
      for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < C::kColumnTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int m = first_m + 8 * j + e % 2, row = first_row + 16 * i + 8 * (e / 2);
            if (m < args.M && tile * C::kTileRows + row < args.N) body(m, row, sum[i][j][e]);
          }
        }
      }
    };
    const int contributors = split.last_block(tile) - split.first_block(tile) + 1;
    if (contributors == 1) {
      for_each_sum([&](int m, int row, float value) { write(m, tile * C::kTileRows + row, value); });
    } else {
      const std::int64_t tile_values = static_cast<std::int64_t>(args.M) * C::kTileRows;
      float* partial = args.partials + split.partial_slot(blockIdx.x, tile) * tile_values;
      for_each_sum([&](int m, int row, float value) { partial[m * C::kTileRows + row] = value; });
      if (last_to_arrive(args.arrivals + tile, contributors)) {
        for (int i = threadIdx.x; i < args.M * C::kTileRows; i += 32 * kWarps) {
          const int n = tile * C::kTileRows + i % C::kTileRows;
          if (n < args.N) write(i / C::kTileRows, n, sum_of_partials(args.partials, split, tile, tile_values, i));
        }
      }
    }
    begin += end_unit - first_unit;
  }
}

template <typename C>
Split split_of(const Product4bit& p, const DeviceLimits& limits) {
  return make_split((p.N + C::kTileRows - 1) / C::kTileRows, (p.K + kUnitK - 1) / kUnitK,
                    resident_blocks(limits, C::kSharedBytes, C::kBlocksPerSm));
}

// Calls body with the Config of the product.
template <typename Body>
auto with_config(const Product4bit& p, Body&& body) {
  auto with_type = [&](auto type) {
    using T = decltype(type);
    auto with_columns = [&](auto columns) {
      constexpr int kColumnTiles = decltype(columns)::value;
      return p.w.blocksize == 32 ? body(Config<T, kColumnTiles, true>{}) : body(Config<T, kColumnTiles, false>{});
    };
    if (p.M <= 8) return with_columns(std::integral_constant<int, 1>{});
    if (p.M <= 16) return with_columns(std::integral_constant<int, 2>{});
    if (p.M <= 32) return with_columns(std::integral_constant<int, 4>{});
    return with_columns(std::integral_constant<int, 8>{});
  };
  return p.dtype == DType::BFloat16 ? with_type(BFloat16{}) : with_type(Half{});
}

}  // namespace

bool takes_fused(const Product4bit& p) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; };
  return (p.dtype == DType::BFloat16 || p.dtype == DType::Float16) && 1 <= p.M && p.M <= kMostFusedRows && p.N > 0 &&
         p.N % 2 == 0 && p.K > 0 && p.K % p.w.blocksize == 0 && p.w.blocksize <= 256 && p.N <= INT_MAX / 2 &&
         p.K <= INT_MAX / 2 && aligned(p.x) && aligned(p.w.packed) && aligned(p.w.absmax);
}

std::int64_t linear_4bit_workspace_bytes(const Product4bit& p, const DeviceLimits& limits) {
  return with_config(p, [&](auto config) {
    using C = decltype(config);
    return Meeting(split_of<C>(p, limits), 1, p.M * C::kTileRows).bytes();
  });
}

cudaError_t launch_linear_4bit(const Product4bit& p, const DeviceLimits& limits, void* workspace, cudaStream_t stream) {
  if (!takes_fused(p)) return cudaErrorInvalidValue;
  return with_config(p, [&](auto config) {
    using C = decltype(config);
    const Split split = split_of<C>(p, limits);
    const Meeting meeting(split, 1, p.M * C::kTileRows);
    const Arguments args = {p.x,
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
    return launch_split(linear_4bit_kernel<C>, split.blocks, 32 * kWarps, C::kSharedBytes, args, meeting, stream);
  });
}

}  // namespace qlora::cuda
