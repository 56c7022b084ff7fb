// What fastlm._cpu needs of a C++ compiler: C++17 and vector extensions with conversions.
#include <optional>

typedef float Floats __attribute__((vector_size(32)));
typedef int Ints __attribute__((vector_size(32)));

template <class... Parts> constexpr int sum(Parts... parts) { return (parts + ... + 0); }

std::optional<Ints> convert(Floats x) {
  static_assert(sum(1, 2) == 3);
  return __builtin_convertvector(x, Ints);
}

int main() {}
