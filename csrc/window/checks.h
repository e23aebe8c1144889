// The implementations of window_step check only what would corrupt memory. The checks in
// pseuzo_kernels/window.py explain what is wrong.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace pseuzo {

inline void check_window_tensor(const char* name, const at::Tensor& x, const at::Tensor& values) {
  TORCH_CHECK(x.device() == values.device(), "window_step: ", name, " must be on ", values.device(),
              ", got ", x.device());
  TORCH_CHECK(x.is_contiguous(), "window_step: ", name, " must be contiguous, got strides ",
              x.strides(), "; call .contiguous()");
}

inline void check_window_output(const char* name, const at::Tensor& x, const at::Tensor& values) {
  check_window_tensor(name, x, values);
  const auto dtype = x.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
              "window_step: ", name, " must be float32, bfloat16 or float16, got ", dtype);
}

inline void check_window_state(const char* name, const at::Tensor& x, const at::Tensor& values,
                               at::ScalarType dtype, at::IntArrayRef sizes) {
  check_window_tensor(name, x, values);
  TORCH_CHECK(x.scalar_type() == dtype, "window_step: ", name, " must be ", dtype, ", got ",
              x.scalar_type());
  TORCH_CHECK(x.sizes() == sizes, "window_step: ", name, " must have shape ", sizes, ", got ",
              x.sizes());
}

inline void check_window_step(const at::Tensor& values, const at::Tensor& seeds,
                              const at::Tensor& groups, const at::Tensor& counts,
                              const at::Tensor& skipped, const std::optional<at::Tensor>& o0,
                              const at::Tensor& o1, const at::Tensor& grad,
                              const std::optional<at::Tensor>& group,
                              const std::optional<at::Tensor>& loss, int64_t slot, int64_t used) {
  TORCH_CHECK(values.dim() == 4, "window_step: values must be [K, R, P, D], got shape ",
              values.sizes());
  const int64_t capacity = values.size(0), rows_max = values.size(1);
  check_window_state("values", values, values, at::kFloat, values.sizes());
  check_window_state("seeds", seeds, values, at::kLong, {capacity});
  check_window_state("groups", groups, values, at::kLong, {capacity, rows_max});
  check_window_state("counts", counts, values, at::kInt, {capacity, rows_max});
  check_window_state("skipped", skipped, values, at::kLong, {});
  check_window_output("o1", o1, values);
  TORCH_CHECK(o1.dim() == 3 && o1.size(0) <= rows_max && o1.size(1) <= values.size(2) &&
                  o1.size(2) == values.size(3),
              "window_step: o1 must be [B, P, D] and fit an entry of shape ",
              values.sizes().slice(1), ", got shape ", o1.sizes());
  check_window_output("grad", grad, values);
  TORCH_CHECK(grad.sizes() == o1.sizes(), "window_step: grad must have shape ", o1.sizes(),
              ", got ", grad.sizes());
  if (o0) {
    check_window_output("o0", *o0, values);
    TORCH_CHECK(o0->sizes() == o1.sizes(), "window_step: o0 must have shape ", o1.sizes(), ", got ",
                o0->sizes());
  }
  if (group) check_window_state("group", *group, values, at::kLong, {o1.size(0)});
  if (loss) {
    check_window_state("loss", *loss, values, at::kFloat, loss->sizes());
    TORCH_CHECK(loss->numel() == 1, "window_step: loss must be a scalar, got shape ",
                loss->sizes());
  }
  TORCH_CHECK(0 <= slot && slot < capacity && 1 <= used && used <= capacity, "window_step: slot ",
              slot, " and used ", used, " do not fit a capacity of ", capacity);
}

}  // namespace pseuzo
