// The noise ops on parts of tensors, under any mask, and of signs: add_noise_parts_ and
// add_noise_parts_out. pseuzo_kernels/parts.py defines them.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <vector>

#include "cpu_pieces.h"
#include "cpu_task.h"
#include "cpu_terms.h"
#include "noise.h"

namespace pseuzo {
namespace {

// Where the elements of a shard are in the whole tensor; see pseuzo_kernels/parts.py.
struct Part {
  int64_t offset = 0, width = 0, stride = 0;
};

std::vector<Part> parts_of(const char* op, at::IntArrayRef places, at::TensorList out) {
  std::vector<Part> parts(out.size());
  TORCH_CHECK(places.empty() || places.size() == 3 * out.size(), op,
              ": places must be three per tensor (", out.size(), "), got ", places.size());
  for (size_t t = 0; t < places.size() / 3; t++) {
    const Part part = {places[3 * t], places[3 * t + 1], places[3 * t + 2]};
    TORCH_CHECK(part.offset >= 0 && part.width >= 0 && part.stride >= 0 &&
                    (part.width == 0 || out[t].numel() % part.width == 0),
                op, ": an offset, a width and a stride must not be negative, and whole rows are ",
                "needed, got ", part.offset, ", ", part.width, " and ", part.stride, " for ",
                out[t].numel(), " elements");
    parts[t] = part;
  }
  return parts;
}

void add_noise_parts(const char* op, at::TensorList xs, at::TensorList out, bool in_place,
                     const at::Tensor& seeds, const at::Tensor& coefs, at::IntArrayRef streams,
                     at::ArrayRef<double> keeps, at::ArrayRef<double> scales, Noise noise,
                     bool stochastic, int64_t rounding_seed,
                     const std::optional<at::Tensor>& found_inf, at::IntArrayRef places,
                     at::ArrayRef<double> limits, const std::optional<at::Tensor>& mask_seed,
                     at::TensorList takes, bool sign) {
  const size_t n = out.size();
  TORCH_CHECK((xs.empty() || xs.size() == n) && streams.size() == n && keeps.size() == n &&
                  scales.size() == n && (limits.empty() || limits.size() == n) &&
                  (takes.empty() || takes.size() == n),
              op, ": xs, limits and takes (or none), streams, keeps and scales must be one per ",
              "tensor (", n, "), got ", xs.size(), ", ", limits.size(), ", ", takes.size(), ", ",
              streams.size(), ", ", keeps.size(), ", ", scales.size());
  const bool needs_x = !limits.empty() || !takes.empty() || sign;
  TORCH_CHECK(!needs_x || xs.size() == n, op, ": masks and signs need xs");
  TORCH_CHECK(limits.empty() || takes.empty(), op, ": one kind of mask can be given, got two");
  const Terms terms(op, seeds, coefs, seeds.numel(), noise);
  check_found_inf(op, found_inf);
  const Masks masks = limits.empty() ? Masks() : Masks(op, limits, mask_seed);
  const std::vector<Part> parts = parts_of(op, places, out);
  std::vector<Piece> pieces;
  for (size_t t = 0; t < n; t++) {
    const at::Tensor& y = out[t];
    if (in_place && scales[t] == 0) continue;
    check_dense(op, in_place ? "x" : "out", y);
    Task task = task_of(op, y, seeds.numel(), stochastic, rounding_seed, streams[t], keeps[t]);
    task.sign = sign;
    task.step = static_cast<float>(scales[t]);
    task.scale = terms.scale_for(0, sign ? 1 : scales[t]);
    task.noisy = scales[t] != 0;
    masks.set(task, t);
    const uint8_t* bytes = nullptr;
    if (!takes.empty()) {
      check_dense(op, "a mask", takes[t]);
      TORCH_CHECK(takes[t].scalar_type() == at::kBool && takes[t].numel() == y.numel(), op,
                  ": a mask must be bool, with the ", y.numel(), " elements of x, got ",
                  takes[t].scalar_type(), " ", takes[t].sizes());
      task.mask = Mask::kGiven;
      bytes = static_cast<const uint8_t*>(takes[t].const_data_ptr());
    }
    char* const dst = static_cast<char*>(y.mutable_data_ptr());
    const char* src = in_place ? dst : nullptr;
    if (!in_place && !xs.empty()) src = source_of(op, xs[t], y);
    const int64_t width = parts[t].width ? parts[t].width : y.numel();
    int64_t first = parts[t].offset;
    for (int64_t begin = 0; begin < y.numel(); begin += width, first += parts[t].stride) {
      task.takes = bytes ? bytes + begin : nullptr;
      task.takes_first = first;
      const int64_t at = begin * y.element_size();
      pieces.push_back({src ? src + at : nullptr, dst + at, width, first, {task}});
    }
  }
  add_noise_unless_skipped(pieces, terms, found_inf);
}

void add_noise_parts_cpu_(at::TensorList xs, const at::Tensor& seeds, const at::Tensor& coefs,
                          at::IntArrayRef streams, at::ArrayRef<double> keeps,
                          at::ArrayRef<double> scales, std::string_view noise, bool stochastic,
                          int64_t rounding_seed, const std::optional<at::Tensor>& found_inf,
                          at::IntArrayRef places, at::ArrayRef<double> limits,
                          const std::optional<at::Tensor>& mask_seed, at::TensorList takes,
                          bool sign) {
  const auto known = noise_of(noise);
  if (!known) {
    return in_plain_torch("pseuzo::add_noise_parts_", add_noise_parts_cpu_, xs, seeds, coefs,
                          streams, keeps, scales, noise, stochastic, rounding_seed, found_inf,
                          places, limits, mask_seed, takes, sign);
  }
  add_noise_parts("add_noise_parts_", xs, xs, true, seeds, coefs, streams, keeps, scales, *known,
                  stochastic, rounding_seed, found_inf, places, limits, mask_seed, takes, sign);
}

void add_noise_parts_out_cpu(at::TensorList xs, const at::Tensor& seeds, const at::Tensor& coefs,
                             at::IntArrayRef streams, at::ArrayRef<double> keeps,
                             at::ArrayRef<double> scales, std::string_view noise, bool stochastic,
                             int64_t rounding_seed, const std::optional<at::Tensor>& found_inf,
                             at::IntArrayRef places, at::ArrayRef<double> limits,
                             const std::optional<at::Tensor>& mask_seed, at::TensorList takes,
                             bool sign, at::TensorList out) {
  const auto known = noise_of(noise);
  if (!known) {
    return in_plain_torch("pseuzo::add_noise_parts_out", add_noise_parts_out_cpu, xs, seeds, coefs,
                          streams, keeps, scales, noise, stochastic, rounding_seed, found_inf,
                          places, limits, mask_seed, takes, sign, out);
  }
  add_noise_parts("add_noise_parts_out", xs, out, false, seeds, coefs, streams, keeps, scales,
                  *known, stochastic, rounding_seed, found_inf, places, limits, mask_seed, takes,
                  sign);
}

}  // namespace
}  // namespace pseuzo

TORCH_LIBRARY_IMPL(pseuzo, CPU, m) {
  m.impl("add_noise_parts_", &pseuzo::add_noise_parts_cpu_);
  m.impl("add_noise_parts_out", &pseuzo::add_noise_parts_out_cpu);
}
