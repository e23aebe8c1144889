// The noise ops on the CPU: add_noise_list_ and add_noise_list_out, with and without masks,
// add_noise_steps_, adam_list_, adam_parts_. Those of rows are in cpu_rows.cpp.
//
// This file checks arguments; cpu_pieces.cpp divides the work among threads; the arithmetic is in
// cpu_isa.cpp. cpu_parts.cpp has the ops on parts of tensors.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu_pieces.h"
#include "cpu_task.h"
#include "cpu_terms.h"
#include "isa.h"
#include "noise.h"

namespace pseuzo {
namespace {

// in_place: xs is out, and tensors with scale 0 are left alone. Else xs is empty, or like out.
void add_noise_list(const char* op, at::TensorList xs, at::TensorList out, bool in_place,
                    const at::Tensor& seeds, const at::Tensor& coefs, at::IntArrayRef streams,
                    at::ArrayRef<double> keeps, at::ArrayRef<double> scales, Noise noise,
                    bool stochastic, int64_t rounding_seed,
                    const std::optional<at::Tensor>& found_inf, const Masks& masks = {}) {
  TORCH_CHECK((xs.empty() || xs.size() == out.size()) && streams.size() == out.size() &&
                  keeps.size() == out.size() && scales.size() == out.size(),
              op, ": xs (or none), streams, keeps and scales must be one per tensor (", out.size(),
              "), got ", xs.size(), ", ", streams.size(), ", ", keeps.size(), ", ", scales.size());
  const bool masked = masks.kind != Mask::kNone;
  TORCH_CHECK(!masked || (xs.size() == out.size() && masks.limits.size() == out.size()), op,
              ": xs and limits must be one per tensor (", out.size(), "), got ", xs.size(), ", ",
              masks.limits.size());
  const Terms terms(op, seeds, coefs, seeds.numel(), noise);
  check_found_inf(op, found_inf);
  std::vector<Piece> pieces;
  for (size_t t = 0; t < out.size(); t++) {
    const at::Tensor& y = out[t];
    if (in_place && scales[t] == 0) continue;
    check_dense(op, in_place ? "x" : "out", y);
    Task task = task_of(op, y, seeds.numel(), stochastic, rounding_seed, streams[t], keeps[t]);
    task.scale = terms.scale_for(0, scales[t]);
    task.noisy = scales[t] != 0;
    masks.set(task, t);
    char* const dst = static_cast<char*>(y.mutable_data_ptr());
    const char* src = in_place ? dst : nullptr;
    if (!in_place && !xs.empty()) src = source_of(op, xs[t], y);
    pieces.push_back({src, dst, y.numel(), 0, {task}});
  }
  add_noise_unless_skipped(pieces, terms, found_inf);
}

void add_noise_list_cpu_(at::TensorList xs, const at::Tensor& seeds, const at::Tensor& coefs,
                         at::IntArrayRef streams, at::ArrayRef<double> keeps,
                         at::ArrayRef<double> scales, std::string_view noise, bool stochastic,
                         int64_t rounding_seed, const std::optional<at::Tensor>& found_inf) {
  const auto known = noise_of(noise);
  if (!known) {
    return in_plain_torch("pseuzo::add_noise_list_", add_noise_list_cpu_, xs, seeds, coefs, streams,
                          keeps, scales, noise, stochastic, rounding_seed, found_inf);
  }
  add_noise_list("add_noise_list_", xs, xs, true, seeds, coefs, streams, keeps, scales, *known,
                 stochastic, rounding_seed, found_inf);
}

void add_noise_list_out_cpu(at::TensorList xs, const at::Tensor& seeds, const at::Tensor& coefs,
                            at::IntArrayRef streams, at::ArrayRef<double> keeps,
                            at::ArrayRef<double> scales, std::string_view noise, bool stochastic,
                            int64_t rounding_seed, const std::optional<at::Tensor>& found_inf,
                            at::TensorList out) {
  const auto known = noise_of(noise);
  if (!known) {
    return in_plain_torch("pseuzo::add_noise_list_out", add_noise_list_out_cpu, xs, seeds, coefs,
                          streams, keeps, scales, noise, stochastic, rounding_seed, found_inf, out);
  }
  add_noise_list("add_noise_list_out", xs, out, false, seeds, coefs, streams, keeps, scales, *known,
                 stochastic, rounding_seed, found_inf);
}

void add_noise_masked_list_cpu_(at::TensorList xs, const at::Tensor& seeds, const at::Tensor& coefs,
                                at::IntArrayRef streams, at::ArrayRef<double> keeps,
                                at::ArrayRef<double> scales, std::string_view noise,
                                bool stochastic, int64_t rounding_seed,
                                const std::optional<at::Tensor>& found_inf,
                                at::ArrayRef<double> limits,
                                const std::optional<at::Tensor>& mask_seed) {
  const char* const op = "add_noise_masked_list_";
  const auto known = noise_of(noise);
  if (!known) {
    return in_plain_torch("pseuzo::add_noise_masked_list_", add_noise_masked_list_cpu_, xs, seeds,
                          coefs, streams, keeps, scales, noise, stochastic, rounding_seed,
                          found_inf, limits, mask_seed);
  }
  add_noise_list(op, xs, xs, true, seeds, coefs, streams, keeps, scales, *known, stochastic,
                 rounding_seed, found_inf, Masks(op, limits, mask_seed));
}

void add_noise_masked_list_out_cpu(at::TensorList xs, const at::Tensor& seeds,
                                   const at::Tensor& coefs, at::IntArrayRef streams,
                                   at::ArrayRef<double> keeps, at::ArrayRef<double> scales,
                                   std::string_view noise, bool stochastic, int64_t rounding_seed,
                                   const std::optional<at::Tensor>& found_inf,
                                   at::ArrayRef<double> limits,
                                   const std::optional<at::Tensor>& mask_seed, at::TensorList out) {
  const char* const op = "add_noise_masked_list_out";
  const auto known = noise_of(noise);
  if (!known) {
    return in_plain_torch("pseuzo::add_noise_masked_list_out", add_noise_masked_list_out_cpu, xs,
                          seeds, coefs, streams, keeps, scales, noise, stochastic, rounding_seed,
                          found_inf, limits, mask_seed, out);
  }
  add_noise_list(op, xs, out, false, seeds, coefs, streams, keeps, scales, *known, stochastic,
                 rounding_seed, found_inf, Masks(op, limits, mask_seed));
}

void add_noise_steps_cpu_(at::TensorList xs, const at::Tensor& seeds, const at::Tensor& coefs,
                          at::IntArrayRef counts, at::IntArrayRef streams,
                          at::ArrayRef<double> keeps, at::ArrayRef<double> scales,
                          std::string_view noise, bool stochastic, at::IntArrayRef rounding_seeds) {
  const char* const op = "add_noise_steps_";
  const auto known = noise_of(noise);
  if (!known) {
    return in_plain_torch("pseuzo::add_noise_steps_", add_noise_steps_cpu_, xs, seeds, coefs,
                          counts, streams, keeps, scales, noise, stochastic, rounding_seeds);
  }
  const size_t steps = counts.size();
  TORCH_CHECK(streams.size() == xs.size() && rounding_seeds.size() == steps &&
                  keeps.size() == steps * xs.size() && scales.size() == keeps.size(),
              op, ": streams must be one per tensor (", xs.size(),
              "), rounding_seeds one per step (", steps,
              "), keeps and scales one per step and tensor, got ", streams.size(), ", ",
              rounding_seeds.size(), ", ", keeps.size(), ", ", scales.size());
  int64_t total = 0;
  for (const int64_t count : counts) {
    TORCH_CHECK(count >= 0, op, ": counts must not be negative, got ", count);
    total += count;
  }
  TORCH_CHECK(total == seeds.numel(), op, ": counts must add up to the number of seeds, ",
              seeds.numel(), ", got ", total);
  const Terms terms(op, seeds, coefs, counts, *known);
  std::vector<Piece> pieces;
  for (size_t t = 0; t < xs.size(); t++) {
    check_dense(op, "x", xs[t]);
    Task task = {};
    task.dtype = dtype_of(op, xs[t]);
    task.stochastic = stochastic;
    task.stream = static_cast<uint32_t>(streams[t]);
    char* const x = static_cast<char*>(xs[t].mutable_data_ptr());
    pieces.push_back({x, x, xs[t].numel(), 0, {}});
    for (size_t s = 0; s < steps; s++, task.first_term += task.K) {
      const size_t i = s * xs.size() + t;
      task.K = counts[s];
      if (scales[i] == 0 || terms.skips(s)) continue;
      task.rounding_hash = splitmix64(static_cast<uint64_t>(rounding_seeds[s]));
      task.keep = static_cast<float>(keeps[i]);
      task.scale = terms.scale_for(s, scales[i]);
      task.noisy = true;
      pieces.back().tasks.push_back(task);
    }
  }
  add_noise_pieces(pieces, terms);
}

void adam_list(const char* op, at::TensorList xs, const at::Tensor& seeds, const at::Tensor& coefs,
               int64_t directions, at::IntArrayRef streams, at::ArrayRef<double> keeps,
               at::ArrayRef<double> scales, at::ArrayRef<double> numbers, Noise noise,
               bool stochastic, int64_t rounding_seed, const std::optional<at::Tensor>& found_inf,
               const Selection& selection) {
  TORCH_CHECK(streams.size() == xs.size() && keeps.size() == xs.size() &&
                  scales.size() == xs.size() && numbers.size() == 5,
              op, ": streams, keeps and scales must be one per tensor (", xs.size(),
              ") and numbers five, got ", streams.size(), ", ", keeps.size(), ", ", scales.size(),
              " and ", numbers.size());
  const int64_t K = seeds.numel();
  TORCH_CHECK_VALUE(directions >= 1 && K >= 1 && K % directions == 0, op,
                    ": the seeds of one or several steps, ", directions,
                    " a step, are needed, got ", K);
  const std::vector<int64_t> counts(K / directions, directions);
  const Terms terms(op, seeds, coefs, counts,
                    noise == Noise::kHadamardFp16 ? Noise::kHadamard : noise);
  check_found_inf(op, found_inf);
  std::vector<Piece> pieces;
  bool by_coefs = false;
  for (size_t t = 0; t < xs.size(); t++) {
    if (scales[t] == 0) continue;
    check_dense(op, "x", xs[t]);
    if (xs[t].numel() == 0) continue;
    Task task = task_of(op, xs[t], directions, stochastic, rounding_seed, streams[t], keeps[t]);
    task.noisy = true;
    std::vector<Task> steps;
    for (size_t s = 0; s < counts.size(); s++, task.first_term += directions) {
      by_coefs = by_coefs || terms.skips(s);
      task.scale = terms.scale_for(s, scales[t]);
      steps.push_back(task);
    }
    char* const x = static_cast<char*>(xs[t].mutable_data_ptr());
    selection.add(pieces, t, std::move(steps), x, x);
  }
  if (pieces.empty() || skips(by_coefs, found_inf)) return;
  float n[5];
  std::copy(numbers.begin(), numbers.end(), n);
  const Adam adam = {n[0], n[1], n[2], n[3], n[4], nullptr, 0};
  add_noise_pieces(pieces, terms, &adam);
}

void adam_list_cpu_(at::TensorList xs, const at::Tensor& seeds, const at::Tensor& coefs,
                    int64_t directions, at::IntArrayRef streams, at::ArrayRef<double> keeps,
                    at::ArrayRef<double> scales, at::ArrayRef<double> numbers,
                    std::string_view noise, bool stochastic, int64_t rounding_seed,
                    const std::optional<at::Tensor>& found_inf) {
  const char* const op = "adam_list_";
  const auto known = noise_of(noise);
  if (!known) {
    return in_plain_torch("pseuzo::adam_list_", adam_list_cpu_, xs, seeds, coefs, directions,
                          streams, keeps, scales, numbers, noise, stochastic, rounding_seed,
                          found_inf);
  }
  adam_list(op, xs, seeds, coefs, directions, streams, keeps, scales, numbers, *known, stochastic,
            rounding_seed, found_inf, Selection(op, {}, {}, std::nullopt, {}, xs));
}

void adam_parts_cpu_(at::TensorList xs, const at::Tensor& seeds, const at::Tensor& coefs,
                     int64_t directions, at::IntArrayRef streams, at::ArrayRef<double> keeps,
                     at::ArrayRef<double> scales, at::ArrayRef<double> numbers,
                     std::string_view noise, bool stochastic, int64_t rounding_seed,
                     const std::optional<at::Tensor>& found_inf, at::IntArrayRef places,
                     at::ArrayRef<double> limits, const std::optional<at::Tensor>& mask_seed,
                     at::TensorList takes) {
  const char* const op = "adam_parts_";
  const auto known = noise_of(noise);
  if (!known) {
    return in_plain_torch("pseuzo::adam_parts_", adam_parts_cpu_, xs, seeds, coefs, directions,
                          streams, keeps, scales, numbers, noise, stochastic, rounding_seed,
                          found_inf, places, limits, mask_seed, takes);
  }
  adam_list(op, xs, seeds, coefs, directions, streams, keeps, scales, numbers, *known, stochastic,
            rounding_seed, found_inf, Selection(op, places, limits, mask_seed, takes, xs));
}

}  // namespace

std::vector<std::string> cpu_noises() {
  std::vector<std::string> names;
  for (const NamedNoise& noise : kNoises) names.push_back(noise.name);
  return names;
}

}  // namespace pseuzo

TORCH_LIBRARY_IMPL(pseuzo, CPU, m) {
  m.impl("add_noise_list_", &pseuzo::add_noise_list_cpu_);
  m.impl("add_noise_list_out", &pseuzo::add_noise_list_out_cpu);
  m.impl("add_noise_steps_", &pseuzo::add_noise_steps_cpu_);
  m.impl("adam_list_", &pseuzo::adam_list_cpu_);
  m.impl("adam_parts_", &pseuzo::adam_parts_cpu_);
  m.impl("add_noise_masked_list_", &pseuzo::add_noise_masked_list_cpu_);
  m.impl("add_noise_masked_list_out", &pseuzo::add_noise_masked_list_out_cpu);
}
