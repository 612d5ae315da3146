// A machine in virtual time that keeps a trace: engines that copy and one that computes, each doing what it is given in
// order, at most one thing at a time. Whether an access clashes with another is seen from the times of both.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../check.h"
#include "pager/host_memory.h"
#include "pager/pager.h"

namespace qlora::pager {

struct Costs {
  double compute, in, out;  // of a page
};

class SimulatedBackend final : public Backend {
 public:
  struct Span {
    double begin, end;
    bool write;
  };
  struct Trace {
    double now = 0;  // the caller's time
    double computed = 0, waited = 0;
    double late = 0;  // the longest that an engine was idle while what it was given next could have been done
    std::vector<std::string> moves;
    std::int64_t failing = -1;                          // the move that fails, counted from the next one, 0
    std::map<std::string, std::vector<Span>> accesses;  // by place
    std::map<Tier, std::int64_t> allocated, most;
    double in_free = 0, out_free = 0, compute_free = 0;

    double end() const { return std::max({in_free, out_free, compute_free}); }
  };

  SimulatedBackend(std::int64_t page_bytes, Costs costs, Trace& trace)
      : Backend(page_bytes), costs_(costs), trace_(trace), ends_(1, 0.0) {}

  Tier compute_tier() const override { return Tier::Device; }
  std::int64_t ring_pages(std::int64_t) const override { return 3; }

  std::byte* allocate(Tier tier, std::int64_t) override {
    auto& now = trace_.allocated[tier];
    trace_.most[tier] = std::max(trace_.most[tier], ++now);
    return allocate_host(page_bytes());
  }
  void release(Tier tier, std::byte* memory) override {
    --trace_.allocated[tier];
    for (const Span& span : trace_.accesses[name({.tier = tier, .memory = memory})]) {
      CHECK(span.end <= trace_.now + 1e-9);  // else it is another's while this one's still moves
    }
    trace_.accesses.erase(name({.tier = tier, .memory = memory}));
    release_host(memory, page_bytes());
  }

  Token move(const Place& from, const Place& to, Token after_source, Token after_target) override {
    if (trace_.failing >= 0 && trace_.failing-- == 0) {
      if (to.memory != nullptr) std::memset(to.memory, 0xcc, static_cast<std::size_t>(page_bytes()));
      throw std::runtime_error("a move fails");
    }
    const bool in = to.tier == compute_tier();
    double& engine = in ? trace_.in_free : trace_.out_free;
    const double ready = std::max(ends_[after_source], ends_[after_target]);
    const double begin = std::max({engine, ready, trace_.now});
    // It could have begun when the engine was free and its memory, too: which, for what the caller computes in, is when
    // that was computed.
    const double possible = std::max({engine, ready, in ? computed_in_[to.memory] : computed_in_[from.memory]});
    trace_.late = std::max(trace_.late, begin - possible);
    engine = begin + (from.tier == Tier::None ? 0 : in ? costs_.in : costs_.out);
    access(from, begin, engine, false);
    access(to, begin, engine, true);
    trace_.moves.push_back(name(from) + ">" + name(to));
    copy(from, to);
    ends_.push_back(engine);
    return ends_.size() - 1;
  }

  void before_compute(Token token) override {
    trace_.waited += std::max(0.0, ends_[token] - trace_.compute_free);
    trace_.compute_free = std::max(trace_.compute_free, ends_[token]);
  }

  // What a visit does: the compute on a page.
  void compute(std::byte* memory) {
    double& at = trace_.compute_free;
    access({.tier = compute_tier(), .memory = memory}, at, at + costs_.compute, true);
    at += costs_.compute;
    trace_.computed += costs_.compute;
    computed_in_[memory] = at;
  }

  Token after_compute() override {
    ends_.push_back(trace_.compute_free);
    return ends_.size() - 1;
  }

  void wait(Token token) override { trace_.now = std::max(trace_.now, ends_[token]); }
  void check() const override {}
  void reserve_file(std::int64_t bytes) override {
    if (std::ssize(file_) < bytes) file_.resize(static_cast<std::size_t>(bytes), std::byte{0xcc});
  }
  bool usable() const override { return true; }
  void read(const std::byte*, std::byte*, std::int64_t) override {}
  void write(const std::byte*, std::byte*, std::int64_t) override {}
  double seconds_waited() const override { return trace_.waited; }

 private:
  static std::string name(const Place& place) {
    switch (place.tier) {
      case Tier::None:
        return "zeros";
      case Tier::File:
        return "file " + std::to_string(place.offset);
      default:
        return (place.tier == Tier::Host ? "host " : "device ") +
               std::to_string(reinterpret_cast<std::uintptr_t>(place.memory));
    }
  }

  // Of two accesses of a place, one of them a write, the one that was asked for first is over before the other begins.
  void access(const Place& place, double begin, double end, bool write) {
    if (place.tier == Tier::None) return;
    auto& spans = trace_.accesses[name(place)];
    for (const Span& earlier : spans) {
      if (earlier.write || write) CHECK(earlier.end <= begin + 1e-9);
    }
    spans.push_back({begin, end, write});
  }

  void copy(const Place& from, const Place& to) {
    const auto size = static_cast<std::size_t>(page_bytes());
    const auto at = [&](const Place& place) {
      return place.tier == Tier::File ? file_.data() + place.offset : place.memory;
    };
    if (from.tier == Tier::None) {
      std::memset(at(to), 0, size);
    } else {
      std::memcpy(at(to), at(from), size);
    }
  }

  Costs costs_;
  Trace& trace_;
  std::vector<double> ends_;  // by token
  std::map<const std::byte*, double> computed_in_;
  std::vector<std::byte> file_;
};

}  // namespace qlora::pager
