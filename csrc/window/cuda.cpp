// window_step on a GPU: checks, outputs, scratch, and the launch of window.cu. Nothing here waits
// for the device.

#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "window.h"

namespace pseuzo {
namespace {

WindowDtype window_dtype(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return WindowDtype::kFloat;
    case at::kBFloat16: return WindowDtype::kBFloat16;
    default: return WindowDtype::kHalf;
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> window_step_cuda(
    const at::Tensor& values, const at::Tensor& seeds, const at::Tensor& groups,
    const at::Tensor& counts, const at::Tensor& skipped, const std::optional<at::Tensor>& o0,
    const at::Tensor& o1, const at::Tensor& grad, const std::optional<at::Tensor>& group,
    const std::optional<at::Tensor>& loss, int64_t seed, int64_t slot, int64_t used,
    double momentum, double eps) {
  check_window_step(values, seeds, groups, counts, skipped, o0, o1, grad, group, loss, slot, used);
  const c10::cuda::CUDAGuard guard(values.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();

  // The kernel takes one type for both outputs. A model's two forwards have one, so this hardly
  // ever copies.
  const bool mixed = o0 && o0->scalar_type() != o1.scalar_type();
  const at::Tensor perturbed = mixed ? o1.to(at::kFloat) : o1;
  const at::Tensor clean = mixed ? o0->to(at::kFloat) : o0.value_or(at::Tensor());

  at::Tensor seeds_out = at::empty({used}, seeds.options());
  at::Tensor coefs = at::empty({used}, values.options());
  at::Tensor found_inf = at::empty({1}, values.options());

  WindowStep step{};
  step.values = values.mutable_data_ptr<float>();
  step.seeds = seeds.mutable_data_ptr<int64_t>();
  step.groups = groups.mutable_data_ptr<int64_t>();
  step.counts = counts.mutable_data_ptr<int32_t>();
  step.skipped = skipped.mutable_data_ptr<int64_t>();
  step.o0 = clean.defined() ? clean.const_data_ptr() : nullptr;
  step.o1 = perturbed.const_data_ptr();
  step.grad = grad.const_data_ptr();
  step.group = group ? group->const_data_ptr<int64_t>() : nullptr;
  step.loss = loss ? loss->const_data_ptr<float>() : nullptr;
  step.seeds_out = seeds_out.mutable_data_ptr<int64_t>();
  step.coefs = coefs.mutable_data_ptr<float>();
  step.found_inf = found_inf.mutable_data_ptr<float>();
  step.capacity = values.size(0);
  step.rows_max = values.size(1);
  step.positions_max = values.size(2);
  step.width = values.size(3);
  step.rows = o1.size(0);
  step.positions = o1.size(1);
  step.seed = seed;
  step.slot = slot;
  step.used = used;
  step.momentum = momentum;
  step.eps = eps;
  step.o_dtype = window_dtype(perturbed);
  step.grad_dtype = window_dtype(grad);

  const int64_t length = window_step_scratch(step);
  at::Tensor scratch = at::empty({length}, values.options().dtype(at::kDouble));
  step.scratch = scratch.mutable_data_ptr<double>();
  // Scratch is allocated in stream order, so two streams, or a capture and the step after it,
  // cannot share a ticket.
  C10_CUDA_CHECK(cudaMemsetAsync(step.scratch + length - 1, 0, sizeof(double), stream));
  C10_CUDA_CHECK(launch_window_step(step, stream));
  return {seeds_out, coefs, found_inf};
}

}  // namespace

TORCH_LIBRARY_IMPL(pseuzo, CUDA, m) { m.impl("window_step", &window_step_cuda); }

}  // namespace pseuzo
