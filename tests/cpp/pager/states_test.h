// Random lives of AdamwStates on a machine, against the same in plain memory.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "../check.h"
#include "pager/adamw_states.h"

namespace qlora::pager {

// Something with states that depends on every element before; it is exact.
inline void update(std::span<const AdamwSlice> slices) {
  for (const AdamwSlice& slice : slices) {
    auto* param = static_cast<float*>(slice.param);
    const auto* grad = static_cast<const float*>(slice.grad);
    auto* exp_avg = static_cast<float*>(slice.exp_avg);
    auto* exp_avg_sq = static_cast<float*>(slice.exp_avg_sq);
    for (std::int64_t i = 0; i < slice.count; ++i) {
      exp_avg[i] += grad[i];
      exp_avg_sq[i] = exp_avg_sq[i] * 0.5f + static_cast<float>((slice.first + i) % 97);
      param[i] -= exp_avg[i] + exp_avg_sq[i] * static_cast<float>(slice.hyper->step);
    }
  }
}

struct Reference {
  ParameterId id;
  std::vector<float> param, grad, expected, exp_avg, exp_avg_sq;
  std::int64_t steps = 0;
};

using MakeStates = std::function<std::unique_ptr<AdamwStates>()>;

// `compute` runs update() on the machine for a run, `finish` waits for it.
inline void live(unsigned seed, AdamwStates& states, const std::function<void(const AdamwRun&)>& compute,
                 const std::function<void()>& finish) {
  std::mt19937 random(seed);
  std::vector<std::unique_ptr<Reference>> all;
  const auto some = [&] {
    std::vector<Reference*> chosen;
    for (auto& one : all) {
      if (random() % 4 != 0) chosen.push_back(one.get());
    }
    if (random() % 4 == 0) std::shuffle(chosen.begin(), chosen.end(), random);
    return chosen;
  };
  const auto parts = [&](Reference& one) {
    return std::vector<PartPlace>{{one.id, Part::ExpAvg, reinterpret_cast<std::byte*>(one.exp_avg.data()), 0},
                                  {one.id, Part::ExpAvgSq, reinterpret_cast<std::byte*>(one.exp_avg_sq.data()), 0}};
  };
  for (int round = 0; round < 40; ++round) {
    for (auto more = random() % 4; more > 0 && all.size() < 25; --more) {
      const std::int64_t numel = 1 + static_cast<std::int64_t>(random() % (random() % 3 == 0 ? 9000 : 300));
      auto one = std::make_unique<Reference>();
      const auto size = static_cast<std::size_t>(numel);
      one->param.assign(size, 1.0f);
      one->expected = one->param;
      one->grad.resize(size);
      one->exp_avg.assign(size, 0.0f);
      one->exp_avg_sq.assign(size, 0.0f);
      one->id = states.add(std::vector<std::int64_t>{numel}, std::vector<int>{32})[0];
      all.push_back(std::move(one));
    }
    if (random() % 3 == 0 && all.size() > 5) {
      const auto at = all.begin() + static_cast<std::ptrdiff_t>(random() % all.size());
      states.remove((*at)->id);
      all.erase(at);
    }
    const auto chosen = some();
    std::vector<Update> updates;
    for (Reference* one : chosen) {
      for (float& g : one->grad) g = static_cast<float>(random() % 7);
      ++one->steps;
      const AdamwHyper hyper{
          .lr = 0, .beta1 = 0, .beta2 = 0, .eps = 0, .weight_decay = 0, .step = one->steps, .maximize = false};
      update(std::vector<AdamwSlice>{{one->expected.data(), one->grad.data(), DType::Float32, DType::Float32,
                                      std::ssize(one->grad), 0, 0, one->exp_avg.data(), one->exp_avg_sq.data(), nullptr,
                                      nullptr, &hyper}});
      updates.push_back({one->id, one->param.data(), one->grad.data(), DType::Float32, DType::Float32, 0, hyper});
    }
    const auto in_order = [&](std::span<const AdamwSlice> slices, std::span<const std::size_t> of) {
      CHECK_EQ(slices.size(), of.size());
      for (std::size_t i = 0; i < of.size(); ++i) CHECK(slices[i].hyper == &updates[of[i]].hyper);
      compute({.slices = slices});
    };
    const bool ordered = random() % 2 == 0;
    states.step(updates, [&](const AdamwRun& run) {
      if (ordered) {
        run.in_order(in_order);
      } else {
        compute(run);
      }
    });
    finish();
    for (Reference* one : chosen) {
      CHECK(one->param == one->expected);
      CHECK_EQ(states.steps(one->id), one->steps);
    }
    if (random() % 4 == 0) {  // what is read is what was computed
      for (Reference* one : some()) {
        const auto exp_avg = one->exp_avg, exp_avg_sq = one->exp_avg_sq;
        states.save(parts(*one), -1);
        CHECK(exp_avg == one->exp_avg && exp_avg_sq == one->exp_avg_sq);
      }
    }
    if (random() % 4 == 0) {  // and what is written is what is computed with
      std::vector<PartPlace> places;
      for (Reference* one : some()) {
        for (float& m : one->exp_avg) m = static_cast<float>(random() % 5);
        for (const PartPlace& part : parts(*one)) places.push_back(part);
      }
      states.load(places, -1);
    }
  }
  for (auto& one : all) states.remove(one->id);
  std::int64_t left = 0;
  for (const std::int64_t pages : states.stats().pages) left += pages;
  CHECK_EQ(left, 0);
}

}  // namespace qlora::pager
