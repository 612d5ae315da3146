// quantize_absmax for any machine: whole groups.
#include "dynamic_codes_portable.h"
#include "quantize.h"
#include "quantize_absmax_loops.h"

namespace qlora::cpu {

void quantize_absmax_portable(const float* absmax, float offset, std::int64_t begin, std::int64_t end,
                              std::uint8_t* codes, float* nested_absmax) {
  quantize_groups<DynamicCodes<true>>(absmax, offset, begin, end, codes, nested_absmax);
}

}  // namespace qlora::cpu
