// AdamW for any machine: whole blocks, 4 elements at a time.
#include "adamw.h"

#include <algorithm>

#include "adamw_loops.h"
#include "dynamic_codes_portable.h"

namespace qlora::cpu {
namespace {

struct Portable : Arithmetic<PortableVectors> {
  static V sqrt(V a) {
    for (std::int64_t i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
  }

  struct Random {
    std::uint64_t key;
    explicit Random(std::uint64_t block_key) : key(block_key) {}
  };
  static void round(BFloat16* to, V x, const Random& random, std::int64_t at) {
    for (std::int64_t i = 0; i < kLanes; ++i) {
      to[i] = round_stochastically(x[i], random16(random.key, static_cast<std::uint32_t>(at + i)));
    }
  }

  template <bool kSigned>
  struct Largest {
    Bits largest{};
    void add(V x) {
      const Bits magnitude = Portable::bits(x) & (kSigned ? 0x7fffffff : 0xffffffff);
      largest = magnitude > largest ? magnitude : largest;
    }
    std::uint32_t bits() const { return std::max(std::max(largest[0], largest[1]), std::max(largest[2], largest[3])); }
  };

  template <bool kSigned>
  using Codes = DynamicCodes<kSigned>;
};

}  // namespace

void adamw_portable(const AdamwTask& task, std::int64_t begin, std::int64_t end) {
  update_slice<Portable>(task, begin, end);
}

}  // namespace qlora::cpu
