// What the kernels take the less obvious intrinsics to do, against plain C++. Where they are emulated this tests the
// emulation; on a CPU that has them it tests that these definitions are the CPU's.
#include "check.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "cpu/path.h"
#include "dtype.h"

using namespace qlora;

namespace {

// The lanes of a register of N bytes.
template <typename T, int N = 64>
struct alignas(64) Lanes {
  static constexpr int kCount = N / static_cast<int>(sizeof(T));
  T at[kCount];
};

struct Random {
  std::uint32_t state = 1;

  std::uint32_t bits() {
    state = state * 1664525u + 1013904223u;
    return state ^ state >> 16;
  }

  // Any bits, or a number of a size that makes sums round.
  std::uint32_t number() {
    const std::uint32_t any = bits();
    return bits() % 4 == 0 ? any : (any & 0x83ffffffu) | 0x3c000000u;
  }

  template <typename T>
  Lanes<T> lanes() {
    Lanes<T> out;
    for (T& x : out.at) {
      if constexpr (std::is_same_v<T, float>) {
        x = std::bit_cast<float>(number());
      } else if constexpr (std::is_same_v<T, BFloat16>) {
        x = {static_cast<std::uint16_t>(number() >> 16)};
      } else {
        x = static_cast<T>(bits());
      }
    }
    return out;
  }
};

bool same(float a, float b) {
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b) || (a != a && b != b);
}
bool same(BFloat16 a, BFloat16 b) { return same(to_float(a), to_float(b)); }
bool same(Half a, Half b) { return same(to_float(a), to_float(b)); }
template <typename T>
bool same(T a, T b) {
  return a == b;
}

template <typename T, int N, typename Expected>
bool holds(const Lanes<T, N>& got, Expected expected) {
  for (int i = 0; i < got.kCount; ++i) {
    if (!same(got.at[i], static_cast<T>(expected(i)))) return false;
  }
  return true;
}

float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

float dpbf16(float sum, BFloat16 a0, BFloat16 b0, BFloat16 a1, BFloat16 b1) {
  const float odd = flush(std::fma(flush(to_float(a1)), flush(to_float(b1)), flush(sum)));
  return flush(std::fma(flush(to_float(a0)), flush(to_float(b0)), odd));
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

template <typename T>
__m512i whole(const Lanes<T>& x) {
  return _mm512_loadu_si512(x.at);
}
template <typename T>
__m256i half(const Lanes<T>& x) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.at));
}
template <typename T>
__m128i quarter(const Lanes<T>& x) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x.at));
}
__m512 floats(const Lanes<float>& x) { return _mm512_loadu_ps(x.at); }

template <typename T>
Lanes<T> stored(__m512i x) {
  Lanes<T> out;
  _mm512_storeu_si512(out.at, x);
  return out;
}
template <typename T>
Lanes<T, 32> stored(__m256i x) {
  Lanes<T, 32> out;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.at), x);
  return out;
}
template <typename T>
Lanes<T, 16> stored(__m128i x) {
  Lanes<T, 16> out;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out.at), x);
  return out;
}
Lanes<float> stored(__m512 x) { return stored<float>(_mm512_castps_si512(x)); }

void check_moves(Random& random) {
  const auto bytes = random.lanes<std::uint8_t>();
  const auto words = random.lanes<std::uint16_t>(), word_index = random.lanes<std::uint16_t>();
  const auto dwords = random.lanes<std::uint32_t>(), others = random.lanes<std::uint32_t>();
  const auto qwords = random.lanes<std::uint64_t>();
  const auto mask = static_cast<__mmask16>(random.bits());
  const auto chosen = [&](int i) { return (mask >> i & 1) != 0; };

  CHECK(holds(stored<std::uint16_t>(_mm512_permutexvar_epi16(whole(word_index), whole(words))),
              [&](int i) { return words.at[word_index.at[i] % 32]; }));
  CHECK(holds(stored<std::uint32_t>(_mm512_permutexvar_epi32(whole(others), whole(dwords))),
              [&](int i) { return dwords.at[others.at[i] % 16]; }));
  CHECK(holds(stored<std::uint32_t>(
                  _mm512_castps_si512(_mm512_permutexvar_ps(whole(others), _mm512_castsi512_ps(whole(dwords))))),
              [&](int i) { return dwords.at[others.at[i] % 16]; }));
  const auto more_words = random.lanes<std::uint16_t>();
  CHECK(holds(stored<std::uint16_t>(_mm512_permutex2var_epi16(whole(words), whole(word_index), whole(more_words))),
              [&](int i) {
                const int at = word_index.at[i] % 64;
                return at < 32 ? words.at[at] : more_words.at[at - 32];
              }));
  CHECK(holds(stored<std::uint16_t>(_mm512_broadcast_i64x4(half(words))), [&](int i) { return words.at[i % 16]; }));

  CHECK(holds(stored<std::uint32_t>(_mm512_mask_mov_epi32(whole(others), mask, whole(dwords))),
              [&](int i) { return chosen(i) ? dwords.at[i] : others.at[i]; }));
  const std::uint32_t negative = _mm512_movepi16_mask(whole(words));
  CHECK(holds(stored<std::uint16_t>(_mm512_mask_mov_epi16(whole(words), negative, whole(more_words))),
              [&](int i) { return words.at[i] >> 15 != 0 ? more_words.at[i] : words.at[i]; }));
  CHECK(holds(stored<std::uint32_t>(_mm512_mask_add_epi32(whole(others), mask, whole(dwords), whole(others))),
              [&](int i) { return chosen(i) ? dwords.at[i] + others.at[i] : others.at[i]; }));

  CHECK(holds(stored<std::uint32_t>(_mm512_mask_broadcast_i32x4(whole(others), mask, quarter(dwords))),
              [&](int i) { return chosen(i) ? dwords.at[i % 4] : others.at[i]; }));
  Lanes<std::uint32_t> floats_kept = others;
  _mm512_mask_storeu_ps(floats_kept.at, mask, _mm512_castsi512_ps(whole(dwords)));
  CHECK(holds(floats_kept, [&](int i) { return chosen(i) ? dwords.at[i] : others.at[i]; }));
  Lanes<std::uint16_t> words_kept = word_index;
  _mm256_mask_storeu_epi16(words_kept.at, mask, half(words));
  CHECK(holds(words_kept, [&](int i) { return i < 16 && chosen(i) ? words.at[i] : word_index.at[i]; }));
  CHECK(holds(stored<std::uint16_t>(_mm512_cvtepi32_epi16(whole(dwords))), [&](int i) { return dwords.at[i]; }));
  CHECK(holds(stored<std::uint8_t>(_mm512_cvtepi32_epi8(whole(dwords))), [&](int i) { return dwords.at[i]; }));
  CHECK(holds(stored<std::uint8_t>(_mm512_cvtepi64_epi8(whole(qwords))),
              [&](int i) { return i < 8 ? qwords.at[i] : 0; }));
  CHECK(holds(stored<std::uint16_t>(_mm512_cvtepu8_epi16(half(bytes))), [&](int i) { return bytes.at[i]; }));
  CHECK(holds(stored<std::uint32_t>(_mm512_cvtepu8_epi32(quarter(bytes))), [&](int i) { return bytes.at[i]; }));
  CHECK(holds(stored<std::uint64_t>(_mm512_cvtepu8_epi64(quarter(bytes))), [&](int i) { return bytes.at[i]; }));
  CHECK(holds(stored<std::uint32_t>(_mm512_cvtepu16_epi32(half(words))), [&](int i) { return words.at[i]; }));

  CHECK(holds(stored<std::uint16_t>(_mm512_srli_epi16(whole(words), 4)), [&](int i) { return words.at[i] >> 4; }));
  CHECK(holds(stored<std::uint64_t>(_mm512_slli_epi64(whole(qwords), 32)), [&](int i) { return qwords.at[i] << 32; }));
  CHECK(holds(stored<std::uint32_t>(_mm512_max_epu32(whole(dwords), whole(others))),
              [&](int i) { return dwords.at[i] > others.at[i] ? dwords.at[i] : others.at[i]; }));
  std::uint32_t largest = 0;
  for (std::uint32_t x : dwords.at) largest = x > largest ? x : largest;
  CHECK_EQ(_mm512_reduce_max_epu32(whole(dwords)), largest);
}

float fma_down(float a, float b, float c) {
  volatile float x = a, sum;  // a compiler may not move what it reads and writes out of the rounding
  const int before = std::fegetround();
  std::fesetround(FE_DOWNWARD);
  sum = std::fma(x, b, c);
  std::fesetround(before);
  return sum;
}

void check_floats(Random& random) {
  const auto a = random.lanes<float>(), b = random.lanes<float>(), c = random.lanes<float>();
  CHECK(holds(stored(_mm512_fmadd_ps(floats(a), floats(b), floats(c))),
              [&](int i) { return std::fma(a.at[i], b.at[i], c.at[i]); }));
  CHECK(holds(stored(_mm512_fmadd_round_ps(floats(a), floats(b), floats(c), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)),
              [&](int i) { return fma_down(a.at[i], b.at[i], c.at[i]); }));
  CHECK(holds(stored(_mm512_fnmadd_ps(floats(a), floats(b), floats(c))),
              [&](int i) { return std::fma(-a.at[i], b.at[i], c.at[i]); }));
  CHECK(holds(stored(_mm512_fmsub_ps(floats(a), floats(b), floats(c))),
              [&](int i) { return std::fma(a.at[i], b.at[i], -c.at[i]); }));
  CHECK(holds(stored<float>(_mm256_castps_si256(
                  _mm256_fmadd_ps(_mm256_loadu_ps(a.at), _mm256_loadu_ps(b.at), _mm256_loadu_ps(c.at)))),
              [&](int i) { return std::fma(a.at[i], b.at[i], c.at[i]); }));

  auto p = a, q = b;  // of NaN the kernels ask nothing
  for (float& x : p.at) x = x == x ? x : 1.0f;
  for (float& x : q.at) x = x == x ? x : 1.0f;
  constexpr int kLargestMagnitude = 0b1011;
  CHECK(holds(stored(_mm512_range_ps(floats(p), floats(q), kLargestMagnitude)),
              [&](int i) { return std::fmax(std::fabs(p.at[i]), std::fabs(q.at[i])); }));
  const unsigned above = _mm512_cmp_ps_mask(floats(a), floats(b), _CMP_GT_OQ);
  const unsigned unordered = _mm512_cmp_ps_mask(floats(a), floats(b), _CMP_UNORD_Q);
  for (int i = 0; i < 16; ++i) {
    CHECK_EQ((above >> i & 1) != 0, a.at[i] > b.at[i]);
    CHECK_EQ((unordered >> i & 1) != 0, a.at[i] != a.at[i] || b.at[i] != b.at[i]);
  }

  Lanes<float> sum = a;
  for (int count = 8; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) sum.at[i] = sum.at[i] + sum.at[i + count];
  }
  CHECK(same(_mm512_reduce_add_ps(floats(a)), sum.at[0]));

  CHECK(holds(stored<Half>(_mm512_cvtps_ph(floats(a), _MM_FROUND_TO_NEAREST_INT)),
              [&](int i) { return round_to<Half>(a.at[i]); }));
  CHECK(holds(stored<Half>(_mm256_cvtps_ph(_mm256_loadu_ps(a.at), _MM_FROUND_TO_NEAREST_INT)),
              [&](int i) { return round_to<Half>(a.at[i]); }));
  const auto words = random.lanes<std::uint16_t>();
  CHECK(holds(stored(_mm512_cvtph_ps(half(words))), [&](int i) { return to_float(Half{words.at[i]}); }));
  CHECK(holds(stored<float>(_mm256_castps_si256(_mm256_cvtph_ps(quarter(words)))),
              [&](int i) { return to_float(Half{words.at[i]}); }));
}

#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512vbmi,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

void check_bf16(Random& random) {
  const auto a = random.lanes<BFloat16>(), b = random.lanes<BFloat16>();
  const auto low = random.lanes<float>(), high = random.lanes<float>();
  const auto expected = [&](int i) {
    return dpbf16(low.at[i], a.at[2 * i], b.at[2 * i], a.at[2 * i + 1], b.at[2 * i + 1]);
  };
  const auto pairs_a = __builtin_bit_cast(__m512bh, whole(a)), pairs_b = __builtin_bit_cast(__m512bh, whole(b));
  CHECK(holds(stored(_mm512_dpbf16_ps(floats(low), pairs_a, pairs_b)), expected));
  CHECK(holds(stored<BFloat16>(__builtin_bit_cast(__m256i, _mm512_cvtneps_pbh(floats(low)))),
              [&](int i) { return round_to<BFloat16>(flush(low.at[i])); }));
  auto special = low;
  special.at[0] = std::bit_cast<float>(0x7f800001u), special.at[1] = std::bit_cast<float>(0xffc00000u);
  special.at[2] = std::bit_cast<float>(0x007fffffu), special.at[3] = std::bit_cast<float>(0x80000001u);
  special.at[4] = 0.0f, special.at[5] = std::bit_cast<float>(0x00800000u), special.at[6] = -0.0f;
  special.at[7] = std::numeric_limits<float>::infinity();
  const unsigned quiet = _mm512_fpclass_ps_mask(floats(special), 0x01),
                 subnormal = _mm512_fpclass_ps_mask(floats(special), 0x20);
  const unsigned signaling = _mm512_fpclass_ps_mask(floats(special), 0x80);
  for (int i = 0; i < 16; ++i) {
    const bool is_nan = special.at[i] != special.at[i],
               is_quiet = std::bit_cast<std::uint32_t>(special.at[i]) >> 22 & 1;
    CHECK((quiet >> i & 1) == (is_nan && is_quiet));
    CHECK((signaling >> i & 1) == (is_nan && !is_quiet));
    CHECK((subnormal >> i & 1) == (std::fpclassify(special.at[i]) == FP_SUBNORMAL));
  }
  CHECK(holds(stored<BFloat16>(__builtin_bit_cast(__m512i, _mm512_cvtne2ps_pbh(floats(high), floats(low)))),
              [&](int i) { return round_to<BFloat16>(flush(i < 16 ? low.at[i] : high.at[i - 16])); }));
}

void check_byte_lookups(Random& random) {
  const auto bytes = random.lanes<std::uint8_t>(), more_bytes = random.lanes<std::uint8_t>();
  const auto byte_index = random.lanes<std::uint8_t>();
  const __m512i looked_up = _mm512_permutex2var_epi8(whole(bytes), whole(byte_index), whole(more_bytes));
  CHECK(holds(stored<std::uint8_t>(looked_up), [&](int i) {
    const int at = byte_index.at[i] % 128;
    return at < 64 ? bytes.at[at] : more_bytes.at[at - 64];
  }));
  const std::uint64_t upper = _mm512_movepi8_mask(whole(byte_index));
  CHECK(holds(stored<std::uint8_t>(_mm512_mask_blend_epi8(upper, whole(bytes), whole(more_bytes))),
              [&](int i) { return byte_index.at[i] >> 7 != 0 ? more_bytes.at[i] : bytes.at[i]; }));
  const __m512i shifted = _mm512_multishift_epi64_epi8(whole(byte_index), whole(bytes));
  CHECK(holds(stored<std::uint8_t>(shifted), [&](int i) {
    const int bit = byte_index.at[i] % 64, byte = bit / 8, first = i / 8 * 8;
    const unsigned next = bytes.at[first + (byte + 1) % 8];
    return static_cast<std::uint8_t>((bytes.at[first + byte] | next << 8) >> bit % 8);
  }));
}

#pragma GCC pop_options

}  // namespace

int main() {
  Random random;
  for (const std::string& path : cpu::path_names()) {
    for (int i = 0; i < 5000; ++i) {
      if (path == "avx512") {
        check_moves(random);
        check_floats(random);
      }
      if (path == "avx512_bf16") {
        check_bf16(random);
        check_byte_lookups(random);
      }
    }
  }
  return failures();
}

#else
int main() { return failures(); }
#endif
