// The states of AdamW for a set of parameters, in pages: what is between a pager and the kernels.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "../adamw.h"
#include "pager.h"
#include "state_layout.h"

namespace qlora::pager {

using ParameterId = std::int64_t;

// One parameter of a step. Its states are those of `id`.
struct Update {
  ParameterId id;
  void* param;       // [numel]; null if it is not flat: those of its slices are, too, and compute gathers the elements
  const void* grad;  // likewise
  DType param_dtype, grad_dtype;
  std::uint64_t index;  // AdamwSlice's
  AdamwHyper hyper;     // whose step is set here
};

// A Part of a parameter's state, flat, in memory or, if that is null, at an offset of a file.
struct PartPlace {
  ParameterId id;
  Part part;
  std::byte* memory;
  std::int64_t offset;
};

// A run of pages, whose slices can be computed in any order and by any threads.
struct AdamwRun {
  // slices[i] is a part of updates[of[i]], whose hyper is the slice's.
  using Compute = std::function<void(std::span<const AdamwSlice> slices, std::span<const std::size_t> of)>;

  std::span<const AdamwSlice> slices;  // of the pages that are here
  std::span<const std::size_t> of = {};
  // Pages that are not: pass() moves the next of them in, computes it and moves it out, or returns false if there is
  // none. most_passing threads may be in it.
  std::int64_t absent = 0, most_passing = 0;
  std::function<bool(const Compute& compute)> pass = {};
  // Instead of all that: everything by the calling thread, page after page.
  std::function<void(const Compute& compute)> in_order = {};
};

class AdamwStates {
 public:
  explicit AdamwStates(std::unique_ptr<Pager> pager) : pager_(std::move(pager)) {}

  // Parameters of these numbers of elements, with states of zeros of these widths (32 or 8). All or, if it throws
  // (see Pager::add), none.
  std::vector<ParameterId> add(std::span<const std::int64_t> numels, std::span<const int> bits);
  void remove(ParameterId id);

  std::int64_t steps(ParameterId id) const { return parameters_[static_cast<std::size_t>(id)].steps; }
  void set_steps(ParameterId id, std::int64_t steps) { parameters_[static_cast<std::size_t>(id)].steps = steps; }

  // For several of these, of which none is to take a step if another cannot: see Pager::prepare.
  void prepare(std::span<const ParameterId> ids);

  // One step of each: compute(run) is called for all pages, run by run. Each step is then counted. See Pager::walk for
  // what throws when.
  void step(std::span<Update> updates, const std::function<void(const AdamwRun&)>& compute);

  // Copies the parts out of the pages or into them. `file` is a descriptor that offsets refer to.
  void save(std::span<const PartPlace> places, int file);
  void load(std::span<const PartPlace> places, int file);

  Stats stats() const { return pager_->stats(); }

 private:
  struct Parameter {
    int bits = 0;
    std::int64_t steps = 0;
    std::vector<Segment> segments;
  };

  // What a walk does: for each page, in the order of `pages`, the segments of it and what each belongs to.
  struct Plan {
    struct Item {
      const Segment* segment;
      std::size_t index;
    };
    std::vector<PageId> pages;
    std::vector<std::vector<Item>> items;
  };
  template <typename T>
  Plan plan(std::span<const T> what) const;
  void transfer(std::span<const PartPlace> places, int file, bool load);

  std::unique_ptr<Pager> pager_;
  std::vector<Parameter> parameters_;
  std::vector<ParameterId> unused_;       // numbers of removed parameters
  std::vector<std::int64_t> page_users_;  // segments in each page, by PageId
  Tail tail_;
};

}  // namespace qlora::pager
