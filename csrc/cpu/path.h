// Which set of CPU kernels runs. Chosen once at load: the fastest the machine has, or QLORA_EXT_CPU.
#pragma once

#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__clang__)
#error "expected g++ (CXX=g++): its pragmas mark what is compiled for AVX2 and AVX512"
#endif

namespace qlora::cpu {

// Ascending: each path may use all that the ones before it may. Avx512 is F, BW, DQ and VL; Avx512Bf16 adds BF16 and
// VBMI, which all CPUs with BF16 have but for Cooper Lake; Amx tiles of bf16.
enum class Path : int { Portable = 0, Avx2 = 1, Avx512 = 2, Avx512Bf16 = 3, Amx = 4 };

Path path();
const char* path_name(Path path);
std::vector<std::string> path_names();  // those this machine can run, ascending

// Whether this machine has instructions that multiply bf16, whichever path is in use.
bool has_native_bf16();

// Whether it has those that multiply matrices of bf16, of which torch makes use, and no kernel here: Arm's BF16.
bool torch_has_bf16_matrices();

// Throws std::invalid_argument, naming what was expected, if the machine cannot run it or there is no such path. Not
// while an op runs: what its kernels get was laid out for the path in use.
void set_path(const std::string& name);

}  // namespace qlora::cpu
