// As much of the CUDA runtime as the pager calls, on the CPU: a stream is a thread that does what it is given in order,
// after a while. Device memory is ordinary memory, so that ThreadSanitizer and AddressSanitizer see each access.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <set>

namespace fake_cuda {

// A kernel.
void launch(cudaStream_t stream, std::function<void()> kernel);

// Makes the next allocations of pinned memory fail.
void fail_pinned(int count);

// Pinned allocations, events and streams that have not been given back.
int alive();

// Pinned allocations made so far, and the bytes of those that have not been given back.
struct Pinned {
  int made;
  std::size_t bytes;
};
Pinned pinned();

// Devices with a context: those that something was made on, or that were made current.
std::set<int> opened();

}  // namespace fake_cuda
