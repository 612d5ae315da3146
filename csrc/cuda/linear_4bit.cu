// linear_4bit with few rows: y[M, N] = x[M, K] @ W[N, K]^T + bias, W decoded between memory and the tensor cores.
//
// The weight is the 16-row side of mma.m16n8k16, the rows of x are the 8-column side: tensor cores pay even for one
// row, as they take the multiply-add off the other units. A warp computes 16 * kRowTiles rows of W; a lane reads 8
// bytes of a row at a time, so that the four lanes of a row share one 64-weight quantum, and one absmax scales the
// quantum's sum in fp32. As an mma sums over K in any order, a lane's bytes are used as they lie: no repacking and no
// shuffle. With blocksize 32 a lane takes 4 bytes of each half of the quantum instead, and each half is scaled for
// itself.
//
// Per 32 weights and lane: 16 permutations and 16 loads decode, 2 loads fetch x and half a load the scales, 4 mma and 4
// multiply-adds sum.
#include <climits>
#include <type_traits>

#include "../launch.h"
#include "absmax.cuh"
#include "pair_table.cuh"
#include "ptx.cuh"
#include "split.cuh"

namespace qlora::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kQuantum = 64;  // weights of a row between two scalings; the K of a slot of x
constexpr int kUnitK = 1024;  // the most that is dealt out to the CTAs at once: 16 absmax codes of a row, one read

// kColumnTiles: of 8 rows of x. kSmallBlocks: blocksize 32.
template <typename T_, int kColumnTiles_, bool kSmallBlocks_>
struct Config {
  using T = T_;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr bool kSmallBlocks = kSmallBlocks_;
  static constexpr int kHalves = kSmallBlocks ? 2 : 1;         // parts of a quantum with a scale of their own
  static constexpr int kRowTiles = kColumnTiles <= 2 ? 1 : 2;  // with many rows x costs more than W: use it twice
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kTileRows = kWarps * kWarpRows;
  // Quanta between two barriers, of a row's weights loaded ahead, and computed at once: as far as registers reach.
  static constexpr int kStepQuanta = kColumnTiles == 1             ? 8 / kHalves
                                     : kColumnTiles == 2           ? 4
                                     : kColumnTiles * kHalves < 16 ? 2
                                                                   : 1;
  static constexpr int kAhead = kStepQuanta < 4 ? kStepQuanta : 4;
  static constexpr int kUnroll = kColumnTiles > 2 ? 1 : kColumnTiles * kHalves == 1 ? 8 : 2;
  static constexpr int kStepK = kStepQuanta * kQuantum;
  static constexpr int kStageSlots = 8 * kColumnTiles * kStepQuanta;
  static constexpr int kStages = kSlots / kStageSlots < 4 ? kSlots / kStageSlots : 4;
  static constexpr int kCtasPerSm = kColumnTiles <= 2 ? 2 : 1;
  // Shared memory: the pair table with x in its slots, the dynamic codebook, 32 scales of each row.
  static constexpr int kCodebookAt = kTableBytes;
  static constexpr int kScalesAt = kCodebookAt + 4 * kNumDynamicCodes;
  static constexpr int kSharedBytes = kScalesAt + 4 * 32 * kTileRows;
};

template <typename C>
__global__ void __launch_bounds__(kThreads, C::kCtasPerSm)
    linear_4bit_kernel(const __grid_constant__ ProductArguments args) {
#if QLORA_FUSED
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
  // The scales of a chunk of K are decoded at once: of each row two runs of absmax, one a lane, repeated for every
  // quantum (or half quantum) of a block, 32 at most.
  const int repeats_log2 = C::kSmallBlocks ? 0 : args.blocksize_log2 - 6;
  const int run_blocks = min(absmax.run_length, 16 >> repeats_log2);
  const int chunk_scales_log2 = 31 - __clz(2 * run_blocks << repeats_log2);

  for (int begin = split.begin(blockIdx.x); begin < split.begin(opaque(blockIdx.x) + 1);) {
    const int tile = begin / split.units;
    const int first_unit = begin % split.units;
    const int end_unit = min(split.units, first_unit + split.begin(opaque(blockIdx.x) + 1) - begin);
    const int first_step = first_unit * split.unit_steps;
    const int end_step = min(end_unit * split.unit_steps, (args.K + C::kStepK - 1) / C::kStepK);
    const int end_k = min(args.K, end_step * C::kStepK);
    const int warp_row = tile * C::kTileRows + warp * C::kWarpRows;

    // --- weights: in registers, kAhead quanta ahead ---
    const std::uint8_t* next_weights[2 * C::kRowTiles];  // what the lane loads next of its rows
    bool row_inside[2 * C::kRowTiles];
#pragma unroll
    for (int i = 0; i < 2 * C::kRowTiles; ++i) {
      const int row = warp_row + 8 * i + group;
      next_weights[i] =
          args.w.packed + row * row_bytes + first_step * (C::kStepK / 2) + member * (C::kSmallBlocks ? 4 : 8);
      row_inside[i] = row < args.N;
    }
    struct Quantum {
      uint2 rows[2 * C::kRowTiles];
    };
    // Where a row, or K, ends the weights are any: x is 0 there, or the sum is not kept.
    auto load_weights = [&](int quantum_ahead, bool inside, bool half_inside) {
      Quantum quantum;
#pragma unroll
      for (int i = 0; i < 2 * C::kRowTiles; ++i) {
        const std::uint8_t* from = next_weights[i] + quantum_ahead * (kQuantum / 2);
        if constexpr (C::kSmallBlocks) {
          load_once(quantum.rows[i].x, from, row_inside[i] && inside);
          load_once(quantum.rows[i].y, from + 16, row_inside[i] && half_inside);
        } else {
          load_once(quantum.rows[i], from, row_inside[i] && inside);
        }
      }
      return quantum;
    };

    // --- x: in slots of the table, kStages - 1 steps ahead. 16-byte parts are swizzled: rows must not conflict ---
    constexpr int kRowParts = C::kStepQuanta * 8, kPassRows = kThreads / kRowParts;
    const int x_quantum = threadIdx.x % kRowParts / 8, x_part = threadIdx.x % 8, x_row = threadIdx.x / kRowParts;
    char* x_to = slot_address(shared, x_row * C::kStepQuanta + x_quantum) +
                 (x_part ^ x_row % 2 * (C::kSmallBlocks ? 4 : 1)) * 16;
    const T* x_from =
        static_cast<const T*>(args.x) + static_cast<std::int64_t>(x_row) * args.K + x_quantum * kQuantum + x_part * 8;
    auto stage_x = [&](int step) {
      if (step < end_step) {
        const int k = step * C::kStepK;
        const int bytes = k + x_quantum * kQuantum + x_part * 8 < args.K ? 16 : 0;
#pragma unroll
        for (int i = 0; i < 8 * C::kColumnTiles; i += kPassRows) {
          if (x_row + i >= args.M) break;
          cp_async(x_to + (step % C::kStages * C::kStageSlots + i * C::kStepQuanta) * kSlotStride,
                   bytes > 0 ? x_from + static_cast<std::int64_t>(i) * args.K + k : args.x, bytes);
        }
      }
      cp_async_commit();
    };

    // --- scales: decoded by the warp that uses them, into shared memory ---
    auto decode_scales = [&](int chunk) {
#pragma unroll 1
      for (int i = 0; i < C::kRowTiles; ++i) {
        const int row = warp_row + 16 * i + lane / 2;
        const int first = (2 * chunk + lane % 2) * run_blocks, begin = first_step * C::kStepK >> args.blocksize_log2;
        const int end = min(first + run_blocks, end_k >> args.blocksize_log2);
        if (row >= args.N) continue;
        absmax.decode(absmax.read(row, first, begin, end), row, first, run_blocks, [&](int block, float value) {
          const int place = lane % 2 * run_blocks + block << repeats_log2;
#pragma unroll 1
          for (int j = 0; j < 1 << repeats_log2; ++j) {
            scales[(16 * i + lane / 2) * 32 + (place + j ^ lane / 2 % 8 * 4)] = value;
          }
        });
      }
    };

    Quantum ahead[C::kAhead];
#pragma unroll
    for (int i = 0; i < C::kAhead; ++i) {
      const int k = first_step * C::kStepK + i * kQuantum;
      ahead[i] = load_weights(i, k < end_k, k + 32 < end_k);
    }
    for (const std::uint8_t*& next : next_weights) next += C::kAhead * (kQuantum / 2);
    constexpr int kStepScales = C::kStepQuanta * C::kHalves;

    if (begin == split.begin(blockIdx.x)) {  // the first tile: while its weights are on their way
      fill_pair_table<T>(shared, args.w.quant_type);
      for (int i = threadIdx.x; i < kNumDynamicCodes; i += kThreads) codebook[i] = device_dynamic_codebook.value[i];
    } else {
      __syncthreads();  // all warps are done with the x of the tile before
    }
#pragma unroll
    for (int i = 0; i < C::kStages - 1; ++i) stage_x(first_step + i);

    float sum[C::kRowTiles][C::kColumnTiles][4] = {};
    // all_inside: the weights that it loads are known to lie within K.
    auto compute = [&](unsigned step, auto all_inside) {
      float4 four_scales[2 * C::kRowTiles];
#pragma unroll C::kUnroll
      for (unsigned quantum = 0; quantum < C::kStepQuanta; ++quantum) {
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
        for (int i = 0; i + 1 < C::kAhead; ++i) ahead[i] = ahead[i + 1];
        const int next_k = step * C::kStepK + (quantum + C::kAhead) * kQuantum;
        ahead[C::kAhead - 1] =
            load_weights(quantum, all_inside() || next_k < end_k, all_inside() || next_k + 32 < end_k);

#pragma unroll
        for (int half = 0; half < C::kHalves; ++half) {
          const unsigned place = (step * C::kStepQuanta + quantum) * C::kHalves + half;
          const float* place_scales =
              scales + group * 32 + ((place / 4 & ((1u << chunk_scales_log2) / 4 - 1)) ^ group) * 4;
          if constexpr (C::kUnroll % 4 == 0) {
            if (quantum % 4 == 0) {
#pragma unroll
              for (int i = 0; i < 2 * C::kRowTiles; ++i) {
                four_scales[i] = *reinterpret_cast<const float4*>(place_scales + 256 * i);
              }
            }
          }
          auto scale = [&](int i) {
            if constexpr (C::kUnroll % 4 != 0) return place_scales[256 * i + place % 4];
            const float4 four = four_scales[i];
            return quantum % 4 == 0 ? four.x : quantum % 4 == 1 ? four.y : quantum % 4 == 2 ? four.z : four.w;
          };
#pragma unroll
          for (int j = 0; j < C::kColumnTiles; ++j) {
            const unsigned slot = step % C::kStages * C::kStageSlots + (8 * j + group) * C::kStepQuanta + quantum;
            const auto* slot_x = reinterpret_cast<const uint4*>(slot_address(shared, slot));
            uint4 x[2 / C::kHalves];
#pragma unroll
            for (int i = 0; i < 2 / C::kHalves; ++i) {
              if constexpr (C::kSmallBlocks) {
                x[i] = load_shared_16(slot_x + ((4 * half + member) ^ group % 2 * 4));
              } else {
                x[i] = slot_x[(2 * member + i) ^ group % 2];
              }
            }
#pragma unroll
            for (int i = 0; i < C::kRowTiles; ++i) {
              float part[4];
              mma<T>(part, pairs[i][2 * half], x[0].x, x[0].y);
              mma_add<T>(part, pairs[i][2 * half + 1], x[0].z, x[0].w);
              if constexpr (!C::kSmallBlocks) {
                mma_add<T>(part, pairs[i][2], x[1].x, x[1].y);
                mma_add<T>(part, pairs[i][3], x[1].z, x[1].w);
              }
              sum[i][j][0] = fmaf(part[0], scale(2 * i), sum[i][j][0]);
              sum[i][j][1] = fmaf(part[1], scale(2 * i), sum[i][j][1]);
              sum[i][j][2] = fmaf(part[2], scale(2 * i + 1), sum[i][j][2]);
              sum[i][j][3] = fmaf(part[3], scale(2 * i + 1), sum[i][j][3]);
            }
          }
        }
      }
#pragma unroll
      for (const std::uint8_t*& next : next_weights) next += C::kStepK / 2;
    };
    auto prepare = [&](int step) {
      cp_async_wait<C::kStages - 2>();
      __syncthreads();
      stage_x(step + C::kStages - 1);
      if (step == first_step || (step * kStepScales & ((1 << chunk_scales_log2) - 1)) == 0) {
        decode_scales(step * kStepScales >> chunk_scales_log2);
        __syncwarp();
      }
    };
    int step = first_step;
    for (; (step + 1) * C::kStepK + C::kAhead * kQuantum <= end_k; ++step) {
      prepare(step);
      compute(step, std::true_type{});
    }
    for (; step < end_step; ++step) {
      prepare(step);
      compute(step, std::false_type{});
    }

    // --- the tile's sum: written if this CTA has all of it, else put together by the last CTA ---
    const auto* bias = static_cast<const T*>(args.bias);
    auto* y = static_cast<T*>(args.out);
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
    const int contributors = split.last_cta(tile) - split.first_cta(tile) + 1;
    if (contributors == 1) {
      for_each_sum([&](int m, int row, float value) { write(m, tile * C::kTileRows + row, value); });
    } else {
      const std::int64_t tile_values = static_cast<std::int64_t>(args.M) * C::kTileRows;
      float* partial = args.partials + split.partial_slot(blockIdx.x, tile) * tile_values;
      for_each_sum([&](int m, int row, float value) { partial[m * C::kTileRows + row] = value; });
      if (last_to_arrive(args.arrivals + tile, contributors)) {
        for (int i = 4 * threadIdx.x; i < args.M * C::kTileRows; i += 4 * kThreads) {
          const int m = i / C::kTileRows, n = tile * C::kTileRows + i % C::kTileRows;
          if (n >= args.N) continue;
          const float4 four = sum_of_partials(args.partials, split, tile, tile_values, i);
          write(m, n, four.x), write(m, n + 1, four.y);  // N is even
          if (n + 2 < args.N) write(m, n + 2, four.z), write(m, n + 3, four.w);
        }
      }
    }
    // Computes end_unit again: kept, it would take a register all through the loop.
    begin = min((tile + 1) * split.units, split.begin(opaque(blockIdx.x) + 1));
  }
#else
  __trap();
#endif
}

template <typename C>
Split split_of(const Product4bit& p, const DeviceLimits& limits) {
  const Work work = {.tiles = ceil_div(p.N, C::kTileRows),
                     .steps = ceil_div(p.K, C::kStepK),
                     .layers = 1,
                     .most_unit_steps = kUnitK / C::kStepK,
                     // No two units share an absmax: the kernel knows those of a unit as whole blocks.
                     .least_unit_steps = std::max<std::int64_t>(p.w.blocksize / C::kStepK, 1),
                     .tile_values = p.M * C::kTileRows,
                     .weight_bytes = p.N * p.K / 2};
  return make_split(work, resident_ctas(limits, C::kSharedBytes, C::kCtasPerSm));
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
    return launch_product(linear_4bit_kernel<C>, p, split, 1, meeting, kThreads, C::kSharedBytes, workspace, stream);
  });
}

}  // namespace qlora::cuda
