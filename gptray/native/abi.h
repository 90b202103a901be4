// The library's interface as text, made by the compiler; abi.py compares it with its own.
//
// One line per constant, "PANEL 64", struct, "Norm 24: weight f32* 0, bias f32* 8, eps f32 16"
// (sizes and offsets in bytes), and function, "decode_step(Model*, Cache*, Step*, i32)".

#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace {

// Names of types; a source adds its structs by ABI_TYPE.
template <typename T>
struct TypeName;

template <typename T>
struct TypeName<T *> {
  static std::string text() { return TypeName<T>::text() + "*"; }
};

template <typename T>
struct TypeName<const T> : TypeName<T> {};

#define ABI_TYPE(type, name)                   \
  template <>                                  \
  struct TypeName<type> {                      \
    static std::string text() { return name; } \
  };

ABI_TYPE(void, "void")
ABI_TYPE(float, "f32")
ABI_TYPE(double, "f64")
ABI_TYPE(int32_t, "i32")
ABI_TYPE(int64_t, "i64")
ABI_TYPE(uint16_t, "bf16")

template <typename First, typename... Others>
std::string type_names() {
  std::string text = TypeName<First>::text();
  ((text += ", " + TypeName<Others>::text()), ...);
  return text;
}

template <typename... Parameters>
std::string function_line(const char *name, void (*)(Parameters...)) {
  return std::string(name) + "(" + type_names<Parameters...>() + ")\n";
}

#define ABI_FUNCTION(name) function_line(#name, name)

inline std::string constant_line(const char *name, int value) {
  return std::string(name) + " " + std::to_string(value) + "\n";
}

#define ABI_CONSTANT(name) constant_line(#name, name)

template <typename T>
std::string field(const char *name, size_t offset) {
  return std::string(name) + " " + TypeName<T>::text() + " " + std::to_string(offset);
}

#define ABI_FIELD(type, name) field<decltype(type::name)>(#name, offsetof(type, name))

inline std::string struct_line(const char *name, size_t size,
                               std::initializer_list<std::string> fields) {
  std::string text = std::string(name) + " " + std::to_string(size);
  const char *before = ": ";
  for (const std::string &one : fields) text += before + one, before = ", ";
  return text + "\n";
}

#define ABI_STRUCT(name, ...) struct_line(#name, sizeof(name), {__VA_ARGS__})

}  // namespace
