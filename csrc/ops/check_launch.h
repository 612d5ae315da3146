// What a launch on CUDA raises.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include <string>

namespace qlora {

// Raises a launch's error with the name of the op and what it was called with.
inline void check_launch(cudaError_t error, const char* op, const std::string& arguments) {
  if (error != cudaSuccess) cudaGetLastError();  // so that torch does not raise it once more
  TORCH_CHECK(error == cudaSuccess, op, "(", arguments, "): ", cudaGetErrorName(error), ": ",
              cudaGetErrorString(error));
}

}  // namespace qlora
