// Stands in for the CUDA runtime: what the launchers and nvcc's host code call, on a machine without a GPU.
//
// Nothing runs here. Each launch and memset is handed to `recorder` (recorded_gpu.py), which runs it in the PTX
// interpreter. What the runtime itself refuses is refused here: cudaGetLastError reports it, as it would there.
#include <cuda_runtime_api.h>

#include <cstddef>
#include <map>
#include <string>

namespace {

struct Recorder {
  void (*launch)(const char* kernel, const dim3* grid, const dim3* cta, std::size_t shared_bytes, void* stream,
                 void** arguments);
  void (*memset)(void* to, int value, std::size_t bytes, void* stream);
};
Recorder recorder;

struct Kernel {
  std::string name;                             // mangled, as in the PTX
  std::size_t most_dynamic_shared = 48 * 1024;  // without cudaFuncSetAttribute
};

std::map<const void*, Kernel>& kernels() {  // by host stub; the first stubs register before main
  static std::map<const void*, Kernel> all;
  return all;
}

struct Configuration {
  dim3 grid, cta;
  std::size_t shared_bytes;
  cudaStream_t stream;
};
Configuration pushed;
cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

extern "C" {

void qlora_set_recorder(decltype(Recorder::launch) launch, decltype(Recorder::memset) memset) {
  recorder = {launch, memset};
}

// --- what nvcc's host code calls ------------------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void* fat_binary) { return static_cast<void**>(fat_binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* host_stub, char*, const char* device_name, int, void*, void*, dim3*,
                            dim3*, int*) {
  kernels()[host_stub] = {device_name};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 cta, std::size_t shared_bytes, cudaStream_t stream) {
  pushed = {grid, cta, shared_bytes, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* cta, std::size_t* shared_bytes, void* stream) {
  *grid = pushed.grid, *cta = pushed.cta, *shared_bytes = pushed.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* host_stub, dim3 grid, dim3 cta, void** arguments, std::size_t shared_bytes,
                             cudaStream_t stream) {
  const auto found = kernels().find(host_stub);
  if (found == kernels().end()) return fail(cudaErrorInvalidDeviceFunction);
  const std::size_t threads = std::size_t{cta.x} * cta.y * cta.z;
  const bool valid_grid =
      0 < grid.x && grid.x < 1u << 31 && 0 < grid.y && grid.y < 65536 && 0 < grid.z && grid.z < 65536;
  if (!valid_grid || threads < 1 || threads > 1024) return fail(cudaErrorInvalidConfiguration);
  if (shared_bytes > found->second.most_dynamic_shared) return fail(cudaErrorInvalidValue);
  recorder.launch(found->second.name.c_str(), &grid, &cta, shared_bytes, stream, arguments);
  return cudaSuccess;
}

// From CUDA 13 on the host code asks for a handle first: here the handle is the stub.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host_stub) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host_stub));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 cta, void** arguments, std::size_t shared_bytes,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, cta, arguments, shared_bytes, stream);
}

// --- what the launchers call ----------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaFuncSetAttribute(const void* host_stub, cudaFuncAttribute attribute, int value) {
  constexpr int kMostSharedBytes = 227 * 1024;
  const auto found = kernels().find(host_stub);
  if (found == kernels().end()) return fail(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // a preference
  if (value < 0 || value > kMostSharedBytes) return fail(cudaErrorInvalidValue);
  found->second.most_dynamic_shared = static_cast<std::size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  recorder.memset(to, value, bytes, stream);
  return cudaSuccess;
}

}  // extern "C"
