// The noise ops on the CPU that make some rows of a tensor: add_noise_rows, add_noise_masked_rows.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

#include "cpu_task.h"
#include "cpu_terms.h"
#include "noise.h"

namespace pseuzo {
namespace {

// Makes only the chunks that the rows touch. A row that is looked up twice is made twice.
at::Tensor add_noise_rows(const char* op, const at::Tensor& x, const at::Tensor& index,
                          const at::Tensor& seeds, const at::Tensor& coefs, int64_t stream,
                          double scale, Noise noise, const Masks& masks = {}) {
  TORCH_CHECK(x.dim() == 2, op, ": x must have two dimensions, got shape ", x.sizes());
  check_dense(op, "x", x);
  TORCH_CHECK(index.device().is_cpu() && index.scalar_type() == at::kLong, op,
              ": index must be int64 on the CPU, got ", index.scalar_type(), " on ",
              index.device());
  const Terms terms(op, seeds, coefs, seeds.numel(), noise);
  const int64_t n_rows = x.size(0), width = x.size(1);
  const at::Tensor rows = index.contiguous();
  check_dense(op, "index", rows);
  const int64_t* const row = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.numel(); i++)
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < n_rows, op, ": index must be in 0 .. ", n_rows - 1,
                      ", the rows of x, got ", row[i]);

  std::vector<Task> tasks(1);
  Task& task = tasks[0];
  task.K = seeds.numel();
  task.dtype = dtype_of(op, x);
  task.stream = static_cast<uint32_t>(stream);
  task.keep = 1;
  task.scale = terms.scale_for(0, scale);
  task.noisy = scale != 0 && !terms.skips(0);
  masks.set(task, 0);
  std::vector<Seed> room;
  terms.set(tasks, room);

  std::vector<int64_t> shape = index.sizes().vec();
  shape.push_back(width);
  const at::Tensor out = at::empty(shape, x.options());
  const int64_t n_bytes = width * x.element_size();
  const char* const src = static_cast<const char*>(x.const_data_ptr());
  char* const dst = static_cast<char*>(out.mutable_data_ptr());
  const Isa* const isa = chosen_isa();
  const int64_t chunks = width / kChunk + 1;
  at::parallel_for(0, rows.numel(), std::max<int64_t>(1, grain_of(terms) / chunks),
                   [&](int64_t begin, int64_t end) {
                     const FloatMode mode;
                     for (int64_t i = begin; i < end; i++)
                       isa->add_noise_span(task, row[i] * width, (row[i] + 1) * width,
                                           src + row[i] * n_bytes, dst + i * n_bytes);
                   });
  return out;
}

at::Tensor add_noise_rows_cpu(const at::Tensor& x, const at::Tensor& index, const at::Tensor& seeds,
                              const at::Tensor& coefs, int64_t stream, double scale,
                              std::string_view noise) {
  const auto known = noise_of(noise);
  if (!known) {
    return in_plain_torch("pseuzo::add_noise_rows", add_noise_rows_cpu, x, index, seeds, coefs,
                          stream, scale, noise);
  }
  return add_noise_rows("add_noise_rows", x, index, seeds, coefs, stream, scale, *known);
}

at::Tensor add_noise_masked_rows_cpu(const at::Tensor& x, const at::Tensor& index,
                                     const at::Tensor& seeds, const at::Tensor& coefs,
                                     int64_t stream, double scale, std::string_view noise,
                                     double limit, const std::optional<at::Tensor>& mask_seed) {
  const char* const op = "add_noise_masked_rows";
  const auto known = noise_of(noise);
  if (!known) {
    return in_plain_torch("pseuzo::add_noise_masked_rows", add_noise_masked_rows_cpu, x, index,
                          seeds, coefs, stream, scale, noise, limit, mask_seed);
  }
  return add_noise_rows(op, x, index, seeds, coefs, stream, scale, *known,
                        Masks(op, limit, mask_seed));
}

}  // namespace
}  // namespace pseuzo

TORCH_LIBRARY_IMPL(pseuzo, CPU, m) {
  m.impl("add_noise_rows", &pseuzo::add_noise_rows_cpu);
  m.impl("add_noise_masked_rows", &pseuzo::add_noise_masked_rows_cpu);
}
