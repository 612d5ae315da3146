#include "adamw_states.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace qlora::pager {
namespace {

// All of it, at an offset of a file.
void transfer_file(int file, std::byte* memory, std::int64_t bytes, std::int64_t offset, bool load) {
  while (bytes > 0) {
    const auto size = static_cast<std::size_t>(bytes);
    const ssize_t length = load ? ::pread(file, memory, size, offset) : ::pwrite(file, memory, size, offset);
    if (length < 0 && errno == EINTR) continue;
    if (length <= 0) {
      throw std::system_error(length < 0 ? errno : EIO, std::generic_category(),
                              std::string(load ? "read" : "write") + " at " + std::to_string(offset) + ": expected " +
                                  std::to_string(bytes) + " bytes more");
    }
    memory += length;
    offset += length;
    bytes -= length;
  }
}

}  // namespace

std::vector<ParameterId> AdamwStates::add(std::span<const std::int64_t> numels, std::span<const int> bits) {
  // Pages that are not there yet are numbered from here on, until it is known how many it takes.
  constexpr std::int64_t kNew = std::int64_t{1} << 62;
  Tail tail = tail_;
  std::int64_t next = kNew;
  std::vector<Parameter> added;
  for (std::size_t i = 0; i < numels.size(); ++i) {
    added.push_back({bits[i], 0, cut(numels[i], bits[i], pager_->page_bytes(), next, tail)});
    if (tail.page >= kNew) next = tail.page + 1;
  }
  const std::vector<PageId> pages = pager_->add(next - kNew);
  const auto known = [&](std::int64_t page) {
    return page >= kNew ? pages[static_cast<std::size_t>(page - kNew)] : page;
  };
  tail_ = {known(tail.page), tail.used};
  std::vector<ParameterId> ids;
  for (Parameter& parameter : added) {
    for (Segment& segment : parameter.segments) {
      segment.page = known(segment.page);
      const auto page = static_cast<std::size_t>(segment.page);
      if (page_users_.size() <= page) page_users_.resize(page + 1);
      ++page_users_[page];
    }
    if (unused_.empty()) {
      unused_.push_back(std::ssize(parameters_));
      parameters_.emplace_back();
    }
    ids.push_back(unused_.back());
    unused_.pop_back();
    parameters_[static_cast<std::size_t>(ids.back())] = std::move(parameter);
  }
  return ids;
}

// The room of a removed parameter is free again when all that shares its pages is removed.
void AdamwStates::remove(ParameterId id) {
  Parameter& parameter = parameters_[static_cast<std::size_t>(id)];
  for (const Segment& segment : parameter.segments) {
    if (--page_users_[static_cast<std::size_t>(segment.page)] > 0) continue;
    pager_->remove(segment.page);
    if (tail_.page == segment.page) tail_ = {};
  }
  parameter = {};
  unused_.push_back(id);
}

template <typename T>
AdamwStates::Plan AdamwStates::plan(std::span<const T> what) const {
  Plan plan;
  std::vector<std::size_t> positions(page_users_.size(), SIZE_MAX);  // in the plan, by PageId
  for (std::size_t index = 0; index < what.size(); ++index) {
    for (const Segment& segment : parameters_[static_cast<std::size_t>(what[index].id)].segments) {
      std::size_t& position = positions[static_cast<std::size_t>(segment.page)];
      if (position == SIZE_MAX) {
        position = plan.pages.size();
        plan.pages.push_back(segment.page);
        plan.items.emplace_back();
      }
      plan.items[position].push_back({&segment, index});
    }
  }
  return plan;
}

void AdamwStates::prepare(std::span<const ParameterId> ids) {
  struct Wanted {
    ParameterId id;
  };
  std::vector<Wanted> wanted;
  for (const ParameterId id : ids) wanted.push_back({id});
  pager_->prepare(plan(std::span<const Wanted>(wanted)).pages);
}

void AdamwStates::step(std::span<Update> updates, const std::function<void(const AdamwRun&)>& compute) {
  for (Update& update : updates) update.hyper.step = steps(update.id) + 1;
  const Plan plan = this->plan(std::span<const Update>(updates));
  struct Slices {
    std::vector<AdamwSlice> slices;
    std::vector<std::size_t> of;
  };
  const auto add = [&](Slices& to, std::size_t position, std::byte* page) {
    for (const auto& [segment, index] : plan.items[position]) {
      const Update& update = updates[index];
      const auto part = [&, at = segment->at](Part which) -> std::byte* {
        const std::int64_t offset = at[static_cast<int>(which)];
        return offset < 0 ? nullptr : page + offset;
      };
      const auto element = [first = segment->first](auto* base, DType dtype) {
        return base == nullptr ? nullptr : base + first * itemsize(dtype);
      };
      to.of.push_back(index);
      to.slices.push_back({
          .param = element(static_cast<std::byte*>(update.param), update.param_dtype),
          .grad = element(static_cast<const std::byte*>(update.grad), update.grad_dtype),
          .param_dtype = update.param_dtype,
          .grad_dtype = update.grad_dtype,
          .count = segment->count,
          .first = segment->first,
          .index = update.index,
          .exp_avg = part(Part::ExpAvg),
          .exp_avg_sq = part(Part::ExpAvgSq),
          .exp_avg_absmax = reinterpret_cast<float*>(part(Part::ExpAvgAbsmax)),
          .exp_avg_sq_absmax = reinterpret_cast<float*>(part(Part::ExpAvgSqAbsmax)),
          .hyper = &update.hyper,
      });
    }
  };
  const auto pass = [&](const AdamwRun::Compute& compute_page) {
    return pager_->pass([&](std::size_t position, std::byte* page) {
      Slices of_page;
      add(of_page, position, page);
      compute_page(of_page.slices, of_page.of);
    });
  };
  pager_->walk(plan.pages, true, [&](std::size_t position, std::span<std::byte* const> pages) {
    Slices here;
    for (std::size_t i = 0; i < pages.size(); ++i) {
      if (pages[i] != nullptr) add(here, position + i, pages[i]);
    }
    const auto in_order = [&](const AdamwRun::Compute& compute_pages) {
      for (std::size_t i = 0; i < pages.size();) {
        Slices next;
        for (; i < pages.size() && pages[i] != nullptr; ++i) add(next, position + i, pages[i]);
        if (!next.slices.empty()) compute_pages(next.slices, next.of);
        if (i < pages.size() && pass(compute_pages)) ++i;
      }
    };
    compute({here.slices, here.of, std::ranges::count(pages, nullptr), pager_->most_passing(), pass, in_order});
  });
  for (const Update& update : updates) set_steps(update.id, update.hyper.step);
}

void AdamwStates::save(std::span<const PartPlace> places, int file) { transfer(places, file, false); }

void AdamwStates::load(std::span<const PartPlace> places, int file) { transfer(places, file, true); }

void AdamwStates::transfer(std::span<const PartPlace> places, int file, bool load) {
  const Plan plan = this->plan(places);
  Backend& backend = pager_->backend();
  std::vector<std::byte> buffer;
  const auto transfer_page = [&](std::size_t position, std::byte* page) {
    for (const auto& [segment, index] : plan.items[position]) {
      const PartPlace& place = places[index];
      const std::int64_t item = part_itemsize(place.part, parameters_[static_cast<std::size_t>(place.id)].bits);
      const std::int64_t block = part_block(place.part);
      const std::int64_t bytes = ceil_div(segment->count, block) * item;
      const std::int64_t offset = segment->first / block * item;
      std::byte* const states = page + segment->at[static_cast<int>(place.part)];
      const bool in_file = place.memory == nullptr;
      if (in_file && backend.compute_tier() == Tier::Host) {
        transfer_file(file, states, bytes, place.offset + offset, load);
        continue;
      }
      if (in_file) buffer.resize(static_cast<std::size_t>(bytes));
      std::byte* const memory = in_file ? buffer.data() : place.memory + offset;
      if (load) {
        if (in_file) transfer_file(file, memory, bytes, place.offset + offset, load);
        backend.write(memory, states, bytes);
      } else {
        backend.read(states, memory, bytes);
        if (in_file) transfer_file(file, memory, bytes, place.offset + offset, load);
      }
    }
  };
  pager_->walk(plan.pages, load, [&](std::size_t position, std::span<std::byte* const> pages) {
    for (std::byte* const page : pages) {
      if (page != nullptr) {
        transfer_page(position, page);
      } else {
        pager_->pass(transfer_page);
      }
      ++position;
    }
  });
}

}  // namespace qlora::pager
