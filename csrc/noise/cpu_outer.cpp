// The ops on the CPU that add products of thin factors: add_outer_out, add_outer_parts_out.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu_pieces.h"
#include "cpu_task.h"
#include "cpu_terms.h"
#include "noise.h"

namespace pseuzo {
namespace {

const char* const kOp = "add_outer_parts_out";

void check_factor(const char* name, const at::Tensor& factor) {
  check_dense(kOp, name, factor);
  TORCH_CHECK(factor.scalar_type() == at::kFloat && factor.dim() == 2, kOp, ": ", name,
              " must be float32 with two dimensions, got ", factor.scalar_type(), " ",
              factor.sizes());
}

void add_outer_parts_out_cpu(at::TensorList xs, at::TensorList lefts, at::TensorList rights,
                             const at::Tensor& coefs, at::IntArrayRef streams,
                             at::ArrayRef<double> keeps, at::ArrayRef<double> factors,
                             bool stochastic, int64_t rounding_seed,
                             const std::optional<at::Tensor>& found_inf, at::IntArrayRef places,
                             at::ArrayRef<double> limits,
                             const std::optional<at::Tensor>& mask_seed, at::TensorList takes,
                             at::TensorList out) {
  const size_t T = out.size();
  TORCH_CHECK(xs.size() == T && lefts.size() == T && rights.size() == T && streams.size() == T &&
                  keeps.size() == T && factors.size() == T,
              kOp, ": xs, lefts, rights, streams, keeps and factors must be one per tensor (", T,
              ")");
  check_dense(kOp, "coefs", coefs);
  TORCH_CHECK(coefs.scalar_type() == at::kFloat, kOp, ": coefs must be float32, got ",
              coefs.scalar_type());
  check_found_inf(kOp, found_inf);
  // Rounding to nearest does not depend on where an element is.
  const bool placed = stochastic || mask_seed;
  const Selection selection(kOp, placed ? places : at::IntArrayRef(), limits, mask_seed, takes,
                            out);
  const float* const c = coefs.const_data_ptr<float>();
  const bool finite =
      std::all_of(c, c + coefs.numel(), [](float coef) { return std::isfinite(coef); });
  std::vector<Outer> outers(T);
  std::vector<Piece> pieces;
  bool any = false;
  for (size_t t = 0; t < T; t++) {
    const at::Tensor &x = xs[t], &y = out[t];
    check_dense(kOp, "x", x);
    check_dense(kOp, "out", y);
    check_factor("left", lefts[t]);
    check_factor("right", rights[t]);
    outers[t] = {lefts[t].const_data_ptr<float>(), rights[t].const_data_ptr<float>(),
                 lefts[t].size(0), rights[t].size(1), rights[t].size(0)};
    TORCH_CHECK(x.numel() == y.numel() && x.scalar_type() == y.scalar_type() &&
                    lefts[t].size(1) == outers[t].R && outers[t].m * outers[t].n == y.numel(),
                kOp, ": left [m, R], right [R, n], and x and out of m * n elements and one dtype ",
                "are needed, got ", lefts[t].sizes(), ", ", rights[t].sizes(), ", ", x.sizes(), " ",
                x.scalar_type(), " and ", y.sizes(), " ", y.scalar_type());
    any = any || y.numel() != 0;
  }
  if (!any) return;
  const bool skipped = skips(!finite, found_inf);
  for (size_t t = 0; t < T; t++) {
    const at::Tensor& y = out[t];
    const char* const src = static_cast<const char*>(xs[t].const_data_ptr());
    char* const dst = static_cast<char*>(y.mutable_data_ptr());
    if (!skipped && factors[t] != 0) {
      Task task = task_of(kOp, y, 0, stochastic, rounding_seed, streams[t], keeps[t]);
      task.scale = static_cast<float>(factors[t]);
      task.outer = &outers[t];
      selection.add(pieces, t, {task}, src, dst);
    } else if (src != dst) {
      std::memcpy(dst, src, y.numel() * y.element_size());
    }
  }
  // There are no seeds: the tasks have no terms.
  const Terms none(kOp, at::empty({0}, at::kLong), at::empty({0}, at::kFloat), 0, Noise::kNormal);
  add_noise_pieces(pieces, none);
}

void add_outer_out_cpu(at::TensorList xs, at::TensorList lefts, at::TensorList rights,
                       const at::Tensor& coefs, at::IntArrayRef streams, at::ArrayRef<double> keeps,
                       at::ArrayRef<double> factors, bool stochastic, int64_t rounding_seed,
                       const std::optional<at::Tensor>& found_inf, at::TensorList out) {
  add_outer_parts_out_cpu(xs, lefts, rights, coefs, streams, keeps, factors, stochastic,
                          rounding_seed, found_inf, {}, {}, std::nullopt, {}, out);
}

}  // namespace
}  // namespace pseuzo

TORCH_LIBRARY_IMPL(pseuzo, CPU, m) {
  m.impl("add_outer_out", &pseuzo::add_outer_out_cpu);
  m.impl("add_outer_parts_out", &pseuzo::add_outer_parts_out_cpu);
}
