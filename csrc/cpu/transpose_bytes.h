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

// The same of 8 rows in each half of a register, rows 0-3 and 8-11 in the lower ones, 4-7 and 12-15 in the upper: two
// columns after three rounds. The floats of a column's bytes, expanded within the halves, are then in order.
inline void transpose_bytes(const std::uint8_t* from, std::int64_t stride, __m256i (&columns)[8]) {
  for (int i = 0; i < 8; ++i) {
    const auto load = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + row * stride)); };
    const int row = i < 4 ? i : i + 4;
    columns[i] = _mm256_set_m128i(load(row + 4), load(row));
  }
  for (int round = 0; round < 3; ++round) {
    __m256i next[8];
    for (int i = 0; i < 4; ++i) {
      next[2 * i] = _mm256_unpacklo_epi8(columns[i], columns[i + 4]);
      next[2 * i + 1] = _mm256_unpackhi_epi8(columns[i], columns[i + 4]);
    }
    for (int i = 0; i < 8; ++i) columns[i] = next[i];
  }
}

}  // namespace
}  // namespace qlora::cpu
