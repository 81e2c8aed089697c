// Errors of ops, as plain text: `<op>: <argument> must be <rule>, got <value>`.
#pragma once

#include <sstream>
#include <stdexcept>

namespace tensorar {

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace tensorar
