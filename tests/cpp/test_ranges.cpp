// The kernels give the same bytes on every path and for every split of the work: the contract that threading rests on.
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/dequantize_4bit.h"
#include "cpu/path.h"
#include "cpu/quantize.h"
#include "double_quant.h"

using namespace qlora;

namespace {

struct Quantized {
  std::vector<std::uint8_t> packed;
  std::vector<float> absmax;
};

std::vector<std::uint8_t> make_weight(std::int64_t n, DType dtype) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(n * itemsize(dtype)));
  for (std::int64_t i = 0; i < n; ++i) {
    with_type(dtype, [&](auto type) {
      const auto value = round_to<decltype(type)>(i % 1000 < 130 ? 0.0f : normal(random));
      std::memcpy(bytes.data() + i * itemsize(dtype), &value, sizeof value);
    });
  }
  return bytes;
}

Quantized quantize(const void* weight, DType dtype, std::int64_t n, std::int64_t blocksize, QuantType quant_type,
                   std::int64_t step) {
  const std::int64_t blocks = (n + blocksize - 1) / blocksize;
  Quantized out{std::vector<std::uint8_t>(static_cast<std::size_t>((n + 1) / 2)),
                std::vector<float>(static_cast<std::size_t>(blocks))};
  for (std::int64_t begin = 0; begin < blocks; begin += step) {
    cpu::quantize_4bit(weight, dtype, n, blocksize, quant_type, begin, std::min(blocks, begin + step),
                       out.packed.data(), out.absmax.data());
  }
  return out;
}

std::vector<std::uint8_t> dequantize(const Packed4bit& w, std::int64_t n, DType dtype, std::int64_t step,
                                     bool past_caches = false, std::size_t offset = 0) {
  constexpr std::size_t kAlignment = 64;
  constexpr std::uint8_t kUntouched = 0xa5;
  std::vector<std::uint8_t> memory(static_cast<std::size_t>(n * itemsize(dtype)) + offset + 2 * kAlignment, kUntouched);
  const std::size_t before = -reinterpret_cast<std::uintptr_t>(memory.data()) % kAlignment + offset;
  for (std::int64_t begin = (n - 1) / step * step; begin >= 0; begin -= step) {  // what one writes too much, stays
    cpu::dequantize_4bit(w, begin, std::min(n, begin + step), dtype, memory.data() + before + begin * itemsize(dtype),
                         past_caches);
  }
  const auto first = memory.begin() + static_cast<std::ptrdiff_t>(before), last = first + n * itemsize(dtype);
  CHECK(std::all_of(last, memory.end(), [](std::uint8_t byte) { return byte == kUntouched; }));
  return {first, last};
}

void check(std::int64_t n, std::int64_t blocksize, DType dtype, QuantType quant_type) {
  const auto weight = make_weight(n, dtype);
  const std::int64_t blocks = (n + blocksize - 1) / blocksize;
  cpu::set_path("portable");
  const Quantized expected = quantize(weight.data(), dtype, n, blocksize, quant_type, blocks);
  const Packed4bit w{expected.packed.data(), expected.absmax.data(), nullptr, nullptr, quant_type, blocksize};
  const auto expected_values = dequantize(w, n, dtype, n);

  const DoubleQuantized scales(expected.absmax);
  const Packed4bit double_quantized{expected.packed.data(), scales.codes.data(), scales.nested_absmax.data(),
                                    &scales.offset,         quant_type,          blocksize};
  const auto expected_double = dequantize(double_quantized, n, dtype, n);

  for (const auto& path : cpu::path_names()) {
    cpu::set_path(path);
    for (std::int64_t step : {std::int64_t{1}, std::int64_t{3}, blocks}) {
      const Quantized got = quantize(weight.data(), dtype, n, blocksize, quant_type, step);
      CHECK(got.packed == expected.packed);
      CHECK(std::memcmp(got.absmax.data(), expected.absmax.data(), got.absmax.size() * 4) == 0);
    }
    for (std::int64_t step : {1, 3}) {
      const DoubleQuantized got(expected.absmax, step);
      CHECK(got.codes == scales.codes);
      CHECK(got.nested_absmax == scales.nested_absmax);
      CHECK(got.offset == scales.offset);
    }
    for (std::int64_t step : {std::int64_t{7}, blocksize + 1, 3 * blocksize, n}) {
      CHECK(dequantize(w, n, dtype, step) == expected_values);
      CHECK(dequantize(double_quantized, n, dtype, step) == expected_double);
    }
    for (std::size_t offset : {0, 4}) {  // on the boundary that stores past the caches need, and not
      CHECK(dequantize(w, n, dtype, n, true, offset) == expected_values);
      CHECK(dequantize(double_quantized, n, dtype, blocksize, true, offset) == expected_double);
    }
  }
}

}  // namespace

int main() {
  for (DType dtype : {DType::Float32, DType::Float16, DType::BFloat16}) {
    for (QuantType quant_type : {QuantType::NF4, QuantType::FP4}) {
      for (std::int64_t blocksize : {32, 64, 256, 4096}) check(3 * 4096 + 4097, blocksize, dtype, quant_type);
      check(1, 64, dtype, quant_type);
      check(2047 * 32, 32, dtype, quant_type);  // eight groups of absmax, the last of them short
    }
  }
  return failures();
}
