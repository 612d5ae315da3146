// Reads absmax by runs along a row of the weight: 16 bytes, that is 16 codes or 4 floats.
#pragma once

#include "../codec.h"

namespace qlora::cuda {

// The bytes of a run, as they were read.
struct AbsmaxRun {
  std::uint32_t words[4];
};

// The absmax of a weight [rows, blocks_per_row * blocksize].
struct AbsmaxReader {
  const char* absmax;
  const float* nested_absmax;  // null without double quantization
  float nested_offset;
  const float* dynamic_codebook;  // in shared memory
  int blocks_per_row;
  int run_length;  // in blocks

  __device__ AbsmaxReader(const Packed4bit& w, int blocks_per_row, const float* dynamic_codebook)
      : absmax(static_cast<const char*>(w.absmax)),
        nested_absmax(w.nested_absmax),
        nested_offset(w.nested_absmax == nullptr ? 0.0f : __ldg(w.nested_offset)),
        dynamic_codebook(dynamic_codebook),
        blocks_per_row(blocks_per_row),
        run_length(w.nested_absmax == nullptr ? 4 : 16) {}

  // The run of the row that begins with block `first`, as far as it lies in [begin, end); nothing else is read, since
  // another block of threads reads it.
  __device__ AbsmaxRun read(std::int64_t row, int first, int begin, int end) const {
    AbsmaxRun run{};
    begin = max(begin, first);
    end = min(min(end, blocks_per_row), first + run_length);
    if (begin >= end) return run;
    const std::int64_t index = row * blocks_per_row + first;
    const char* from = absmax + index * (16 / run_length);
    if (end - begin == run_length && reinterpret_cast<std::uintptr_t>(from) % 16 == 0) {
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
      run.words[0] = words.x, run.words[1] = words.y, run.words[2] = words.z, run.words[3] = words.w;
    } else {
      const int word_length = run_length / 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int word_first = first + i * word_length;
        if (begin <= word_first && word_first + word_length <= end && reinterpret_cast<std::uintptr_t>(from) % 4 == 0) {
          run.words[i] = __ldg(reinterpret_cast<const std::uint32_t*>(from) + i);
        } else {
#pragma unroll 1
          for (int block = max(begin, word_first); block < min(end, word_first + word_length); ++block) {
            const auto code = __ldg(reinterpret_cast<const std::uint8_t*>(from) + (block - first));
            run.words[i] |= static_cast<std::uint32_t>(code) << 8 * (block - word_first);
          }
        }
      }
    }
    return run;
  }

  // Stores the blocks of a run that read() gave for the same row and `first`, four at a time: store(block - first, four
  // values). Where the run has no block the values mean nothing.
  template <typename Store>
  __device__ void decode(AbsmaxRun run, std::int64_t row, int first, Store&& store) const {
    if (nested_absmax == nullptr) {
      store(0, make_float4(__uint_as_float(run.words[0]), __uint_as_float(run.words[1]), __uint_as_float(run.words[2]),
                           __uint_as_float(run.words[3])));
      return;
    }
    if (first >= blocks_per_row) return;
    const std::int64_t index = row * blocks_per_row + first;
    const int last = min(first + run_length, blocks_per_row) - 1;
    const float nested_first = __ldg(nested_absmax + index / kNestedBlocksize);
    const float nested_last = __ldg(nested_absmax + (index + last - first) / kNestedBlocksize);
    const int in_first = kNestedBlocksize - static_cast<int>(index % kNestedBlocksize);  // blocks of the first group
#pragma unroll 1
    for (int i = 0; i < run_length; i += 4) {
      float value[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float nested = i + j < in_first ? nested_first : nested_last;
        value[j] = decode_dynamic(dynamic_codebook[run.words[0] >> 8 * j & 0xff], nested, nested_offset);
      }
      run.words[0] = run.words[1], run.words[1] = run.words[2], run.words[2] = run.words[3];
      store(i, make_float4(value[0], value[1], value[2], value[3]));
    }
  }
};

}  // namespace qlora::cuda
