// The paged optimizer on CUDA: memory by torch's allocator, and one launch on torch's current stream for all the
// pages that the pager hands out at once.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../launch.h"
#include "../pager/backend_cuda.h"
#include "check_launch.h"
#include "paged_adamw.h"

namespace qlora {
namespace {

// The table of slices is filled in pinned memory, which torch's allocator gives to no one else before it is copied.
void compute(at::Device device, std::span<const AdamwSlice> slices, const AdamwOptions& options) {
  const c10::cuda::CUDAGuard guard(device);
  const auto n = static_cast<int64_t>(slices.size());
  const at::Tensor filled =
      at::empty({cuda::adamw_table_bytes(n)}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  cuda::fill_adamw_table(slices.data(), n, options, filled.data_ptr());
  const at::Tensor table = filled.to(device, /*non_blocking=*/true);
  check_launch(cuda::launch_adamw(table.const_data_ptr(), n, adamw_blocks(slices.data(), n), options,
                                  c10::cuda::getCurrentCUDAStream(device.index()).stream()),
               "PagedAdamW", c10::str(n, " slices"));
}

PagedAdamwDevice make(at::Device device, int64_t page_bytes, const std::string& page_file) {
  const auto stream = [device] { return c10::cuda::getCurrentCUDAStream(device.index()).stream(); };
  pager::CudaHooks hooks{
      .allocate_device =
          [stream](std::int64_t bytes) {
            return static_cast<std::byte*>(
                c10::cuda::CUDACachingAllocator::raw_alloc_with_stream(static_cast<size_t>(bytes), stream()));
          },
      .release_device = [](std::byte* memory) { c10::cuda::CUDACachingAllocator::raw_delete(memory); },
      .compute_stream = stream,
      .enter_device = [](int to) { return int{c10::cuda::ExchangeDevice(static_cast<c10::DeviceIndex>(to))}; },
      .return_to = [](int to) { c10::cuda::MaybeSetDevice(static_cast<c10::DeviceIndex>(to)); },
      .warn = [](const std::string& text) { TORCH_WARN(text); },
  };
  return {std::make_unique<pager::CudaBackend>(page_bytes, device.index(), page_file, std::move(hooks)),
          [device](const pager::AdamwRun& run, const AdamwOptions& options) {
            const auto launch = [&](std::span<const AdamwSlice> slices, std::span<const size_t>) {
              compute(device, slices, options);
            };
            if (!run.slices.empty()) launch(run.slices, {});
            while (run.absent > 0 && run.pass(launch)) continue;
          }};
}

const bool registered = [] {
  register_cuda_paged_adamw(make);
  return true;
}();

}  // namespace
}  // namespace qlora
