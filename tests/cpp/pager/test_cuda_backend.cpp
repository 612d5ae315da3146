// The CUDA backend on a runtime of threads (fake_cuda.h): its copies, kernels and file jobs run at any time that its
// events and waits allow.
#include <unistd.h>

#include <cstdlib>
#include <filesystem>

#include "fake_cuda.h"
#include "pager/backend_cuda.h"
#include "states_test.h"

using namespace qlora;
using namespace qlora::pager;

namespace {

constexpr std::int64_t kPageBytes = 4096;

void run(unsigned seed, std::int64_t device, std::int64_t host, bool with_file, int failing_pinned) {
  const std::string path =
      (std::filesystem::temp_directory_path() / "qlora_test_cuda_backend_pages").string() + std::to_string(getpid());
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, 0);
  int warnings = 0, allocated = 0;
  fake_cuda::fail_pinned(failing_pinned);
  {
    CudaHooks hooks{.allocate_device =
                        [&](std::int64_t bytes) {
                          ++allocated;
                          auto* memory = static_cast<std::byte*>(std::malloc(static_cast<std::size_t>(bytes)));
                          std::memset(memory, 0xcc, static_cast<std::size_t>(bytes));
                          return memory;
                        },
                    .release_device =
                        [&](std::byte* memory) {
                          --allocated;
                          std::free(memory);
                        },
                    .compute_stream = [&] { return stream; },
                    .warn = [&](const std::string&) { ++warnings; }};
    auto backend = std::make_unique<CudaBackend>(0, with_file ? path : "", std::move(hooks));
    std::vector<TierRoom> tiers = {{Tier::Device, device, backend->ring_pages(device)},
                                   {Tier::Host, host, with_file ? backend->staging_pages() : 0}};
    if (with_file) tiers.push_back({Tier::File, kUnlimited, 0});
    AdamwStates states(std::make_unique<Pager>(std::move(backend), kPageBytes, tiers), kPageBytes);
    live(
        seed, states,
        [&](std::span<const AdamwSlice> slices) {
          fake_cuda::launch(stream, [copy = std::vector(slices.begin(), slices.end())] { update(copy); });
        },
        [&] { cudaStreamSynchronize(stream); });
  }
  CHECK_EQ(allocated, 0);
  CHECK_EQ(warnings, failing_pinned > 0 ? 1 : 0);
  CHECK(!std::filesystem::exists(path));
  cudaStreamDestroy(stream);
  CHECK_EQ(fake_cuda::alive(), 0);
}

}  // namespace

int main() {
  for (unsigned seed = 0; seed < 5; ++seed) {
    run(seed, seed % 5 * 3, kUnlimited, false, 0);
    run(seed, seed % 4 * 2, seed % 3 * 4, true, 0);
    run(seed, 2, seed % 2 * 6, true, seed % 2 == 0 ? 2 : 3);
  }
  return failures();
}
