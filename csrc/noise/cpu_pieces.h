// Pieces of tensors: what the noise ops on the CPU hand to threads, once they have checked their
// arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu_task.h"
#include "cpu_terms.h"

namespace pseuzo {

struct Piece {
  const char* src;  // or null
  char* dst;
  int64_t n;
  int64_t first;            // position of its first element in the whole tensor
  std::vector<Task> tasks;  // one; or several in a row, all in place
};

// Divides the pieces among threads. adam: the tasks of a piece are the steps that make its moments.
void add_noise_pieces(const std::vector<Piece>& pieces, const Terms& terms,
                      const Adam* adam = nullptr);

// Does so for a single step, or copies the pieces if the op is skipped. If there is nothing to do,
// nothing is written at all, and found_inf stays as it is.
void add_noise_unless_skipped(const std::vector<Piece>& pieces, const Terms& terms,
                              const std::optional<at::Tensor>& found_inf);

// What is the same for all elements of a tensor, but for its noise and its mask.
Task task_of(const char* op, const at::Tensor& y, int64_t K, bool stochastic, int64_t rounding_seed,
             int64_t stream, double keep);

// The memory of x, after a check that `out` is like it.
const char* source_of(const char* op, const at::Tensor& x, const at::Tensor& out);

void check_found_inf(const char* op, const std::optional<at::Tensor>& found_inf);

// Whether the op is skipped: because of its coefficients, which sets the flag, or by the flag.
bool skips(bool by_coefs, const std::optional<at::Tensor>& found_inf);

}  // namespace pseuzo
