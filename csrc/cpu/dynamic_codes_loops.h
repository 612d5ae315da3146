// 8-bit codes of whole blocks, by the Codes of one path (dynamic_codes_portable.h, _avx2.h, _avx512.h), which encode
// kEncoded finite values in two steps, place and encode: what comes between them in the program is done while the
// second waits for the first. A file of kernels includes this inside its target region.
#include "../codec.h"  // a file of kernels has it before its target region: nothing is compiled here

namespace qlora::cpu {
namespace {

// What the values of a block are encoded relative to: the largest of their magnitudes, by its bits.
struct Scale {
  std::uint32_t largest;
  float absmax, inverse;

  explicit Scale(std::uint32_t largest)
      : largest(largest), absmax(__builtin_bit_cast(float, largest)), inverse(inverse_group_absmax(absmax)) {}
  bool is_finite() const { return largest < 0x7f800000u; }
};

// Not inlined: one copy serves all that the optimizer is compiled for.
template <typename Codes>
[[gnu::noinline]] void encode_block(const Codes& codes, const float* values, std::int64_t count, const Scale& scale,
                                    std::uint8_t* out) {
  if (scale.is_finite()) {
    const float inverse = scale.inverse;
    for (std::int64_t i = 0; i < count; i += Codes::kEncoded) {
      codes.encode(codes.place(values + i, inverse), values + i, inverse, out + i);
    }
  } else {
    for (std::int64_t i = 0; i < count; ++i) out[i] = encode_dynamic(Codes::book().bound, values[i] * scale.inverse);
  }
}

}  // namespace
}  // namespace qlora::cpu
