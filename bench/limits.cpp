// What this machine can do at most, for bench/ to compare with: bandwidth of memory and cache, flops of the vector
// units.
//
//   limits THREADS COLD_BYTES HOT_BYTES SECONDS     -> one JSON object: bytes/s and flops/s of all threads together
//
// read, copy: over a buffer of COLD_BYTES, shared out among the threads; a copy takes one half of it to the other and
// counts bytes read and bytes written, as STREAM does. hot_read, hot_copy: the same over HOT_BYTES.
// fma_fp32: a figure for each instruction set that the CPU has (the baseline, SSE2, multiplies and adds apart).
// dpbf16: vdpbf16ps, or null. tdpbf16: AMX's tdpbf16ps, on tiles that are there already, or null.
// Each figure is the best pass in SECONDS: what other processes take away is no limit of the machine.
#include <cpuid.h>
#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <string>

namespace {

// There is no -march=native: a loop is written once, as a template, and inlined into a function for each instruction
// set.
using Vector128 = float __attribute__((vector_size(16)));
using Vector256 = float __attribute__((vector_size(32)));
using Vector512 = float __attribute__((vector_size(64)));

constexpr size_t kStep = 512;  // bytes of a stream before the next one's turn
constexpr size_t kStreams[] = {1, 4, 8};
constexpr size_t kGrain = 8 * kStep;  // a thread's share is a multiple of it, whatever the number of streams
constexpr int kChains = 12;           // independent sums: units times latency is 8 to 10, and they fit 16 registers
constexpr int kTurns = 1 << 18;       // about a millisecond: waking the threads is no part of it

// Memory is walked in several streams at once, a step of each in turn: some CPUs prefetch one stream alone too slowly.
template <class V>
[[gnu::always_inline]] inline void read_part(const char* from, size_t bytes, size_t streams) {
  const size_t length = bytes / streams / kStep * kStep;
  for (size_t step = 0; step < length; step += kStep) {
    for (size_t stream = 0; stream < streams; stream++) {
      const char* at = from + stream * length + step;
      for (size_t i = 0; i < kStep; i += sizeof(V)) {
        const V loaded = *reinterpret_cast<const V*>(at + i);
        asm volatile("" : : "v"(loaded));  // so that the load is not dropped
      }
    }
  }
}

template <class V, bool kStreaming>
[[gnu::always_inline]] inline void copy_part(char* to, const char* from, size_t bytes, size_t streams) {
  const size_t length = bytes / streams / kStep * kStep;
  for (size_t step = 0; step < length; step += kStep) {
    for (size_t stream = 0; stream < streams; stream++) {
      const size_t at = stream * length + step;
      for (size_t i = at; i < at + kStep; i += sizeof(V)) {
        V* target = reinterpret_cast<V*>(to + i);
        const V loaded = *reinterpret_cast<const V*>(from + i);
        if constexpr (kStreaming) {
          asm("movntps %1, %0" : "=m"(*target) : "x"(loaded));
        } else {
          *target = loaded;
        }
      }
    }
  }
}

template <class V>
[[gnu::always_inline]] inline void multiply_add() {
  V sums[kChains] = {}, factor = V{} + 0.5f, term = V{} + 1.0f;
  asm volatile("" : "+v"(factor), "+v"(term));
  for (V& sum : sums) asm volatile("" : "+v"(sum));  // else twelve equal chains would be computed as one
  for (int turn = 0; turn < kTurns; turn++) {
    for (V& sum : sums) sum = sum * factor + term;
  }
  for (V& sum : sums) asm volatile("" : : "v"(sum));
}

void read_baseline(const char* from, size_t bytes, size_t streams) { read_part<Vector128>(from, bytes, streams); }
[[gnu::target("avx2,fma")]] void read_avx2(const char* from, size_t bytes, size_t streams) {
  read_part<Vector256>(from, bytes, streams);
}
[[gnu::target("avx512f")]] void read_avx512(const char* from, size_t bytes, size_t streams) {
  read_part<Vector512>(from, bytes, streams);
}

void copy_baseline(char* to, const char* from, size_t bytes, size_t streams) {
  copy_part<Vector128, false>(to, from, bytes, streams);
}
[[gnu::target("avx2,fma")]] void copy_avx2(char* to, const char* from, size_t bytes, size_t streams) {
  copy_part<Vector256, false>(to, from, bytes, streams);
}
[[gnu::target("avx512f")]] void copy_avx512(char* to, const char* from, size_t bytes, size_t streams) {
  copy_part<Vector512, false>(to, from, bytes, streams);
}
// Around the cache: it saves the read of each line that is about to be overwritten.
void copy_streaming(char* to, const char* from, size_t bytes, size_t streams) {
  copy_part<Vector128, true>(to, from, bytes, streams);
  _mm_sfence();
}

void fma_baseline() { multiply_add<Vector128>(); }
[[gnu::target("avx2,fma")]] void fma_avx2() { multiply_add<Vector256>(); }
[[gnu::target("avx512f")]] void fma_avx512() { multiply_add<Vector512>(); }

[[gnu::target("avx512f,avx512bf16")]] void dot_bf16() {
  __m512 sums[kChains] = {};
  __m512i bits = _mm512_set1_epi16(0x3c00);  // bf16 of 2^-7
  asm volatile("" : "+v"(bits));
  for (__m512& sum : sums) asm volatile("" : "+v"(sum));
  for (int turn = 0; turn < kTurns; turn++) {
    for (__m512& sum : sums)
      sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(bits), reinterpret_cast<__m512bh>(bits));
  }
  for (__m512& sum : sums) asm volatile("" : : "v"(sum));
}

// Linux lets a process use tiles once it has asked.
bool has_tiles() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (~edx & (kBf16 | kTiles)) != 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

constexpr double kTileFlops = 2.0 * 16 * 16 * 32;
constexpr int kTileTurns = 1 << 15;  // of four products: their latency is that of three

void dot_tiles() {
  struct alignas(64) {
    unsigned char palette = 1, start_row = 0, reserved[14] = {};
    unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } configuration;
  alignas(64) unsigned short values[16][32];
  for (auto& row : values) std::fill(std::begin(row), std::end(row), 0x3c00);  // bf16 of 2^-7
  asm volatile("ldtilecfg %0" : : "m"(configuration));
  asm volatile(
      "tileloadd (%0,%1,1), %%tmm4\n\ttileloadd (%0,%1,1), %%tmm5\n\t"
      "tileloadd (%0,%1,1), %%tmm6\n\ttileloadd (%0,%1,1), %%tmm7\n\t"
      "tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3"
      :
      : "r"(values), "r"(sizeof *values)
      : "memory");
  for (int turn = 0; turn < kTileTurns; turn++) {
    asm volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0\n\ttdpbf16ps %tmm7, %tmm4, %tmm1\n\t"
        "tdpbf16ps %tmm6, %tmm5, %tmm2\n\ttdpbf16ps %tmm7, %tmm5, %tmm3");
  }
  asm volatile("tilerelease");
}

struct InstructionSet {
  const char* name;
  bool present;
  int floats;  // in a vector
  void (*read)(const char* from, size_t bytes, size_t streams);
  void (*copy)(char* to, const char* from, size_t bytes, size_t streams);
  void (*fma)();
};

const InstructionSet kSets[] = {
    {"baseline", true, 4, read_baseline, copy_baseline, fma_baseline},
    {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), 8, read_avx2, copy_avx2, fma_avx2},
    {"avx512", bool(__builtin_cpu_supports("avx512f")), 16, read_avx512, copy_avx512, fma_avx512},
};

// The best of amount / time over passes of all threads, for so many seconds and twice at least: the first warms up.
template <class Pass>
double best_rate(int threads, double seconds, double amount, Pass pass) {
  double best = 0;
  const double end = omp_get_wtime() + seconds;
  for (int passes = 0; passes < 2 || omp_get_wtime() < end; passes++) {
    const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    pass(omp_get_thread_num());
    best = std::max(best, amount / (omp_get_wtime() - start));
  }
  return best;
}

struct Bandwidths {
  double read = 0, copy = 0;
};

// Of the first `bytes` of the buffer, walked as many times a pass as make 32 MB of it.
Bandwidths bandwidths(const InstructionSet& set, char* buffer, size_t bytes, int threads, double seconds) {
  const size_t half = bytes / 2 / size_t(threads) / kGrain * kGrain;  // a thread's
  const size_t part = 2 * half;
  const size_t repeats = std::max<size_t>(1, (size_t(32) << 20) / bytes);
  const double amount = double(part) * threads * double(repeats);
  Bandwidths best;
  for (const size_t streams : kStreams) {
    const double read = best_rate(threads, seconds / 3, amount, [&](int thread) {
      for (size_t i = 0; i < repeats; i++) set.read(buffer + size_t(thread) * part, part, streams);
    });
    best.read = std::max(best.read, read);
  }
  for (const auto copy_part : {set.copy, copy_streaming}) {
    for (const size_t streams : kStreams) {
      const double copy = best_rate(threads, seconds / 6, amount, [&](int thread) {
        char* mine = buffer + size_t(thread) * part;
        for (size_t i = 0; i < repeats; i++) copy_part(mine + half, mine, half, streams);
      });
      best.copy = std::max(best.copy, copy);
    }
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc == 5 ? std::atoi(argv[1]) : 0;
  const size_t cold_bytes = threads ? std::strtoull(argv[2], nullptr, 10) : 0;
  const size_t hot_bytes = threads ? std::strtoull(argv[3], nullptr, 10) : 0;
  const double seconds = threads ? std::atof(argv[4]) : 0;
  const size_t least = 2 * kGrain * size_t(std::max(threads, 1));
  if (threads < 1 || hot_bytes < least || cold_bytes < hot_bytes || seconds <= 0) {
    std::fprintf(stderr, "limits THREADS COLD_BYTES HOT_BYTES SECONDS: expected bytes of %zu <= hot <= cold\n", least);
    return 1;
  }
  void* memory = mmap(nullptr, cold_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("limits: mmap of COLD_BYTES");
    return 1;
  }
  madvise(memory, cold_bytes, MADV_HUGEPAGE);  // page walks are no limit of the memory; refused, it is only slower
  char* buffer = static_cast<char*>(memory);
#pragma omp parallel for num_threads(threads)
  for (size_t i = 0; i < cold_bytes; i += 4096) buffer[i] = 1;  // a page never written is the one page of zeros

  std::string fma;
  const InstructionSet* widest = nullptr;
  for (const InstructionSet& set : kSets) {
    if (!set.present) continue;
    widest = &set;
    const double rate =
        best_rate(threads, seconds, 2.0 * set.floats * kChains * kTurns * threads, [&](int) { set.fma(); });
    fma += (fma.empty() ? "\"" : ", \"") + std::string(set.name) + "\": " + std::to_string(rate);
  }
  const Bandwidths cold = bandwidths(*widest, buffer, cold_bytes, threads, 2 * seconds);
  const Bandwidths hot = bandwidths(*widest, buffer, hot_bytes, threads, seconds);
  std::string dpbf16 = "null";
  if (__builtin_cpu_supports("avx512bf16")) {
    dpbf16 = std::to_string(best_rate(threads, seconds, 64.0 * kChains * kTurns * threads, [](int) { dot_bf16(); }));
  }
  std::string tdpbf16 = "null";
  if (has_tiles()) {
    tdpbf16 =
        std::to_string(best_rate(threads, seconds, 4 * kTileFlops * kTileTurns * threads, [](int) { dot_tiles(); }));
  }
  std::printf("{\"threads\": %d, \"read\": %.0f, \"copy\": %.0f, ", threads, cold.read, cold.copy);
  std::printf("\"hot_read\": %.0f, \"hot_copy\": %.0f, ", hot.read, hot.copy);
  std::printf("\"fma_fp32\": {%s}, \"dpbf16\": %s, \"tdpbf16\": %s}\n", fma.c_str(), dpbf16.c_str(), tdpbf16.c_str());
}
