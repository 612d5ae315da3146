#include "backend_cuda.h"

#include <exception>
#include <stdexcept>
#include <utility>

namespace qlora::pager {
namespace {

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that no one raises it once more
  throw std::runtime_error(std::string("PagedAdamW: ") + what + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

class DeviceGuard {
 public:
  DeviceGuard(const CudaHooks& hooks, int device) : hooks_(hooks), before_(hooks.enter_device(device)) {}
  ~DeviceGuard() { hooks_.return_to(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  const CudaHooks& hooks_;
  int before_;
};

void copy(void* to, const void* from, std::int64_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  check_cuda(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), kind, stream), "cudaMemcpyAsync");
}

cudaEvent_t new_event() {
  cudaEvent_t event;
  check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  return event;
}

}  // namespace

CudaBackend::CudaBackend(std::int64_t page_bytes, int device, const std::string& page_file, CudaHooks hooks)
    : Backend(page_bytes),
      device_(device),
      hooks_(std::move(hooks)),
      recent_(kRecent),
      pinned_(page_bytes, hooks_.warn) {
  const DeviceGuard guard(hooks_, device_);
  if (!page_file.empty()) file_.emplace(page_file);
  for (cudaStream_t* stream : {&in_, &out_}) {
    check_cuda(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  for (Work& work : recent_) work.event = new_event();
  for (Staging& staging : staging_) staging.copied = new_event();
}

// The pager has waited for all that was moved. What a device that failed does not give back is lost.
CudaBackend::~CudaBackend() {
  if (!usable()) return;
  try {
    const DeviceGuard guard(hooks_, device_);
    for (Staging& staging : staging_) {
      cudaEventSynchronize(staging.copied);
      if (staging.memory != nullptr) pinned_.release(staging.memory);
      cudaEventDestroy(staging.copied);
    }
    for (const Work& work : recent_) cudaEventDestroy(work.event);
    for (cudaStream_t stream : {in_, out_}) cudaStreamDestroy(stream);
  } catch (const std::exception&) {
  }
}

std::byte* CudaBackend::allocate(Tier tier, std::int64_t room) {
  const DeviceGuard guard(hooks_, device_);
  if (tier == Tier::Host) return pinned_.allocate(room);
  std::byte* memory = hooks_.allocate_device(page_bytes());
  // The memory may still be in use by what this stream does; once it is zeros, any stream may have it.
  const cudaStream_t stream = hooks_.compute_stream();
  check_cuda(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(page_bytes()), stream), "cudaMemsetAsync");
  check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  return memory;
}

void CudaBackend::release(Tier tier, std::byte* memory) {
  if (!usable()) return;
  try {
    const DeviceGuard guard(hooks_, device_);
    if (tier == Tier::Host) {
      pinned_.release(memory);
    } else {
      hooks_.release_device(memory);
    }
  } catch (const std::exception&) {  // a device that failed says so wherever it is used
  }
}

Token CudaBackend::new_token() {
  Work& oldest = recent_[static_cast<std::size_t>(++last_ % kRecent)];
  io_.wait(oldest.job);
  check_cuda(cudaEventSynchronize(oldest.event), "cudaEventSynchronize");
  oldest.job = 0;
  return last_;
}

const CudaBackend::Work* CudaBackend::work(Token token) const {
  return token == 0 || token + kRecent <= last_ ? nullptr : &recent_[static_cast<std::size_t>(token % kRecent)];
}

void CudaBackend::stream_waits(cudaStream_t stream, Token token) {
  const Work* before = work(token);
  if (before == nullptr) return;
  io_.wait(before->job);  // which records the event
  check_cuda(cudaStreamWaitEvent(stream, before->event, 0), "cudaStreamWaitEvent");
}

Token CudaBackend::move(const Place& from, const Place& to, Token after_source, Token after_target) {
  const DeviceGuard guard(hooks_, device_);
  const Token token = new_token();
  Work& done = recent_[static_cast<std::size_t>(token % kRecent)];
  if (from.tier == Tier::File || to.tier == Tier::File) {
    if (from.tier != Tier::Host && to.tier != Tier::Host) {
      for (Staging& staging : staging_) {
        if (staging.memory == nullptr) staging.memory = pinned_.allocate(1);
      }
    }
    // The jobs before this one are done when it begins: only events are left to wait for.
    done.job = io_.submit([this, from, to, source = work(after_source), target = work(after_target),
                           event = done.event] { move_with_file(from, to, source, target, event); });
    return token;
  }
  const cudaStream_t stream = to.tier == Tier::Device ? in_ : out_;
  stream_waits(stream, after_source);
  stream_waits(stream, after_target);
  if (from.tier == Tier::None) {
    check_cuda(cudaMemsetAsync(to.memory, 0, static_cast<std::size_t>(page_bytes()), stream), "cudaMemsetAsync");
  } else {
    copy(to.memory, from.memory, page_bytes(),
         to.tier == Tier::Device ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost, stream);
  }
  check_cuda(cudaEventRecord(done.event, stream), "cudaEventRecord");
  return token;
}

// On the I/O thread, whose device it may remain.
void CudaBackend::move_with_file(const Place& from, const Place& to, const Work* after_source, const Work* after_target,
                                 cudaEvent_t done) {
  hooks_.enter_device(device_);
  const cudaStream_t stream = to.tier == Tier::Device ? in_ : out_;
  std::byte* memory = from.tier == Tier::Host ? from.memory : to.memory;
  Staging* staging = nullptr;
  if (from.tier == Tier::Device || to.tier == Tier::Device) {
    staging = &staging_[turn_++ % kStaging];
    check_cuda(cudaEventSynchronize(staging->copied), "cudaEventSynchronize");
    memory = staging->memory;
  }
  for (const Work* before : {after_source, after_target}) {
    if (before != nullptr) check_cuda(cudaStreamWaitEvent(stream, before->event, 0), "cudaStreamWaitEvent");
  }
  if (from.tier == Tier::Device) copy(memory, from.memory, page_bytes(), cudaMemcpyDeviceToHost, stream);
  if (to.tier != Tier::Device) check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  if (from.tier == Tier::File) {
    file_->read(from.offset, memory, page_bytes());
  } else {
    file_->write(to.offset, memory, page_bytes());
  }
  if (to.tier == Tier::Device) {
    copy(to.memory, memory, page_bytes(), cudaMemcpyHostToDevice, stream);
    check_cuda(cudaEventRecord(staging->copied, stream), "cudaEventRecord");
  }
  check_cuda(cudaEventRecord(done, stream), "cudaEventRecord");
}

void CudaBackend::before_compute(Token token) {
  const DeviceGuard guard(hooks_, device_);
  stream_waits(hooks_.compute_stream(), token);
}

Token CudaBackend::after_compute() {
  const DeviceGuard guard(hooks_, device_);
  const Token token = new_token();
  check_cuda(cudaEventRecord(recent_[static_cast<std::size_t>(token % kRecent)].event, hooks_.compute_stream()),
             "cudaEventRecord");
  return token;
}

void CudaBackend::wait(Token token) {
  const Work* before = work(token);
  if (before == nullptr) return;
  try {
    io_.wait(before->job);
  } catch (...) {  // jobs after one that failed are left out, and with them what they would have waited for
    for (const cudaStream_t stream : {in_, out_}) cudaStreamSynchronize(stream);
    for (const Work& recent : recent_) cudaEventSynchronize(recent.event);
    throw;
  }
  check_cuda(cudaEventSynchronize(before->event), "cudaEventSynchronize");
}

void CudaBackend::check() const {
  io_.check();
  if (file_) file_->check_whole();
}

void CudaBackend::read(const std::byte* page, std::byte* memory, std::int64_t bytes) {
  const DeviceGuard guard(hooks_, device_);
  copy(memory, page, bytes, cudaMemcpyDeviceToHost, hooks_.compute_stream());
  check_cuda(cudaStreamSynchronize(hooks_.compute_stream()), "cudaStreamSynchronize");
}

void CudaBackend::write(const std::byte* memory, std::byte* page, std::int64_t bytes) {
  const DeviceGuard guard(hooks_, device_);
  copy(page, memory, bytes, cudaMemcpyHostToDevice, hooks_.compute_stream());
  check_cuda(cudaStreamSynchronize(hooks_.compute_stream()), "cudaStreamSynchronize");
}

}  // namespace qlora::pager
