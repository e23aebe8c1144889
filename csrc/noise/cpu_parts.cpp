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

void add_noise_parts(const char* op, at::TensorList xs, at::TensorList out, bool in_place,
                     const at::Tensor& seeds, const at::Tensor& coefs, at::IntArrayRef streams,
                     at::ArrayRef<double> keeps, at::ArrayRef<double> scales, Noise noise,
                     bool stochastic, int64_t rounding_seed,
                     const std::optional<at::Tensor>& found_inf, at::IntArrayRef places,
                     at::ArrayRef<double> limits, const std::optional<at::Tensor>& mask_seed,
                     at::TensorList takes, bool sign) {
  const size_t n = out.size();
  TORCH_CHECK((xs.empty() || xs.size() == n) && streams.size() == n && keeps.size() == n &&
                  scales.size() == n,
              op, ": xs (or none), streams, keeps and scales must be one per tensor (", n,
              "), got ", xs.size(), ", ", streams.size(), ", ", keeps.size(), ", ", scales.size());
  const Selection selection(op, places, limits, mask_seed, takes, out);
  TORCH_CHECK(xs.size() == n || !(selection.masked() || sign), op, ": masks and signs need xs");
  const Terms terms(op, seeds, coefs, seeds.numel(), noise);
  check_found_inf(op, found_inf);
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
    char* const dst = static_cast<char*>(y.mutable_data_ptr());
    const char* src = in_place ? dst : nullptr;
    if (!in_place && !xs.empty()) src = source_of(op, xs[t], y);
    selection.add(pieces, t, {task}, src, dst);
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
