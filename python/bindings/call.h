// From the tensors of one Python call to the plain arguments of csfast.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "csfast/types.h"

namespace nb = nanobind;

// A size that tensors of a call share: the first tensor that has it says what it is.
struct Size {
  const char* name;
  int64_t value = -1;  // not known yet

  operator int64_t() const { return value; }
};

// Unpacks tensors one by one and refuses whatever does not fit: nb::type_error for dtype and
// layout, nb::value_error for shapes and devices. Keeps the tensors alive.
class Call {
 public:
  explicit Call(const char* op) : op_(op) {}

  template <typename E>
  const E* in(nb::handle tensor, const char* name, std::initializer_list<Size*> shape) {
    return static_cast<const E*>(unpack(tensor, name, shape, nb::dtype<E>(), false));
  }

  template <typename E>
  E* out(nb::handle tensor, const char* name, std::initializer_list<Size*> shape) {
    return static_cast<E*>(unpack(tensor, name, shape, nb::dtype<E>(), true));
  }

  // Of the element type T that all such tensors of the call share.
  const void* in_type(nb::handle tensor, const char* name, std::initializer_list<Size*> shape) {
    return unpack(tensor, name, shape, {}, false);
  }
  void* out_type(nb::handle tensor, const char* name, std::initializer_list<Size*> shape) {
    return unpack(tensor, name, shape, {}, true);
  }

  // Null for None.
  template <typename E>
  const E* in_or_null(nb::handle tensor, const char* name, std::initializer_list<Size*> shape) {
    return tensor.is_none() ? nullptr : some(in<E>(tensor, name, shape));
  }
  const void* in_type_or_null(nb::handle tensor, const char* name,
                              std::initializer_list<Size*> shape) {
    return tensor.is_none() ? nullptr : some(in_type(tensor, name, shape));
  }

  // "silu" or "gelu_tanh".
  csfast::Activation activation(std::string_view name) const;

  // At least `bytes` bytes.
  void* workspace(nb::handle tensor, int64_t bytes);

  csfast::DType dtype() const;
  csfast::Device device() const;

 private:
  // An empty tensor may lie nowhere, which shall not read as none; nobody looks into it.
  template <typename E>
  static const E* some(const E* data) {
    static const double kNothing = 0;
    return data != nullptr ? data : reinterpret_cast<const E*>(&kNothing);
  }

  using Array = nb::ndarray<nb::ro>;

  // `wanted` of no bits stands for T.
  void* unpack(nb::handle tensor, const char* name, std::initializer_list<Size*> shape,
               nb::dlpack::dtype wanted, bool writable);
  void check_type(const Array& array, const std::string& what, nb::dlpack::dtype wanted);
  void check_shape(const Array& array, const std::string& what,
                   std::initializer_list<Size*> shape) const;
  void check_device(const Array& array, const std::string& what) const;

  const char* op_;
  nb::dlpack::dtype type_{};  // T, once known
  std::vector<Array> arrays_;
};

// Whether the elements of a tensor are of type E.
template <typename E>
bool holds(nb::handle tensor) {
  nb::ndarray<nb::ro> array;
  return nb::try_cast(tensor, array, false) && array.dtype() == nb::dtype<E>();
}

// Runs f without the lock of the interpreter.
template <typename F>
auto unlocked(F&& f) {
  nb::gil_scoped_release release;
  return f();
}

inline csfast::Stream stream_of(uintptr_t stream) {
  return reinterpret_cast<csfast::Stream>(stream);
}
