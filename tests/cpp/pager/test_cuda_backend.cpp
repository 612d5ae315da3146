// The CUDA backend on a runtime of threads (fake_cuda.h): its copies, kernels and file jobs run at any time that its
// events and waits allow.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <set>
#include <thread>

#include "fake_cuda.h"
#include "pager/backend_cuda.h"
#include "states_test.h"

using namespace qlora;
using namespace qlora::pager;

namespace {

constexpr std::int64_t kPageBytes = 4096;
constexpr int kDevice = 1;  // the thread's current one remains 0, which nothing may open

int current_device() {
  int device;
  cudaGetDevice(&device);
  return device;
}

// As torch does.
int enter(int device) {
  const int before = current_device();
  if (before != device) cudaSetDevice(device);
  return before;
}

cudaStream_t new_stream() {
  cudaStream_t stream;
  std::thread([&] {
    cudaSetDevice(kDevice);
    cudaStreamCreateWithFlags(&stream, 0);
  }).join();
  return stream;
}

std::string page_path() {
  return (std::filesystem::temp_directory_path() / "qlora_test_cuda_backend_pages").string() + std::to_string(getpid());
}

// A pager on the fake device, and what has been made there.
struct Machine {
  cudaStream_t stream = new_stream();
  int warnings = 0, allocated = 0;

  ~Machine() {
    CHECK_EQ(allocated, 0);
    CHECK(!std::filesystem::exists(page_path()));
    cudaStreamDestroy(stream);
    CHECK_EQ(fake_cuda::alive(), 0);
    CHECK(fake_cuda::opened() == std::set<int>{kDevice});
  }

  std::unique_ptr<Pager> make_pager(std::int64_t device, std::int64_t host, bool with_file) {
    CudaHooks hooks{.allocate_device =
                        [this](std::int64_t bytes) {
                          CHECK_EQ(current_device(), kDevice);
                          ++allocated;
                          auto* memory = static_cast<std::byte*>(std::malloc(static_cast<std::size_t>(bytes)));
                          std::memset(memory, 0xcc, static_cast<std::size_t>(bytes));
                          return memory;
                        },
                    .release_device =
                        [this](std::byte* memory) {
                          --allocated;
                          std::free(memory);
                        },
                    .compute_stream = [this] { return stream; },
                    .enter_device = enter,
                    .return_to =
                        [](int device) {
                          if (fake_cuda::opened().contains(device)) cudaSetDevice(device);
                        },
                    .warn = [this](const std::string&) { ++warnings; }};
    auto backend = std::make_unique<CudaBackend>(kPageBytes, kDevice, with_file ? page_path() : "", std::move(hooks));
    std::vector<TierRoom> tiers = {{Tier::Device, device, backend->ring_pages(device)},
                                   {Tier::Host, host, with_file ? backend->staging_pages() : 0}};
    if (with_file) tiers.push_back({Tier::File, kUnlimited, 0});
    return std::make_unique<Pager>(std::move(backend), tiers);
  }
};

void run(unsigned seed, std::int64_t device, std::int64_t host, bool with_file, int failing_pinned) {
  Machine machine;
  fake_cuda::fail_pinned(failing_pinned);
  AdamwStates states(machine.make_pager(device, host, with_file));
  live(
      seed, states,
      [&](const AdamwRun& run) {
        CHECK_EQ(run.absent, 0);
        fake_cuda::launch(machine.stream, [copy = std::vector(run.slices.begin(), run.slices.end())] { update(copy); });
      },
      [&] { cudaStreamSynchronize(machine.stream); });
  CHECK_EQ(machine.warnings, failing_pinned > 0 ? 1 : 0);
}

// The copies that are under way when a read fails are over before their memory is given back.
void a_file_cut_short_under_a_walk() {
  for (std::size_t visits = 1; visits < 6; ++visits) {
    Machine machine;
    const std::unique_ptr<Pager> pager = machine.make_pager(3, 0, true);
    const std::vector<PageId> pages = pager->add(20);
    const auto touch = [](std::size_t, std::span<std::byte* const>) {};
    pager->walk(pages, true, touch);
    std::size_t visited = 0;
    bool failed = false;
    try {
      pager->walk(pages, false, [&](std::size_t, std::span<std::byte* const>) {
        if (++visited == visits) std::filesystem::resize_file(page_path(), 10 * kPageBytes);
      });
    } catch (const std::runtime_error&) {
      failed = true;
    }
    CHECK(failed);
  }
}

// Pinned memory comes in blocks of pages, and no more of it than the host may have.
void pinned_pages_in_blocks() {
  for (const std::int64_t host : {std::int64_t{500}, std::int64_t{1000}, kUnlimited}) {
    const bool with_file = host == 500;
    Machine machine;
    const int made_before = fake_cuda::pinned().made;
    const std::unique_ptr<Pager> pager = machine.make_pager(3, host, with_file);
    std::vector<PageId> pages = pager->add(1000);
    const auto touch = [&](std::size_t, std::span<std::byte* const>) {
      CHECK(fake_cuda::pinned().bytes <= static_cast<std::size_t>(std::min<std::int64_t>(host, 1125) * kPageBytes));
    };
    pager->walk(pages, true, touch);
    CHECK(fake_cuda::pinned().made - made_before < 60);
    CHECK(fake_cuda::pinned().bytes >= static_cast<std::size_t>(std::min<std::int64_t>(host, 997) * kPageBytes));
    // A block goes with the last of its pages; what is left is used again.
    while (pages.size() > 300) {
      pager->remove(pages.back());
      pages.pop_back();
    }
    const std::size_t left = fake_cuda::pinned().bytes;
    CHECK(left < 400 * kPageBytes);
    const std::vector<PageId> added = pager->add(static_cast<std::int64_t>(left) / kPageBytes - 300);
    pages.insert(pages.end(), added.begin(), added.end());
    pager->walk(pages, true, touch);
    if (with_file) continue;
    CHECK_EQ(fake_cuda::pinned().bytes, left);
    // Blocks are small again when few pages are left.
    for (const PageId page : pages) pager->remove(page);
    pager->walk(pager->add(4), true, touch);
    CHECK_EQ(fake_cuda::pinned().bytes, 4 * kPageBytes);
  }
}

// Work that is too old to be remembered is done: a token of it needs no wait.
void work_is_forgotten_when_it_is_done() {
  Machine machine;
  const std::unique_ptr<Pager> pager = machine.make_pager(3, kUnlimited, false);
  std::atomic<bool> done = false;
  fake_cuda::launch(machine.stream, [&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    done = true;
  });
  const Token first = pager->backend().after_compute();
  for (int i = 0; i < 600; ++i) pager->backend().after_compute();  // 512 are remembered
  pager->backend().wait(first);
  CHECK(done);
  cudaStreamSynchronize(machine.stream);
}

}  // namespace

int main() {
  work_is_forgotten_when_it_is_done();
  pinned_pages_in_blocks();
  a_file_cut_short_under_a_walk();
  for (unsigned seed = 0; seed < 5; ++seed) {
    run(seed, seed % 5 * 3, kUnlimited, false, 0);
    run(seed, seed % 4 * 2, seed % 3 * 4, true, 0);
    run(seed, 2, seed % 2 * 6, true, seed % 2 == 0 ? 2 : 3);
  }
  return failures();
}
