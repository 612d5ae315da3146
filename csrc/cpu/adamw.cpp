// AdamW: the choice of the kernel, and a slice's last, shorter block.
#include "adamw.h"

#include <algorithm>
#include <cmath>

#include "adamw_loops.h"
#include "dynamic_codes.h"
#include "path.h"

namespace qlora::cpu {
namespace {

// One number at a time.
struct Scalar {
  using V = float;
  static constexpr std::int64_t kLanes = 1;

  static V splat(float x) { return x; }
  static V multiply(V a, V b) { return a * b; }
  static V add(V a, V b) { return a + b; }
  static V subtract(V a, V b) { return a - b; }
  static V divide(V a, V b) { return a / b; }
  static V sqrt(V a) { return std::sqrt(a); }

  template <typename T>
  static V load(const T* from) {
    return to_float(*from);
  }
  template <typename T>
  static void store(T* to, V x) {
    *to = round_to<T>(x);
  }

  struct Random {
    std::uint64_t key;
    explicit Random(std::uint64_t block_key) : key(block_key) {}
  };
  static void round(BFloat16* to, V x, const Random& random, std::int64_t i) {
    *to = round_stochastically(x, random16(random.key, static_cast<std::uint32_t>(i)));
  }

  struct Largest {
    std::uint32_t largest = 0;
    void add(V x) { largest = std::max(largest, std::bit_cast<std::uint32_t>(x) & 0x7fffffffu); }
    std::uint32_t bits() const { return largest; }
  };

  template <bool kSigned>
  struct Codes {
    static constexpr std::int64_t kDecoded = 1, kEncoded = 1;
    static constexpr const DynamicCodebook& book() { return state_codebook<kSigned>(); }
    static void decode(const std::uint8_t* code, V* value) { *value = book().value[*code]; }
    static NotPlaced place(const float*, float) { return {}; }
    static void encode(NotPlaced, const float* values, float inverse, std::uint8_t* codes) {
      *codes = encode_dynamic(book().bound, *values * inverse);
    }
  };
};

void update(const AdamwTask& task, std::int64_t begin, std::int64_t end) {
  auto kernel = adamw_portable;
#if defined(__x86_64__)
  const Path chosen = path();
  if (chosen == Path::Avx2) kernel = adamw_avx2;
  if (chosen == Path::Avx512) kernel = adamw_avx512;
  if (chosen == Path::Avx512Bf16) kernel = adamw_avx512_bf16;
#endif
  const std::int64_t whole = std::max(begin, std::min(end, task.slice->count / kAdamwBlock));
  kernel(task, begin, whole);
  begin = whole;
  update_slice<Scalar>(task, begin, end);
}

}  // namespace

void adamw(const AdamwSlice* slices, std::int64_t n, const AdamwOptions& options, std::int64_t begin,
           std::int64_t end) {
  if (options.found_inf != nullptr && *options.found_inf != 0.0f) return;
  std::int64_t first = 0;  // block of the slice, counted through all
  for (std::int64_t i = 0; i < n && first < end; ++i) {
    const AdamwSlice& slice = slices[i];
    const std::int64_t blocks = adamw_blocks(slice);
    if (begin < first + blocks) {
      AdamwTask task{&slice, adamw_factors(*slice.hyper), options.stochastic_rounding, adamw_key(slice, options.seed)};
      if (options.grad_scale != nullptr) task.factors.gradient *= 1.0f / *options.grad_scale;
      update(task, std::max<std::int64_t>(begin - first, 0), std::min(end - first, blocks));
    }
    first += blocks;
  }
}

}  // namespace qlora::cpu
