// 16 rows of 16 bytes to 16 columns. A file of kernels includes this inside its target region.
namespace qlora::cpu {
namespace {

// Each round interleaves row i with row i + 8, which moves the highest bit of the row's number to the lowest of the
// column's: after four rounds they have changed places.
inline void transpose_bytes(const std::uint8_t* from, std::int64_t stride, __m128i (&columns)[16]) {
  for (int i = 0; i < 16; ++i) columns[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride));
  for (int round = 0; round < 4; ++round) {
    __m128i next[16];
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = _mm_unpacklo_epi8(columns[i], columns[i + 8]);
      next[2 * i + 1] = _mm_unpackhi_epi8(columns[i], columns[i + 8]);
    }
    for (int i = 0; i < 16; ++i) columns[i] = next[i];
  }
}

}  // namespace
}  // namespace qlora::cpu
