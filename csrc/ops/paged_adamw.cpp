// The paged optimizer as Python sees it: _C.PagedStates.
#include "paged_adamw.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/Device.h>
#include <c10/core/InferenceMode.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "../pager/adamw_states.h"
#include "../pager/pager.h"
#include "check.h"

namespace py = pybind11;

namespace qlora {
namespace {

using at::Tensor;

constexpr const char* kOp = "PagedAdamW";

MakePagedAdamwDevice make_paged_adamw_cuda = nullptr;  // unless the extension is built for CUDA

// The tiers of a device, from the one that it computes in down. Budgets in bytes; null: no limit.
std::vector<pager::TierRoom> make_tiers(const pager::Backend& backend, std::optional<int64_t> device_budget,
                                        std::optional<int64_t> host_budget, bool with_file) {
  using pager::Tier;
  const auto pages = [&](std::optional<int64_t> budget) {
    return budget ? *budget / backend.page_bytes() : pager::kUnlimited;
  };
  std::vector<pager::TierRoom> tiers;
  if (backend.compute_tier() == Tier::Host) {
    tiers.push_back({Tier::Host, pages(host_budget), backend.ring_pages(pages(host_budget))});
  } else {
    tiers.push_back({Tier::Device, pages(device_budget), backend.ring_pages(pages(device_budget))});
    tiers.push_back({Tier::Host, pages(host_budget), with_file ? backend.staging_pages() : 0});
  }
  if (with_file) tiers.push_back({Tier::File, pager::kUnlimited, 0});
  return tiers;
}

// Whether its elements lie in memory as they are and in order.
bool is_flat(const Tensor& tensor) { return tensor.is_contiguous() && !tensor.is_neg() && !tensor._is_zerotensor(); }

// Whether a slice or an update is of tensors that are.
bool is_flat(const auto& of) { return of.param != nullptr && of.grad != nullptr; }

// Whether some of them may be the same memory, as a weight and its transpose are: then their order counts.
bool share_memory(const std::vector<Tensor>& tensors) {
  std::vector<std::pair<const std::byte*, const std::byte*>> spans;
  for (const Tensor& tensor : tensors) {
    if (tensor.numel() == 0) continue;
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    const auto* first = static_cast<const std::byte*>(tensor.const_data_ptr());
    spans.emplace_back(first, first + (last + 1) * static_cast<int64_t>(tensor.itemsize()));
  }
  std::ranges::sort(spans);
  const auto meet = [](const auto& before, const auto& after) { return after.first < before.second; };
  return std::ranges::adjacent_find(spans, meet) != spans.end();
}

// Calls visit with views of a tensor that together are its elements [begin, end), in the order of its shape.
void for_each_view(const Tensor& tensor, int64_t begin, int64_t end, const std::function<void(const Tensor&)>& visit) {
  if (begin >= end) return;
  if (begin == 0 && end == tensor.numel()) return visit(tensor);
  const int64_t row = tensor.numel() / tensor.size(0);
  const int64_t first = ceil_div(begin, row), last = end / row;  // whole rows [first, last)
  if (first > last) return for_each_view(tensor.select(0, last), begin - last * row, end - last * row, visit);
  if (begin < first * row) for_each_view(tensor.select(0, first - 1), begin - (first - 1) * row, row, visit);
  if (first < last) visit(tensor.narrow(0, first, last - first));
  if (last * row < end) for_each_view(tensor.select(0, last), 0, end - last * row, visit);
}

// Elements [first, first + count) of a tensor that is not flat, for as long as a kernel uses them.
class Gathered {
 public:
  Gathered(const Tensor& tensor, int64_t first, int64_t count)
      : tensor_(tensor), first_(first), elements_(at::empty({count}, tensor.options())) {
    move([](const Tensor& view, const Tensor& elements) { elements.copy_(view); });
  }

  void put_back() const {
    move([](const Tensor& view, const Tensor& elements) { view.copy_(elements); });
  }

  void* data() const { return elements_.data_ptr(); }

 private:
  template <typename Copy>
  void move(const Copy& copy) const {
    const at::NoGradGuard no_grad;  // a mode of the thread, not of the caller
    int64_t at = 0;
    for_each_view(tensor_, first_, first_ + elements_.numel(), [&](const Tensor& view) {
      copy(view, elements_.narrow(0, at, view.numel()).view(view.sizes()));
      at += view.numel();
    });
  }

  Tensor tensor_;
  int64_t first_;
  Tensor elements_;
};

// lr, beta1, beta2, eps, weight_decay, maximize.
using Hyper = std::tuple<double, double, double, double, double, bool>;
// A part of a parameter's state, in a tensor or at an offset of a file.
using Place = std::tuple<int64_t, int, std::optional<Tensor>, int64_t>;

// The states of the parameters on one device.
class PagedStates {
 public:
  PagedStates(const std::string& device, int64_t page_bytes, std::optional<int64_t> device_budget,
              std::optional<int64_t> host_budget, const std::string& page_file) {
    const at::Device where(device);
    QLORA_CHECK(where.is_cpu() || (where.is_cuda() && make_paged_adamw_cuda != nullptr), kOp, "params",
                make_paged_adamw_cuda != nullptr ? "device cpu or cuda" : "device cpu (built without CUDA)", device);
    PagedAdamwDevice made =
        (where.is_cpu() ? make_paged_adamw_cpu : make_paged_adamw_cuda)(where, page_bytes, page_file);
    compute_ = std::move(made.compute);
    auto tiers = make_tiers(*made.backend, device_budget, host_budget, !page_file.empty());
    states_.emplace(std::make_unique<pager::Pager>(std::move(made.backend), std::move(tiers)));
  }

  std::vector<int64_t> add(const std::vector<int64_t>& numels, const std::vector<int>& bits) {
    try {
      return states_->add(numels, bits);
    } catch (const std::length_error& error) {
      throw std::invalid_argument(std::string(kOp) + ": budgets without page_file: " + error.what());
    }
  }

  // Pages are reserved and freed without the GIL, as this takes long for many.
  ~PagedStates() {
    const py::gil_scoped_release release;
    states_.reset();
  }

  void remove(int64_t id) { states_->remove(id); }
  int64_t steps(int64_t id) const { return states_->steps(id); }
  void set_steps(int64_t id, int64_t steps) { states_->set_steps(id, steps); }
  void prepare(const std::vector<int64_t>& ids) { states_->prepare(ids); }

  void step(const std::vector<int64_t>& ids, const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
            const std::vector<int64_t>& indices, const std::vector<Hyper>& hypers,
            const std::optional<Tensor>& grad_scale, bool stochastic_rounding, uint64_t seed) {
    std::vector<pager::Update> updates;
    for (size_t i = 0; i < ids.size(); ++i) {
      const auto& [lr, beta1, beta2, eps, weight_decay, maximize] = hypers.at(i);
      const Tensor &param = params.at(i), &grad = grads.at(i);
      check_device(kOp, "gradients", grad, param);
      updates.push_back({ids[i],
                         is_flat(param) ? param.data_ptr() : nullptr,
                         is_flat(grad) ? grad.const_data_ptr() : nullptr,
                         checked_dtype(kOp, "params", param.scalar_type()),
                         checked_dtype(kOp, "gradients", grad.scalar_type()),
                         static_cast<uint64_t>(indices.at(i)),
                         {lr, beta1, beta2, eps, weight_decay, 0, maximize}});
    }
    const AdamwOptions options{.grad_scale = grad_scale ? grad_scale->const_data_ptr<float>() : nullptr,
                               .stochastic_rounding = stochastic_rounding,
                               .seed = seed};
    using Slices = std::span<const AdamwSlice>;
    using Of = std::span<const size_t>;
    // What is not flat is computed on copies of its elements, slice by slice.
    const auto gathering = [&, inference = c10::InferenceMode::is_enabled()](Slices slices, Of of,
                                                                             const pager::AdamwRun::Compute& compute) {
      const c10::InferenceMode as_the_caller(inference);
      for (size_t i = 0; i < slices.size();) {
        size_t end = i;
        while (end < slices.size() && is_flat(slices[end])) ++end;
        if (end > i) {
          compute(slices.subspan(i, end - i), of.subspan(i, end - i));
          i = end;
          continue;
        }
        AdamwSlice slice = slices[i];
        std::optional<Gathered> param, grad;
        if (slice.param == nullptr) slice.param = param.emplace(params[of[i]], slice.first, slice.count).data();
        if (slice.grad == nullptr) slice.grad = grad.emplace(grads[of[i]], slice.first, slice.count).data();
        compute({&slice, 1}, of.subspan(i, 1));
        if (param) param->put_back();
        ++i;
      }
    };
    const auto one_by_one = [&](Slices slices, Of of) {
      const auto compute_one = [&](Slices one, Of) { compute_({.slices = one}, options); };
      for (size_t i = 0; i < slices.size(); ++i) gathering(slices.subspan(i, 1), of.subspan(i, 1), compute_one);
    };
    const bool in_order = share_memory(params);
    const bool all_flat = std::ranges::all_of(updates, [](const pager::Update& update) { return is_flat(update); });
    const py::gil_scoped_release release;
    states_->step(updates, [&](const pager::AdamwRun& run) {
      if (in_order) return run.in_order(one_by_one);
      if (all_flat) return compute_(run, options);
      // Slices that are here, but not flat, are taken as pages are that are not.
      std::vector<AdamwSlice> flat;
      std::vector<size_t> others;
      for (size_t i = 0; i < run.slices.size(); ++i) {
        is_flat(run.slices[i]) ? flat.push_back(run.slices[i]) : others.push_back(i);
      }
      std::atomic<size_t> next = 0;
      const auto pass = [&](const pager::AdamwRun::Compute& compute) {
        if (const size_t i = next++; i < others.size()) {
          gathering(run.slices.subspan(others[i], 1), run.of.subspan(others[i], 1), compute);
          return true;
        }
        return run.absent > 0 && run.pass([&](Slices slices, Of of) { gathering(slices, of, compute); });
      };
      compute_({.slices = flat,
                .absent = run.absent + std::ssize(others),
                .most_passing = run.most_passing + std::ssize(others),
                .pass = pass},
               options);
    });
  }

  void save(const std::vector<Place>& places, int file) { transfer(places, file, false); }
  void load(const std::vector<Place>& places, int file) { transfer(places, file, true); }

  py::dict stats() const {
    using pager::Tier;
    const pager::Stats stats = states_->stats();
    const auto by_tier = [](const int64_t* values) {
      py::dict named;
      named["device"] = values[static_cast<int>(Tier::Device)];
      named["host"] = values[static_cast<int>(Tier::Host)];
      named["file"] = values[static_cast<int>(Tier::File)];
      return named;
    };
    py::dict named;
    named["pages"] = by_tier(stats.pages);
    named["unwritten_pages"] = stats.pages[static_cast<int>(Tier::None)];
    named["ring_pages"] = stats.ring_pages;
    named["visits"] = stats.visits;
    named["hits"] = stats.hits;
    named["bytes_read"] = by_tier(stats.bytes_from);
    named["bytes_written"] = by_tier(stats.bytes_to);
    named["seconds_waited"] = stats.seconds_waited;
    return named;
  }

 private:
  void transfer(const std::vector<Place>& places, int file, bool load) {
    std::vector<pager::PartPlace> parts;
    for (const auto& [id, part, tensor, offset] : places) {
      parts.push_back(
          {id, static_cast<pager::Part>(part), tensor ? static_cast<std::byte*>(tensor->data_ptr()) : nullptr, offset});
    }
    const py::gil_scoped_release release;
    load ? states_->load(parts, file) : states_->save(parts, file);
  }

  decltype(PagedAdamwDevice::compute) compute_;
  std::optional<pager::AdamwStates> states_;
};

}  // namespace

void register_cuda_paged_adamw(MakePagedAdamwDevice make) { make_paged_adamw_cuda = make; }

void bind_paged_adamw(py::module_& m) {
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const std::system_error& e) {
      const std::string text = std::string(kOp) + ": " + e.what();
      const py::tuple arguments = py::make_tuple(e.code().value(), text);
      PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
  });
  py::class_<PagedStates>(m, "PagedStates", "AdamW's states for the parameters on one device, in pages.")
      .def(py::init<const std::string&, int64_t, std::optional<int64_t>, std::optional<int64_t>, const std::string&>())
      .def("add", &PagedStates::add, py::call_guard<py::gil_scoped_release>(),
           "Ids for new parameters, by numbers of elements and state widths (32 or 8).")
      .def("remove", &PagedStates::remove, py::call_guard<py::gil_scoped_release>())
      .def("steps", &PagedStates::steps, "Steps that the parameter has taken.")
      .def("set_steps", &PagedStates::set_steps)
      .def("prepare", &PagedStates::prepare, py::call_guard<py::gil_scoped_release>(),
           "Finds homes for the pages of these, and throws what can be known before a step.")
      .def("step", &PagedStates::step)
      .def("save", &PagedStates::save, "Copies (id, part, CPU tensor or None, offset in the file) out of the pages.")
      .def("load", &PagedStates::load, "Likewise into the pages.")
      .def("stats", &PagedStates::stats);
  m.attr("MIN_PAGE_BYTES") = pager::kMinPageBytes;
}

}  // namespace qlora
