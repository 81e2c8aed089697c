// Half of a float's bits; arithmetic is in float.
#pragma once

#include <stdint.h>

namespace tensorar {

struct BFloat16 {
  uint16_t bits;
};

}  // namespace tensorar
