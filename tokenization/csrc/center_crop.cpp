// The centre crop of an image as Pillow's `reduce`, `resize` and `crop` make it, bit for bit: halved by a box filter
// while it is twice too large, resized by a bicubic one, cropped. Only what is inside the crop is computed.
//
// Pixels are four bytes, of which the last is of no account. Weights are integers of PRECISION bits, sums are exact, so
// the order of additions does not show; between the two passes values are rounded to bytes, so columns come first.
#include "instruction_sets.h"
#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tensorar {

// A weight is high * 2^SPLIT + low, so that both halves fit 16 bits; of two neighbouring inputs.
struct PairOfWeights {
  int16_t high[2], low[2];
};

// Which inputs an output sums up, and their weights; an odd one out is followed by a weight of zero.
struct Taps {
  int32_t first, count;
  const PairOfWeights* weights;
};

constexpr int PRECISION = 22, SPLIT = 12;

FOR_EACH_INSTRUCTION_SET(
    void halve_rows(const uint8_t* upper, const uint8_t* lower, int64_t num_pixels, uint8_t* to);
    void sum_columns(const uint8_t* const (&rows)[2], const Taps* taps, int64_t num_pixels, uint8_t* const (&to)[2]);
    void sum_rows(const uint8_t* row, int64_t row_bytes, Taps taps, int64_t num_pixels, uint8_t* to);
    void pack_row(const uint8_t* row, int64_t num_pixels, uint8_t* to);)

namespace INSTRUCTION_SET {

typedef uint32_t Pixels8 __attribute__((vector_size(32)));
typedef uint32_t Pixels8InMemory __attribute__((vector_size(32), aligned(4), may_alias));

static ALWAYS_INLINE Pixels8 rounded_mean(Pixels8 a, Pixels8 b) { return (a | b) - (((a ^ b) >> 1) & 0x7F7F7F7Fu); }

// Two rows of 2 * num_pixels pixels to one.
void halve_rows(const uint8_t* upper, const uint8_t* lower, int64_t num_pixels, uint8_t* to) {
  const auto halved = [](const uint8_t* row, int64_t pixel) __attribute__((always_inline)) {
    const Pixels8 near = *reinterpret_cast<const Pixels8InMemory*>(row + pixel * 8),
                  far = *reinterpret_cast<const Pixels8InMemory*>(row + pixel * 8 + 32);
    return rounded_mean(SHUFFLE(near, far, 0, 2, 4, 6, 8, 10, 12, 14), SHUFFLE(near, far, 1, 3, 5, 7, 9, 11, 13, 15));
  };
  int64_t pixel = 0;
  for (; pixel + 8 <= num_pixels; pixel += 8)
    *reinterpret_cast<Pixels8InMemory*>(to + pixel * 4) = rounded_mean(halved(upper, pixel), halved(lower, pixel));
  for (int64_t at = pixel * 4; at < num_pixels * 4; ++at) {
    const int64_t left = (at / 4) * 8 + at % 4;
    const int of_upper = (upper[left] + upper[left + 4] + 1) >> 1, of_lower = (lower[left] + lower[left + 4] + 1) >> 1;
    to[at] = static_cast<uint8_t>((of_upper + of_lower + 1) >> 1);
  }
}

#if defined(__AVX2__)

// Eight sums of pairs, halves apart.
struct Sums {
  __m256i high = _mm256_setzero_si256(), low = _mm256_set1_epi32(1 << (PRECISION - 1));

  // Takes 8 pairs of inputs, of 16 bits each.
  ALWAYS_INLINE void add(__m256i pairs, PairOfWeights weights) {
    int32_t both[2];
    __builtin_memcpy(both, &weights, 8);
    high = _mm256_add_epi32(high, _mm256_madd_epi16(pairs, _mm256_set1_epi32(both[0])));
    low = _mm256_add_epi32(low, _mm256_madd_epi16(pairs, _mm256_set1_epi32(both[1])));
  }

  ALWAYS_INLINE __m256i rounded() const {
    return _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, SPLIT), low), PRECISION);
  }
};

void sum_columns(const uint8_t* const (&rows)[2], const Taps* taps, int64_t num_pixels, uint8_t* const (&to)[2]) {
  // Of two pixels in each half: the first channel of both, the second of both, ...; 16 bits each.
  const __m256i by_channel = _mm256_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1,  //
                                              0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1);
  for (int64_t pixel = 0; pixel < num_pixels; ++pixel) {
    const int64_t from = taps[pixel].first * int64_t{4};
    const int32_t count = taps[pixel].count;
    Sums sums;
    for (int32_t tap = 0; tap + 2 <= count; tap += 2) {
      const __m128i upper = _mm_loadu_si64(rows[0] + from + tap * 4), lower = _mm_loadu_si64(rows[1] + from + tap * 4);
      sums.add(_mm256_shuffle_epi8(_mm256_set_m128i(lower, upper), by_channel), taps[pixel].weights[tap / 2]);
    }
    if (count % 2 != 0) {
      const __m128i upper = _mm_loadu_si32(rows[0] + from + (count - 1) * 4),
                    lower = _mm_loadu_si32(rows[1] + from + (count - 1) * 4);
      sums.add(_mm256_shuffle_epi8(_mm256_set_m128i(lower, upper), by_channel), taps[pixel].weights[count / 2]);
    }
    const __m256i words = _mm256_packs_epi32(sums.rounded(), sums.rounded());
    const __m256i bytes = _mm256_packus_epi16(words, words);
    _mm_storeu_si32(to[0] + pixel * 4, _mm256_castsi256_si128(bytes));
    _mm_storeu_si32(to[1] + pixel * 4, _mm256_extracti128_si256(bytes, 1));
  }
}

void sum_rows(const uint8_t* row, int64_t row_bytes, Taps taps, int64_t num_pixels, uint8_t* to) {
  row += taps.first * row_bytes;
  for (int64_t at = 0; at < num_pixels * 4; at += 16) {
    Sums left, right;
    const auto add = [&](__m128i one, __m128i next, PairOfWeights weights) __attribute__((always_inline)) {
      left.add(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(one, next)), weights);
      right.add(_mm256_cvtepu8_epi16(_mm_unpackhi_epi8(one, next)), weights);
    };
    const auto load = [&](int32_t tap) __attribute__((always_inline)) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + tap * row_bytes + at));
    };
    for (int32_t tap = 0; tap + 2 <= taps.count; tap += 2) add(load(tap), load(tap + 1), taps.weights[tap / 2]);
    if (taps.count % 2 != 0) add(load(taps.count - 1), _mm_setzero_si128(), taps.weights[taps.count / 2]);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(left.rounded(), right.rounded()), 0xD8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + at), bytes);
  }
}

#else

static ALWAYS_INLINE int32_t weight(const Taps& taps, int32_t tap) {
  const PairOfWeights& pair = taps.weights[tap / 2];
  return pair.high[tap % 2] * (1 << SPLIT) + pair.low[tap % 2];
}

static ALWAYS_INLINE uint8_t rounded(int32_t sum) {
  sum >>= PRECISION;
  return static_cast<uint8_t>(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

void sum_columns(const uint8_t* const (&rows)[2], const Taps* taps, int64_t num_pixels, uint8_t* const (&to)[2]) {
  for (int row = 0; row < 2; ++row) {
    for (int64_t pixel = 0; pixel < num_pixels; ++pixel) {
      const uint8_t* const from = rows[row] + taps[pixel].first * int64_t{4};
      int32_t sums[4] = {1 << (PRECISION - 1), 1 << (PRECISION - 1), 1 << (PRECISION - 1), 0};
      for (int32_t tap = 0; tap < taps[pixel].count; ++tap)
        for (int channel = 0; channel < 4; ++channel)
          sums[channel] += from[tap * 4 + channel] * weight(taps[pixel], tap);
      for (int channel = 0; channel < 4; ++channel) to[row][pixel * 4 + channel] = rounded(sums[channel]);
    }
  }
}

void sum_rows(const uint8_t* row, int64_t row_bytes, Taps taps, int64_t num_pixels, uint8_t* to) {
  constexpr int64_t BLOCK = 64;
  row += taps.first * row_bytes;
  for (int64_t begin = 0; begin < num_pixels * 4; begin += BLOCK) {
    const int64_t count = num_pixels * 4 - begin < BLOCK ? num_pixels * 4 - begin : BLOCK;
    int32_t sums[BLOCK];
    for (int64_t at = 0; at < count; ++at) sums[at] = 1 << (PRECISION - 1);
    for (int32_t tap = 0; tap < taps.count; ++tap) {
      const uint8_t* const from = row + tap * row_bytes + begin;
      const int32_t factor = weight(taps, tap);
      for (int64_t at = 0; at < count; ++at) sums[at] += from[at] * factor;
    }
    for (int64_t at = 0; at < count; ++at) to[begin + at] = rounded(sums[at]);
  }
}

#endif

// Four bytes a pixel to three; reads and writes nothing beyond the row.
void pack_row(const uint8_t* row, int64_t num_pixels, uint8_t* to) {
  int64_t pixel = 0;
  for (; pixel + 6 <= num_pixels; pixel += 4) {  // 16 bytes are written, of which 12 are meant
    const Bytes16 four = load_bytes(row + pixel * 4);
    store_bytes(to + pixel * 3, SHUFFLE(four, four, 0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15));
  }
  for (; pixel < num_pixels; ++pixel) __builtin_memcpy(to + pixel * 3, row + pixel * 4, 3);
}

}  // namespace INSTRUCTION_SET
}  // namespace tensorar

#ifdef IS_BASELINE

#include <algorithm>
#include <cmath>
#include <new>
#include <optional>
#include <vector>

namespace tensorar {
namespace {

constexpr int64_t SPARE_BYTES = 16;

// Four bytes a pixel, rows without gaps.
struct Image {
  const uint8_t* pixels;
  int64_t width, height;
  const uint8_t* row(int64_t index) const { return pixels + index * width * 4; }
};

// An image with memory of its own, and bytes to spare after its last row.
struct OwnImage {
  std::vector<uint8_t> pixels;
  int64_t width, height;
  OwnImage(int64_t width, int64_t height) : pixels(width * height * 4 + SPARE_BYTES), width(width), height(height) {}
  uint8_t* row(int64_t index) { return pixels.data() + index * width * 4; }
  Image view() const { return {pixels.data(), width, height}; }
};

double box(double x) { return -0.5 < x && x <= 0.5 ? 1.0 : 0.0; }

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
}

struct Filter {
  double (*value)(double);
  double support;
};

constexpr Filter BOX{box, 0.5}, BICUBIC{bicubic, 2.0};

// The taps of outputs [begin, begin + count) of a side that is resized.
class SideTaps {
 public:
  SideTaps(Filter filter, int64_t from, int64_t to, int64_t begin, int64_t count) {
    const double scale = static_cast<double>(from) / static_cast<double>(to), stretch = std::max(scale, 1.0);
    const double support = filter.support * stretch, inverse = 1.0 / stretch;
    const int64_t most = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
    const int64_t most_pairs = (most + 1) / 2;
    weights_.resize(count * most_pairs);
    taps_.reserve(count);
    std::vector<double> values(most);
    for (int64_t index = 0; index < count; ++index) {
      const double centre = (static_cast<double>(begin + index) + 0.5) * scale;
      const int64_t first = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0),
                    end = std::min<int64_t>(static_cast<int64_t>(centre + support + 0.5), from);
      double sum = 0.0;
      for (int64_t at = first; at < end; ++at) {
        values[at - first] = filter.value((static_cast<double>(at) - centre + 0.5) * inverse);
        sum += values[at - first];
      }
      PairOfWeights* const weights = weights_.data() + index * most_pairs;
      for (int64_t at = 0; at < end - first; ++at) {
        const double exact = (sum == 0.0 ? values[at] : values[at] / sum) * (1 << PRECISION);
        const auto weight = static_cast<int32_t>(exact < 0 ? exact - 0.5 : exact + 0.5);
        const int32_t high = (weight + (1 << (SPLIT - 1))) >> SPLIT;
        weights[at / 2].high[at % 2] = static_cast<int16_t>(high);
        weights[at / 2].low[at % 2] = static_cast<int16_t>(weight - high * (1 << SPLIT));
      }
      taps_.push_back({static_cast<int32_t>(first), static_cast<int32_t>(end - first), weights});
    }
  }

  const Taps& operator[](int64_t index) const { return taps_[index]; }
  const Taps* data() const { return taps_.data(); }
  int64_t first() const { return taps_.front().first; }
  int64_t end() const { return taps_.back().first + taps_.back().count; }

 private:
  std::vector<PairOfWeights> weights_;
  std::vector<Taps> taps_;
};

struct Region {
  int64_t left, top, width, height;
};

// A region of the image resized to width * height.
OwnImage resized(const Image& image, Filter filter, int64_t width, int64_t height, Region region) {
  const SideTaps columns(filter, image.width, width, region.left, region.width),
      rows(filter, image.height, height, region.top, region.height);
  OwnImage between(region.width, rows.end() - rows.first());
  for (int64_t row = 0; row < between.height; row += 2) {
    const uint8_t* from[2];
    uint8_t* to[2];
    for (int64_t index = 0; index < 2; ++index) {
      const int64_t at = std::min(row + index, between.height - 1);  // the last one again
      from[index] = image.row(rows.first() + at);
      to[index] = between.row(at);
    }
    BEST_OF(sum_columns)(from, columns.data(), region.width, to);
  }
  OwnImage result(region.width, region.height);
  for (int64_t row = 0; row < region.height; ++row) {
    Taps taps = rows[row];
    taps.first -= static_cast<int32_t>(rows.first());
    BEST_OF(sum_rows)(between.row(0), region.width * 4, taps, region.width, result.row(row));
  }
  return result;
}

OwnImage halved(const Image& image) {
  const int64_t width = image.width / 2, height = image.height / 2;
  if (image.width % 2 != 0 || image.height % 2 != 0) return resized(image, BOX, width, height, {0, 0, width, height});
  OwnImage result(width, height);
  for (int64_t row = 0; row < height; ++row)
    BEST_OF(halve_rows)(image.row(2 * row), image.row(2 * row + 1), width, result.row(row));
  return result;
}

void pack(const Image& image, int64_t left, int64_t top, int64_t size, uint8_t* to) {
  const auto pack_one = BEST_OF(pack_row);
  for (int64_t row = 0; row < size; ++row) pack_one(image.row(top + row) + left * 4, size, to + row * size * 3);
}

void center_crop(Image image, int64_t size, int64_t width, int64_t height, uint8_t* to) {
  std::optional<OwnImage> smaller;
  while (std::min(image.width, image.height) >= 2 * size) {
    smaller = halved(image);
    image = smaller->view();
  }
  const int64_t left = (width - size) / 2, top = (height - size) / 2;
  if (image.width == width && image.height == height) return pack(image, left, top, size, to);
  pack(resized(image, BICUBIC, width, height, {left, top, size, size}).view(), 0, 0, size, to);
}

}  // namespace
}  // namespace tensorar

// What owns an image's memory, as Pillow hands it out: the child's second buffer is the pixels.
//
// Source: Apache Arrow, "The Arrow C data interface".
struct ArrowArray {
  int64_t length, null_count, offset, n_buffers, n_children;
  const void** buffers;
  ArrowArray** children;
  ArrowArray* dictionary;
  void (*release)(ArrowArray*);
  void* private_data;
};

// Writes (size, size, 3) bytes: the centre of an image, halved while both sides are twice `size` or more, then resized to
// resized_width * resized_height. Returns 1, or -1 where there is no memory for it.
extern "C" __attribute__((visibility("default"))) int32_t center_crop(const ArrowArray* image, int64_t width, int64_t height,
                                                                   int64_t size, int64_t resized_width,
                                                                   int64_t resized_height, uint8_t* to) {
  try {
    const auto pixels = static_cast<const uint8_t*>(image->children[0]->buffers[1]);
    tensorar::center_crop({pixels, width, height}, size, resized_width, resized_height, to);
    return 1;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

// What the library was built from.
extern "C" __attribute__((visibility("default"))) const char* pixels_sources() { return PIXELS_SOURCES; }

#endif
