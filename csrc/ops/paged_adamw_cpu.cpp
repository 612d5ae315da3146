// The paged optimizer on the CPU: threads that compute what is in memory, and pass pages of the file through it.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "../cpu/adamw.h"
#include "../pager/backend_host.h"
#include "paged_adamw.h"
#include "parallel.h"

namespace qlora {
namespace {

constexpr int64_t kGrainBlocks = 32;  // of 256 elements, that a thread should have before another is worth waking
constexpr int64_t kParts = 16;        // for each thread: fewer are longer runs of memory, with more all end together

void compute(const pager::AdamwRun& run, const AdamwOptions& options) {
  const auto n = static_cast<int64_t>(run.slices.size());
  const int64_t blocks = adamw_blocks(run.slices.data(), n);
  const int64_t part = std::max(kGrainBlocks, blocks / (at::get_num_threads() * kParts));
  std::atomic<int64_t> next_block = 0, pages_begun = 0, may_pass = run.most_passing;
  const auto whole_page = [&](std::span<const AdamwSlice> slices, std::span<const size_t>) {
    const auto count = static_cast<int64_t>(slices.size());
    cpu::adamw(slices.data(), count, options, 0, adamw_blocks(slices.data(), count));
  };
  // Takes blocks and pages at the same pace: the disk, if it has to work, does so all the time.
  const auto work = [&](bool passes) {
    while (true) {
      const int64_t block = next_block, page = pages_begun;
      if (passes && page < run.absent && page * blocks <= block * run.absent) {
        if (pages_begun++ < run.absent) passes = run.pass(whole_page);
      } else if (block < blocks) {
        const int64_t begin = std::min(next_block.fetch_add(part), blocks);
        cpu::adamw(run.slices.data(), n, options, begin, std::min(begin + part, blocks));
      } else {
        return;
      }
    }
  };
  parallel_for(0, std::min<int64_t>(at::get_num_threads(), ceil_div(blocks, part) + run.absent), 1,
               [&](int64_t begin, int64_t end) {
                 try {
                   for (; begin < end; ++begin) work(may_pass-- > 0);
                 } catch (...) {
                   next_block = blocks;  // the other threads finish what they have
                   pages_begun = run.absent;
                   throw;
                 }
               });
}

}  // namespace

PagedAdamwDevice make_paged_adamw_cpu(at::Device, int64_t page_bytes, const std::string& page_file) {
  return {std::make_unique<pager::HostBackend>(page_bytes, page_file, at::get_num_threads()), compute};
}

}  // namespace qlora
