#include "call.h"

namespace {

std::string name_of(nb::dlpack::dtype type) {
  using Code = nb::dlpack::dtype_code;
  static constexpr const char* kNames[] = {"int", "uint", "float", "", "bfloat", "complex", "bool"};
  const bool known = type.code < std::size(kNames) && type.code != 3;
  if (Code(type.code) == Code::Bool) return "bool";
  return (known ? kNames[type.code] : "dtype") + std::to_string(type.bits);
}

std::string list(size_t n, auto&& item) {
  std::string text = "(";
  for (size_t i = 0; i < n; ++i) text += (i > 0 ? ", " : "") + item(i);
  return text + (n == 1 ? ",)" : ")");
}

template <typename Array>
std::string shape_of(const Array& array) {
  return list(array.ndim(), [&](size_t i) { return std::to_string(array.shape(i)); });
}

template <typename Array>
bool is_contiguous(const Array& array) {
  if (array.size() == 0) return true;
  int64_t step = 1;
  for (size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) != 1 && array.stride(i) != step) return false;
    step *= static_cast<int64_t>(array.shape(i));
  }
  return true;
}

template <typename Array>
std::string device_name(const Array& array) {
  if (array.device_type() == nb::device::cpu::value) return "cpu";
  if (array.device_type() == nb::device::cuda::value) {
    return "cuda:" + std::to_string(array.device_id());
  }
  return "device type " + std::to_string(array.device_type());
}

bool is_real(nb::dlpack::dtype type) {
  using Code = nb::dlpack::dtype_code;
  return type.lanes == 1 &&
         ((Code(type.code) == Code::Float && (type.bits == 32 || type.bits == 16)) ||
          (Code(type.code) == Code::Bfloat && type.bits == 16));
}

}  // namespace

void* Call::unpack(nb::handle tensor, const char* name, std::initializer_list<Size*> shape,
                   nb::dlpack::dtype wanted, bool writable) {
  const std::string what = std::string("[") + op_ + "] " + name;
  Array array;
  nb::ndarray<> writer;
  if (writable && nb::try_cast(tensor, writer, false)) {
    array = Array(writer);
  } else if (!nb::try_cast(tensor, array, false)) {
    const std::string given = nb::str(nb::type_name(tensor.type())).c_str();
    throw nb::type_error(
        (what + " is a " + given +
         " without dense memory that can be read: want a strided tensor on the CPU "
         "or on CUDA.")
            .c_str());
  }
  check_type(array, what, wanted);
  check_shape(array, what, shape);
  if (!is_contiguous(array)) {
    throw nb::type_error(
        (what + " of shape " + shape_of(array) + " has other strides: want a contiguous tensor.")
            .c_str());
  }
  if (writable && !writer.is_valid()) {
    throw nb::type_error((what + " is read-only: want a tensor to write to.").c_str());
  }
  check_device(array, what);
  void* data = const_cast<void*>(array.data());
  arrays_.push_back(std::move(array));
  return data;
}

void* Call::workspace(nb::handle tensor, int64_t bytes) {
  Size size{"bytes"};
  void* data = out<uint8_t>(tensor, "workspace", {&size});
  if (size < bytes) {
    throw nb::value_error((std::string("[") + op_ + "] workspace of " + std::to_string(size) +
                           " bytes: want " + std::to_string(bytes) + ".")
                              .c_str());
  }
  return data;
}

csfast::Activation Call::activation(std::string_view name) const {
  if (name == "silu") return csfast::Activation::kSilu;
  if (name == "gelu_tanh") return csfast::Activation::kGeluTanh;
  throw nb::value_error(
      ("[" + std::string(op_) + "] activation = " + std::string(name) + ": want silu or gelu_tanh.")
          .c_str());
}

csfast::DType Call::dtype() const {
  if (type_.code == uint8_t(nb::dlpack::dtype_code::Bfloat)) return csfast::DType::kBF16;
  return type_.bits == 16 ? csfast::DType::kF16 : csfast::DType::kF32;
}

csfast::Device Call::device() const {
  return arrays_.front().device_type() == nb::device::cuda::value ? csfast::Device::kCuda
                                                                  : csfast::Device::kCpu;
}

void Call::check_type(const Array& array, const std::string& what, nb::dlpack::dtype wanted) {
  const nb::dlpack::dtype type = array.dtype();
  if (wanted.bits == 0) {
    if (!is_real(type)) {
      throw nb::type_error(
          (what + " is " + name_of(type) + ": want float32, float16 or bfloat16.").c_str());
    }
    if (type_.bits == 0) type_ = type;
    wanted = type_;
  }
  if (type != wanted) {
    throw nb::type_error(
        (what + " is " + name_of(type) + ": want " + name_of(wanted) + ".").c_str());
  }
}

void Call::check_shape(const Array& array, const std::string& what,
                       std::initializer_list<Size*> shape) const {
  bool fits = array.ndim() == shape.size();
  size_t axis = 0;
  for (Size* size : shape) {
    if (!fits) break;
    const int64_t given = static_cast<int64_t>(array.shape(axis++));
    if (size->value < 0) size->value = given;
    fits = size->value == given;
  }
  if (fits) return;
  const std::string wanted = list(shape.size(), [&](size_t i) {
    const Size& size = **(shape.begin() + i);
    const std::string value = std::to_string(size.value);
    if (size.value < 0 || size.name == value) return std::string(size.name);
    return size.name + (" = " + value);
  });
  throw nb::value_error(
      (what + " has shape " + shape_of(array) + ": want " + wanted + ".").c_str());
}

void Call::check_device(const Array& array, const std::string& what) const {
  if (array.device_type() != nb::device::cpu::value &&
      array.device_type() != nb::device::cuda::value) {
    throw nb::value_error((what + " is on " + device_name(array) + ": want cpu or cuda.").c_str());
  }
  if (arrays_.empty()) return;
  const Array& first = arrays_.front();
  if (array.device_type() != first.device_type() || array.device_id() != first.device_id()) {
    throw nb::value_error((what + " is on " + device_name(array) + ", the tensors before it on " +
                           device_name(first) + ": want all tensors of a call on one device.")
                              .c_str());
  }
}
