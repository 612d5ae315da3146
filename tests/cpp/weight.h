// A 4-bit weight and the memory for what it is multiplied with.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/dequantize_4bit.h"
#include "cpu/linear_4bit.h"
#include "cpu/quantize.h"
#include "double_quant.h"
#include "values.h"

namespace qlora {

// A weight [N, K] with double quantization, and its decoded values.
struct Weight {
  std::vector<std::uint8_t> packed;
  std::vector<float> absmax, decoded;
  std::optional<DoubleQuantized> scales;
  Packed4bit view{};

  Weight(std::int64_t N, std::int64_t K, std::int64_t blocksize, QuantType quant_type, bool double_quant)
      : Weight(Values(DType::Float32, N * K, 0.02f), N * K, blocksize, quant_type, double_quant) {}

  Weight(const Values& values, std::int64_t n, std::int64_t blocksize, QuantType quant_type, bool double_quant) {
    const std::int64_t blocks = n / blocksize;
    packed.resize(static_cast<std::size_t>(n / 2));
    absmax.resize(static_cast<std::size_t>(blocks));
    decoded.resize(static_cast<std::size_t>(n));
    cpu::quantize_4bit(values.bytes.data(), DType::Float32, n, blocksize, quant_type, 0, blocks, packed.data(),
                       absmax.data());
    view = {packed.data(), absmax.data(), nullptr, nullptr, quant_type, blocksize};
    if (double_quant) {
      scales.emplace(absmax);
      view = {packed.data(),   scales->codes.data(), scales->nested_absmax.data(),
              &scales->offset, quant_type,           blocksize};
    }
    cpu::dequantize_4bit(view, 0, n, DType::Float32, decoded.data());
  }
};

// What arrange_x fills.
inline std::unique_ptr<void, decltype(&std::free)> room_for_x(DType dtype, std::int64_t M, std::int64_t N,
                                                              std::int64_t K) {
  const std::int64_t bytes = (cpu::arranged_bytes(dtype, M, N, K) + 63) / 64 * 64;
  return {std::aligned_alloc(64, static_cast<std::size_t>(bytes)), std::free};
}

}  // namespace qlora
