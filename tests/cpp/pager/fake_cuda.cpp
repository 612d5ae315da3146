#include "fake_cuda.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <thread>

namespace {

std::atomic<int> failing{0}, things{0};
std::atomic<int> pinned_made{0};
std::mutex devices;
std::set<int> with_context;
std::map<void*, size_t> pinned_bytes;
thread_local int current = 0;

int open_current() {
  const std::lock_guard lock(devices);
  with_context.insert(current);
  return current;
}

}  // namespace

struct CUevent_st {
  const int device = open_current();
  std::mutex mutex;
  std::condition_variable changed;
  long recorded = 0, done = 0;  // times

  void finish(long number) {
    const std::lock_guard lock(mutex);
    done = std::max(done, number);
    changed.notify_all();
  }
  void wait(long number) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return done >= number; });
  }
  long last() {
    const std::lock_guard lock(mutex);
    return recorded;
  }
};

struct CUstream_st {
  const int device = open_current();
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> work;
  bool busy = false, ending = false;
  std::thread thread{[this] { run(); }};

  void give(std::function<void()> one) {
    const std::lock_guard lock(mutex);
    work.push_back(std::move(one));
    changed.notify_all();
  }
  void run() {
    std::minstd_rand random(static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(this)));
    std::unique_lock lock(mutex);
    while (true) {
      changed.wait(lock, [&] { return ending || !work.empty(); });
      if (work.empty()) return;
      const auto one = std::move(work.front());
      work.pop_front();
      busy = true;
      lock.unlock();
      if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 100));
      one();
      lock.lock();
      busy = false;
      changed.notify_all();
    }
  }
  void synchronize() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return work.empty() && !busy; });
  }
};

namespace fake_cuda {

void launch(cudaStream_t stream, std::function<void()> kernel) { stream->give(std::move(kernel)); }
void fail_pinned(int count) { failing = count; }
int alive() { return things; }
Pinned pinned() {
  std::size_t bytes = 0;
  for (const auto& [memory, size] : pinned_bytes) bytes += size;
  return {pinned_made, bytes};
}
std::set<int> opened() {
  const std::lock_guard lock(devices);
  return with_context;
}

}  // namespace fake_cuda

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  current = device;
  open_current();
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorMemoryAllocation"; }
const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  ++things;
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  --things;
  stream->synchronize();
  {
    const std::lock_guard lock(stream->mutex);
    stream->ending = true;
    stream->changed.notify_all();
  }
  stream->thread.join();
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  stream->synchronize();
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  stream->give([event, number = event->last()] { event->wait(number); });
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  ++things;
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  --things;
  event->wait(event->last());
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (event->device != stream->device) return cudaErrorInvalidResourceHandle;
  long number;
  {
    const std::lock_guard lock(event->mutex);
    number = ++event->recorded;
  }
  stream->give([event, number] { event->finish(number); });
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  event->wait(event->last());
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  stream->give([to, from, bytes] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  stream->give([to, value, bytes] { std::memset(to, value, bytes); });
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  if (failing > 0) {
    --failing;
    return cudaErrorMemoryAllocation;
  }
  ++things;
  ++pinned_made;
  open_current();
  *memory = std::malloc(bytes);
  pinned_bytes[*memory] = bytes;
  std::memset(*memory, 0xcc, bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
  --things;
  open_current();
  pinned_bytes.erase(memory);
  std::free(memory);
  return cudaSuccess;
}

}  // extern "C"
