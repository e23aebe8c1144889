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

// Where the elements of the tensors of a call are in whole tensors, and which of them take noise:
// the arguments places, limits, mask_seed and takes of pseuzo_kernels/parts.py.
class Selection {
 public:
  Selection(const char* op, at::IntArrayRef places, at::ArrayRef<double> limits,
            const std::optional<at::Tensor>& mask_seed, at::TensorList takes, at::TensorList out);
  // Appends the pieces of tensor t, which have these tasks. src may be null if there are no masks.
  void add(std::vector<Piece>& pieces, size_t t, std::vector<Task> tasks, const char* src,
           char* dst) const;
  bool masked() const { return masks_.kind != Mask::kNone || !takes_.empty(); }

 private:
  struct Part {
    int64_t n = 0, offset = 0, width = 0, stride = 0, itemsize = 0;
  };
  std::vector<Part> parts_;
  Masks masks_;
  at::TensorList takes_;
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
