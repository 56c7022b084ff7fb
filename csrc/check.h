// Errors are sentences: the operation, the argument, what was expected, what came. ValueError unless said otherwise.
#pragma once

#include <pybind11/pybind11.h>

#include <sstream>
#include <stdexcept>

namespace fastlm {

template <class... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::invalid_argument("fastlm: " + sentence(parts...));  // ValueError in Python
}

template <class... Parts>
[[noreturn]] void fail_type(const Parts&... parts) {
  throw pybind11::type_error("fastlm: " + sentence(parts...));
}

}  // namespace fastlm

#define FASTLM_CHECK(condition, ...) \
  do {                               \
    if (!(condition)) ::fastlm::fail(__VA_ARGS__); \
  } while (0)
