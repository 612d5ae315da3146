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

  // The run of the row that begins with block `first`, as far as it lies in [begin, end), which lies in the row;
  // nothing else is read, since another CTA reads it.
  __device__ AbsmaxRun read(std::int64_t row, int first, int begin, int end) const {
    AbsmaxRun run{};
    begin = max(begin, first);
    end = min(end, first + run_length);
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

  // Stores the first `count` blocks of a run that read() gave for the same row and `first`: store(block - first,
  // value). Where the run has no block the value means nothing.
  template <typename Store>
  __device__ void decode(AbsmaxRun run, std::int64_t row, int first, int count, Store&& store) const {
    const bool nested = nested_absmax != nullptr;
    const std::int64_t index = row * blocks_per_row + first;
    const int last = min(first + count, blocks_per_row) - 1;
    const bool has_blocks = first <= last;
    const float group_absmax = nested && has_blocks ? __ldg(nested_absmax + index / kNestedBlocksize) : 0.0f;
    const float last_absmax =
        nested && has_blocks ? __ldg(nested_absmax + (index + last - first) / kNestedBlocksize) : 0.0f;
    const int in_group = kNestedBlocksize - static_cast<int>(index % kNestedBlocksize);  // blocks of the first group
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      if (nested) {
        const float code = dynamic_codebook[run.words[0] & 0xff];
        store(i, decode_dynamic(code, i < in_group ? group_absmax : last_absmax, nested_offset));
      } else {
        store(i, __uint_as_float(run.words[0]));
      }
      if (!nested || i % 4 == 3) {
        run.words[0] = run.words[1], run.words[1] = run.words[2], run.words[2] = run.words[3];
      } else {
        run.words[0] >>= 8;
      }
    }
  }
};

}  // namespace qlora::cuda
