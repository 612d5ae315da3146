// The format one value at a time: conversions against exhaustive or independent computation, encode against a linear
// search; and the portable vectors' conversions against those of one value.
#include <cmath>
#include <cstring>

#include "check.h"
#include "codec.h"
#include "cpu/simd_portable.h"

using namespace qlora;

namespace {

// Nearest fp16 or bf16 by trying both neighbours in double: independent of the bit tricks under test.
template <typename T>
bool is_nearest_even(float x, T rounded) {
  const double error = std::fabs(static_cast<double>(to_float(rounded)) - x);
  for (int step : {-1, 1}) {
    T other = rounded;
    other.bits = static_cast<std::uint16_t>(other.bits + step);
    const double value = to_float(other);
    if (!std::isfinite(value)) continue;
    const double other_error = std::fabs(value - x);
    if (other_error < error || (other_error == error && rounded.bits % 2 == 1)) return false;
  }
  return true;
}

template <typename T>
void check_conversions(float largest) {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const T value{static_cast<std::uint16_t>(bits)};
    const float wide = to_float(value);
    if (wide != wide) {
      CHECK(to_float(round_to<T>(wide)) != to_float(round_to<T>(wide)));
    } else {
      CHECK_EQ(round_to<T>(wide).bits, value.bits);  // every value survives the round trip
    }
  }
  std::uint32_t state = 1;
  for (int i = 0; i < 2000000; ++i) {
    state = state * 1664525u + 1013904223u;
    const float x = std::bit_cast<float>(state);
    if (x != x || std::fabs(x) > largest) continue;
    CHECK(is_nearest_even(x, round_to<T>(x)));
  }
}

std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }

// Every upper half of a float, with lower ones around which roundings change.
template <typename T>
void check_vectors() {
  using Vectors = cpu::PortableVectors;
  for (std::uint32_t upper = 0; upper < 0x10000; ++upper) {
    const std::int64_t lane = upper % Vectors::kLanes;
    T values[Vectors::kLanes] = {};
    values[lane].bits = static_cast<std::uint16_t>(upper);
    const Vectors::Vector wide = Vectors::load(values);
    for (std::int64_t i = 0; i < Vectors::kLanes; ++i) CHECK_EQ(bits_of(wide[i]), bits_of(to_float(values[i])));
    for (const std::uint32_t lower :
         {0x0000u, 0x0001u, 0x0fffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u, 0xf000u}) {
      Vectors::Vector x{};
      x[lane] = std::bit_cast<float>(upper << 16 | lower);
      Vectors::store(values, x);
      for (std::int64_t i = 0; i < Vectors::kLanes; ++i) CHECK_EQ(values[i].bits, round_to<T>(x[i]).bits);
    }
  }
}

void check_encode(QuantType quant_type) {
  const Codebook& book = codebook(quant_type);
  for (int i = -40000; i <= 40000; ++i) {
    const float x = static_cast<float>(i) / 32768.0f;
    const std::uint8_t code = encode(book, x);
    for (float value : book.value) {  // fp32 midpoints may be one ulp off the real ones
      CHECK(std::fabs(book.value[code] - x) <= std::fabs(value - x) + 1e-7f);
    }
    CHECK(quant_type == QuantType::NF4 || code != 8);
  }
  for (int rank = 0; rank < kNumCodes - 1; ++rank) {  // strict: a bound itself belongs to the lower rank
    if (std::isinf(book.bound[rank])) continue;
    CHECK_EQ(encode(book, book.bound[rank]), book.code_of_rank[rank]);
    CHECK_EQ(encode(book, std::nextafter(book.bound[rank], 2.0f)), book.code_of_rank[rank + 1]);
  }
  CHECK_EQ(encode(book, NAN), book.code_of_rank[0]);
}

void check_dynamic() {
  for (int i = -70000; i <= 70000; ++i) {
    const float x = static_cast<float>(i) / 65536.0f;
    const int code = encode_dynamic(kDynamicCodebook.bound, x);
    int nearest = 0;
    for (int other = 1; other < kNumDynamicCodes; ++other) {
      const double better = std::fabs(static_cast<double>(kDynamicCodebook.value[other]) - x);
      if (better < std::fabs(static_cast<double>(kDynamicCodebook.value[nearest]) - x)) nearest = other;
    }
    CHECK_EQ(code, nearest);
  }
  for (int code = 0; code < kNumDynamicCodes; ++code)
    CHECK_EQ(encode_dynamic(kDynamicCodebook.bound, kDynamicCodebook.value[code]), code);
}

void check_bytes() {
  const std::uint8_t packed[] = {pack(3, 12), pack(15, 0)};
  const std::uint8_t expected[] = {3, 12, 15, 0};
  CHECK_EQ(packed[0], 0x3c);
  for (int i = 0; i < 4; ++i) CHECK_EQ(unpack(packed, i), expected[i]);
  CHECK(std::isfinite(inverse_absmax(0.0f)) && std::isnan(inverse_absmax(NAN)));
  CHECK_EQ(0.0f * inverse_group_absmax(0.0f), 0.0f);
}

}  // namespace

int main() {
  check_conversions<Half>(65519.0f);
  check_conversions<BFloat16>(3.38e38f);
  check_vectors<Half>();
  check_vectors<BFloat16>();
  check_encode(QuantType::NF4);
  check_encode(QuantType::FP4);
  check_dynamic();
  check_bytes();
  return failures();
}
