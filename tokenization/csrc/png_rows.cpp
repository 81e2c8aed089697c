// The rows of a PNG, inflated, to pixels on white: filters are undone and transparency is blended as Pillow's `paste`
// blends it, bit for bit. Rows are of 8 bits a channel, three or four channels.
//
// Source: W3C, Portable Network Graphics (third edition), section 9.
#include "instruction_sets.h"
#include "vectors.h"

namespace tensorar {

FOR_EACH_INSTRUCTION_SET(bool rows_to_pixels(const uint8_t* rows, int64_t width, int64_t height, int64_t num_channels,
                                             uint8_t* lines, uint8_t* pixels);)

namespace INSTRUCTION_SET {

enum Filter { NONE, SUB, UP, AVERAGE, PAETH };

// The channels of one pixel, in as many lanes as fit one register.
typedef int16_t Channels __attribute__((vector_size(16)));
typedef uint8_t Bytes8 __attribute__((vector_size(8)));

template <int NUM_CHANNELS>
static ALWAYS_INLINE Channels load(const uint8_t* from) {
  uint64_t bytes = 0;
  __builtin_memcpy(&bytes, from, NUM_CHANNELS);
  return __builtin_convertvector((Bytes8)bytes, Channels);
}

template <int NUM_CHANNELS>
static ALWAYS_INLINE void store(uint8_t* to, Channels channels) {
  const Bytes8 bytes = __builtin_convertvector(channels, Bytes8);
  __builtin_memcpy(to, &bytes, NUM_CHANNELS);
}

static ALWAYS_INLINE Channels magnitude(Channels a) { return a < 0 ? -a : a; }
static ALWAYS_INLINE Channels smaller(Channels a, Channels b) { return a < b ? a : b; }

// The one of left, above and corner that is nearest to left + above - corner. As little as can be waits for `left`, the
// pixel before: that chain is what a row of this filter takes.
static ALWAYS_INLINE Channels paeth(Channels left, Channels above, Channels corner) {
  const Channels step = above - corner, to_left = magnitude(step), opposite = step - corner;
  const Channels to_above = magnitude(left - corner), to_corner = magnitude(left + opposite);
  const Channels of_two = to_above <= to_corner ? above : corner;
  return to_left <= smaller(to_above, to_corner) ? left : of_two;
}

// Undoes the filter of one row in place; `above` is the row before, undone, or zeros.
template <int NUM_CHANNELS>
static ALWAYS_INLINE bool undo(uint8_t filter, uint8_t* row, const uint8_t* above, int64_t num_bytes) {
  const Channels low_byte = Channels{} + 255;
  Channels left{}, corner{};
  switch (filter) {
    case NONE:
      return true;
    case SUB:
      for (int64_t at = 0; at < num_bytes; at += NUM_CHANNELS) {
        left = (load<NUM_CHANNELS>(row + at) + left) & low_byte;
        store<NUM_CHANNELS>(row + at, left);
      }
      return true;
    case UP:
      for (int64_t at = 0; at < num_bytes; ++at) row[at] = static_cast<uint8_t>(row[at] + above[at]);
      return true;
    case AVERAGE:
      for (int64_t at = 0; at < num_bytes; at += NUM_CHANNELS) {
        left = (load<NUM_CHANNELS>(row + at) + ((left + load<NUM_CHANNELS>(above + at)) >> 1)) & low_byte;
        store<NUM_CHANNELS>(row + at, left);
      }
      return true;
    case PAETH:
      for (int64_t at = 0; at < num_bytes; at += NUM_CHANNELS) {
        const Channels over = load<NUM_CHANNELS>(above + at);
        left = (load<NUM_CHANNELS>(row + at) + paeth(left, over, corner)) & low_byte;
        corner = over;
        store<NUM_CHANNELS>(row + at, left);
      }
      return true;
    default:
      return false;
  }
}

typedef uint16_t Words8 __attribute__((vector_size(16)));

static ALWAYS_INLINE Words8 blended(Words8 channels, Words8 alphas) {
  const Words8 sums = channels * alphas + 255 * (255 - alphas) + 128;
  return (sums + (sums >> 8)) >> 8;
}

// Bytes of two vectors in turn; with zeros in the second, 16-bit words.
#define LOW_HALF(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH_HALF(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)

// Four pixels at a time, so up to three more than there are.
static ALWAYS_INLINE void blend_on_white(const uint8_t* row, int64_t width, uint8_t* pixels) {
  for (int64_t at = 0; at < width * 4; at += 16) {
    const Bytes16 bytes = load_bytes(row + at), zero{};
    const Bytes16 alphas = SHUFFLE(bytes, bytes, 3, 3, 3, 3, 7, 7, 7, 7, 11, 11, 11, 11, 15, 15, 15, 15);
    const auto near = blended((Words8)LOW_HALF(bytes, zero), (Words8)LOW_HALF(alphas, zero)),
               far = blended((Words8)HIGH_HALF(bytes, zero), (Words8)HIGH_HALF(alphas, zero));
    store_bytes(pixels + at,
                SHUFFLE((Bytes16)near, (Bytes16)far, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
  }
}

static ALWAYS_INLINE void copy(const uint8_t* row, int64_t width, uint8_t* pixels) {
  for (int64_t pixel = 0; pixel < width; ++pixel) {
    __builtin_memcpy(pixels + pixel * 4, row + pixel * 3, 3);
    pixels[pixel * 4 + 3] = 255;
  }
}

template <int NUM_CHANNELS>
static ALWAYS_INLINE bool convert(const uint8_t* rows, int64_t width, int64_t height, uint8_t* lines, uint8_t* pixels) {
  const int64_t num_bytes = width * NUM_CHANNELS;
  uint8_t *line = lines, *above = lines + num_bytes;
  __builtin_memset(above, 0, num_bytes);
  for (int64_t index = 0; index < height; ++index) {
    const uint8_t* const row = rows + index * (1 + num_bytes);
    __builtin_memcpy(line, row + 1, num_bytes);
    if (!undo<NUM_CHANNELS>(row[0], line, above, num_bytes)) return false;
    uint8_t* const to = pixels + index * width * 4;
    NUM_CHANNELS == 4 ? blend_on_white(line, width, to) : copy(line, width, to);
    uint8_t* const free = above;
    above = line;
    line = free;
  }
  return true;
}

// `lines` is memory for two rows, and both it and `pixels` have SPARE_BYTES more.
bool rows_to_pixels(const uint8_t* rows, int64_t width, int64_t height, int64_t num_channels, uint8_t* lines,
                    uint8_t* pixels) {
  return num_channels == 4 ? convert<4>(rows, width, height, lines, pixels)
                           : convert<3>(rows, width, height, lines, pixels);
}

}  // namespace INSTRUCTION_SET
}  // namespace tensorar

#ifdef IS_BASELINE

#include <memory>
#include <new>

namespace tensorar {
namespace {

// Pixels are blended four at a time.
constexpr int64_t SPARE_BYTES = 12;

}  // namespace
}  // namespace tensorar

// Turns `height` rows of 1 + width * num_channels bytes into pixels of four bytes, the last of which is of no account;
// `pixels` has room for three more. Returns 1, 0 where a row has a filter that there is not, or -1 where there is no
// memory.
extern "C" __attribute__((visibility("default"))) int32_t png_rows(const uint8_t* rows, int64_t width, int64_t height,
                                                                   int64_t num_channels, uint8_t* pixels) {
  using namespace tensorar;
  const std::unique_ptr<uint8_t[]> lines(new (std::nothrow) uint8_t[2 * width * num_channels + SPARE_BYTES]);
  if (lines == nullptr) return -1;
  return BEST_OF(rows_to_pixels)(rows, width, height, num_channels, lines.get(), pixels);
}

#endif
