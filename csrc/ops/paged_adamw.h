// What the paged optimizer asks of a device, besides its backend for pages; one implementation each in
// paged_adamw_cpu.cpp and paged_adamw_cuda.cpp.
#pragma once

#include <ATen/Tensor.h>

#include <functional>
#include <memory>
#include <string>

#include "../adamw.h"
#include "../pager/adamw_states.h"
#include "../pager/backend.h"

namespace qlora {

struct PagedAdamwDevice {
  std::unique_ptr<pager::Backend> backend;
  // The update of this run. Called between the backend's before_compute and after_compute.
  std::function<void(const pager::AdamwRun& run, const AdamwOptions& options)> compute;
};

// For a device, pages of this size, and the path of a page file or nothing.
using MakePagedAdamwDevice = PagedAdamwDevice (*)(at::Device device, int64_t page_bytes, const std::string& page_file);

PagedAdamwDevice make_paged_adamw_cpu(at::Device device, int64_t page_bytes, const std::string& page_file);

// Called once by paged_adamw_cuda.cpp, if the extension is built for CUDA.
void register_cuda_paged_adamw(MakePagedAdamwDevice make);

}  // namespace qlora
