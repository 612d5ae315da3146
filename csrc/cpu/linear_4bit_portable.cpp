// linear_4bit for few rows on any machine: 32 weights of 16 bytes at a time, two of a byte by one lookup, multiplied in
// fp32.
#include "linear_4bit.h"
#include "linear_4bit_loops.h"
#include "simd_portable.h"

namespace qlora::cpu {
namespace {

struct Portable : PortableVectors, AbsmaxInTurn {
  static constexpr std::int64_t kChunk = 32;  // a run, so that all lanes have one absmax
  static constexpr int kMostRows = 8;
  static constexpr int kRowsOfW = 1;
  using Element = float;

  struct Lanes {
    explicit Lanes(std::int64_t) {}
    Vector scales(const float* absmax) const { return splat(*absmax); }
  };

  const CodePairs& pairs;

  explicit Portable(QuantType quant_type) : pairs(code_pairs(quant_type)) {}

  static constexpr int element(int i) { return i; }

  template <int kRows>
  void multiply(const std::uint8_t* packed, std::int64_t, const float* x, Vector (&products)[kRowsOfW][kRows]) const {
    constexpr int kVectors = kChunk / kLanes;
    Vector weights[kVectors];
    for (int i = 0; i < kVectors; ++i) weights[i] = pairs(packed[2 * i], packed[2 * i + 1]);
    for (int m = 0; m < kRows; ++m, x += kChunk) {
      Vector even = weights[0] * load(x), odd = weights[1] * load(x + kLanes);
      for (int i = 2; i < kVectors; i += 2) {
        even = multiply_add(weights[i], load(x + i * kLanes), even);
        odd = multiply_add(weights[i + 1], load(x + (i + 1) * kLanes), odd);
      }
      products[0][m] = even + odd;
    }
  }

  static Vector add_lanes(const Vector* x) {
    Vector lanes[] = {x[0], x[1], x[2], x[3]};
    transpose(lanes);
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
};

}  // namespace

const FewRowsKernel few_rows_portable = kAlongRows<Portable>;

}  // namespace qlora::cpu
