// tensorar::drawn_codes on the CPU: the code of the largest logit + Gumbel, in one pass over the logits.
//
// Its logarithms are off by up to 1.4e-6 of their value, and of numbers near 1 too. So it also says whether the lead over
// the runner-up is beyond any rounding; the caller draws the few other rows with torch's own logarithm.
#include "instruction_sets.h"
#include "sampling_draws.h"

namespace tensorar {

struct DrawnCode {
  int64_t code;
  bool is_certain;
};

FOR_EACH_INSTRUCTION_SET(DrawnCode drawn_code(const float* logits_V, int64_t codebook_size, DrawsRow row,
                                              const PhiloxKeys& keys);)

// Twice the error of a sum of logit and Gumbel, of ours and of torch's together, at the size of the winner.
HOST_DEVICE float margin(float best) { return 2e-5f + 1e-6f * (best < 0 ? -best : best); }

// -log(x) of normal numbers: that of the power of two nearest below x sqrt(2), and a polynomial that was fitted to
// (log(1 + f) / f - 1) / f on what is left, for the least relative error of the logarithm.
HOST_DEVICE FloatLanes minus_log(FloatLanes x) {
  const HalfLanes bits = reinterpret_cast<HalfLanes>(x);
  const HalfLanes exponent = (bits - 0x3F3504F3) >> 23;
  const FloatLanes f = reinterpret_cast<FloatLanes>(bits - (exponent << 23)) - 1.0f;
  FloatLanes q = 0.11950462f * f - 0.18589234f;
  q = q * f + 0.20449392f;
  q = q * f - 0.24918929f;
  q = q * f + 0.33319202f;
  q = q * f - 0.5000085f;
  return __builtin_convertvector(exponent, FloatLanes) * -0.69314718f - (q * f * f + f);
}

// The largest and the next of what each lane saw.
struct Leaders {
  FloatLanes best = FloatLanes{} - __builtin_inff(), next = FloatLanes{} - __builtin_inff();
  HalfLanes code_of_best{}, has_nan{};

  HOST_DEVICE void see(FloatLanes scores, HalfLanes codes) {
    const HalfLanes is_more = scores > best;
    const FloatLanes less = is_more ? best : scores;
    next = less > next ? less : next;
    best = is_more ? scores : best;
    code_of_best = is_more ? codes : code_of_best;
    has_nan |= scores != scores;
  }
};

HOST_DEVICE DrawnCode lead(const Leaders& seen) {
  int winner = 0;
  bool has_nan = false;
  for (int lane = 0; lane < HALF_LANES; ++lane) {
    if (seen.best[lane] > seen.best[winner]) winner = lane;
    has_nan |= seen.has_nan[lane] != 0;
  }
  float next = seen.next[winner];
  for (int lane = 0; lane < HALF_LANES; ++lane) {
    if (lane != winner && seen.best[lane] > next) next = seen.best[lane];
  }
  const float best = seen.best[winner];
  return {seen.code_of_best[winner], !has_nan && next < best - margin(best)};
}

DrawnCode INSTRUCTION_SET::drawn_code(const float* logits_V, int64_t codebook_size, DrawsRow row,
                                      const PhiloxKeys& keys) {
  Leaders seen;
  HalfLanes codes{};
  for (int lane = 0; lane < HALF_LANES; ++lane) codes[lane] = lane;
  float last[CODES_PER_DRAW];
  for (int64_t code = 0; code < codebook_size; code += CODES_PER_DRAW) {
    const float* logits = logits_V + code;
    if (codebook_size - code < CODES_PER_DRAW) {
      for (int64_t i = 0; i < CODES_PER_DRAW; ++i) last[i] = code + i < codebook_size ? logits[i] : -__builtin_inff();
      logits = last;
    }
    const DrawnLanes uniforms = uniforms_from(row, code, keys);
    seen.see(*reinterpret_cast<const FloatLanesInMemory*>(logits) + minus_log(minus_log(uniforms.near)), codes);
    codes += HALF_LANES;
    seen.see(*reinterpret_cast<const FloatLanesInMemory*>(logits + HALF_LANES) + minus_log(minus_log(uniforms.far)),
             codes);
    codes += HALF_LANES;
  }
  return lead(seen);
}

}  // namespace tensorar

#ifdef IS_BASELINE

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "check.h"

namespace tensorar {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t MIN_CODES_PER_THREAD = 16384;

const int64_t* numbers_of(const char* name, const Tensor& numbers, int64_t count) {
  check(numbers.dim() == 1 && numbers.size(0) == count && numbers.is_contiguous() &&
            numbers.scalar_type() == ScalarType::Long && numbers.is_cpu(),
        "drawn_codes: ", name, " must be contiguous int64 of shape (N,) = (", count, ",) on the CPU");
  return static_cast<const int64_t*>(numbers.data_ptr());
}

std::tuple<Tensor, Tensor> drawn_codes_cpu(const Tensor& logits, const Tensor& rows, const Tensor& samples,
                                           const Tensor& positions, const Tensor& streams, int64_t seed) {
  check(logits.dim() == 2 && logits.is_contiguous() && logits.scalar_type() == ScalarType::Float && logits.is_cpu(),
        "drawn_codes: logits must be contiguous float32 of shape (R, V) on the CPU");
  const int64_t num_rows = logits.size(0), codebook_size = logits.size(1);
  check(1 <= codebook_size && codebook_size <= MAX_CODEBOOK_SIZE, "drawn_codes: V must be in [1, ", MAX_CODEBOOK_SIZE,
        "], got ", codebook_size);
  check(0 <= seed && seed < int64_t{1} << 56, "drawn_codes: seed must be in [0, 2**56), got ", seed);
  check(rows.dim() == 1, "drawn_codes: rows must have one dimension, got ", rows.dim());
  const int64_t count = rows.size(0);
  const int64_t *rows_N = numbers_of("rows", rows, count), *samples_N = numbers_of("samples", samples, count),
                *positions_N = numbers_of("positions", positions, count),
                *streams_N = numbers_of("streams", streams, count);
  const auto counters_of_draw = [&](int64_t i) {
    return DrawsRow{static_cast<uint64_t>(samples_N[i]), static_cast<uint64_t>(positions_N[i]),
                    static_cast<uint64_t>(streams_N[i])};
  };
  for (int64_t i = 0; i < count; ++i) {
    check(counters_of_draw(i).is_in_range(), "drawn_codes: positions must be in [0, 2**16) and streams in [0, 2**32), got ",
          positions_N[i], " and ", streams_N[i]);
    check(0 <= rows_N[i] && rows_N[i] < num_rows, "drawn_codes: rows must be in [0, R = ", num_rows, "), got ",
          rows_N[i]);
  }
  const Tensor codes = torch::stable::new_empty(rows, {count}, ScalarType::Long);
  const Tensor is_certain = torch::stable::new_empty(rows, {count}, ScalarType::Bool);
  int64_t* const codes_N = static_cast<int64_t*>(codes.data_ptr());
  bool* const is_certain_N = static_cast<bool*>(is_certain.data_ptr());
  const float* const logits_RV = static_cast<const float*>(logits.data_ptr());
  const PhiloxKeys keys = sampling_keys(seed);
  const auto draw = BEST_OF(drawn_code);
  const int64_t grain = std::max<int64_t>(1, MIN_CODES_PER_THREAD / codebook_size);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* const logits_V = logits_RV + rows_N[i] * codebook_size;
      const DrawnCode drawn = draw(logits_V, codebook_size, counters_of_draw(i), keys);
      codes_N[i] = drawn.code;
      is_certain_N[i] = drawn.is_certain;
    }
  });
  return {codes, is_certain};
}

STABLE_TORCH_LIBRARY_IMPL(tensorar, CPU, library) { library.impl("drawn_codes", TORCH_BOX(&drawn_codes_cpu)); }

}  // namespace
}  // namespace tensorar

#endif
