// A torch tensor as the kernels see it: pointer, dtype, device, sizes, strides.
//
// Read through the DLPack C exchange capsule on torch.Tensor (there since about torch 2.10), whose struct layouts are a
// published ABI (https://dmlc.github.io/dlpack, version 1.3) and are written out below. So this module is compiled
// without torch's headers and one binary serves every torch. An older torch is read through its Python attributes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "dtype.h"

namespace fastlm {
namespace py = pybind11;

namespace dlpack {  // names and layouts as in dlpack.h
enum : int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3 };
enum : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };
struct Device {
  int32_t type;
  int32_t id;
};
struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeHeader {
  uint32_t major, minor;
  ExchangeHeader* older;
};
struct ExchangeAPI {
  ExchangeHeader header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);
  void* current_stream;
};
}  // namespace dlpack

struct TensorView {
  static constexpr int kMaxDims = 8;
  void* data = nullptr;
  DType dtype = DType::kF32;
  bool cuda = false;
  int device = 0;  // CUDA device index
  int ndim = 0;
  int64_t shape[kMaxDims] = {};  // of a tensor with more dimensions, those that lie one behind the other as one
  int64_t strides[kMaxDims] = {};  // in elements

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  // Some two elements may share memory: a dimension does not step over all that the smaller ones span.
  bool overlaps_itself() const {
    if (numel() == 0) return false;
    for (int i = 0; i < ndim; ++i) {
      if (shape[i] == 1) continue;
      int64_t span = 0;
      for (int j = 0; j < ndim; ++j) {
        if (j == i || shape[j] == 1) continue;
        if (strides[j] == strides[i]) return true;
        if (strides[j] < strides[i]) span += (shape[j] - 1) * strides[j];
      }
      if (strides[i] <= span) return true;
    }
    return false;
  }
  // Fills exactly numel() elements of memory, in whatever order of dimensions.
  bool dense() const {
    if (contiguous()) return true;
    int64_t span = 1;
    for (int i = 0; i < ndim; ++i) span += (shape[i] - 1) * strides[i];
    return span == numel() && !overlaps_itself();
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return numel() == 0;
      expected *= shape[i];
    }
    return true;
  }
  std::string describe() const {
    std::string text = std::string(dtype_name(dtype)) + " (";
    for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    text += ") strides (";
    for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(strides[i]);
    return text + ")";
  }
};

inline bool same_layout(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  bool empty = a.numel() == 0;
  for (int i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i] || (!empty && a.shape[i] != 1 && a.strides[i] != b.strides[i])) return false;
  }
  return true;
}

class TensorReader {
 public:
  static TensorReader& instance() {
    static TensorReader* reader = new TensorReader;  // leaked: Python objects must not outlive the interpreter
    return *reader;
  }

  // False selects the path for a torch without the capsule; returns whether the capsule is in use afterwards.
  bool use_exchange(bool wanted) {
    active_ = wanted ? api_ : nullptr;
    return active_ != nullptr;
  }

  void read(PyObject* object, TensorView& out) const {
    active_ ? read_exchange(object, out) : read_attributes(object, out);
    // A FakeTensor or a freed tensor has a null pointer, plus its offset; a kernel that got it would crash.
    bool memory = out.data != nullptr && (is_plain(object) || has_storage(object));
    FASTLM_CHECK(memory || out.numel() == 0, "tensor of ", out.numel(), " elements has no memory");
  }

 private:
  TensorReader() {
    py::module_ torch = py::module_::import("torch");
    py::object type = torch.attr("Tensor");
    tensor_type_ = type.inc_ref().ptr();
    parameter_type_ = py::object(torch.attr("nn").attr("Parameter")).release().ptr();
    if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return;
    py::object capsule = type.attr("__dlpack_c_exchange_api__");
    auto* api = static_cast<dlpack::ExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) PyErr_Clear();
    while (api != nullptr && api->header.major != 1) api = reinterpret_cast<dlpack::ExchangeAPI*>(api->header.older);
    if (api != nullptr && api->tensor_from_object != nullptr) api_ = active_ = api;
  }

  bool is_plain(PyObject* object) const {
    return Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(tensor_type_) ||
           Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(parameter_type_);
  }
  static bool has_storage(PyObject* object) {
    return py::handle(object).attr("untyped_storage")().attr("data_ptr")().cast<uintptr_t>() != 0;
  }

  void read_exchange(PyObject* object, TensorView& out) const {
    if (!is_plain(object)) require_tensor(object);
    dlpack::Tensor t;
    if (active_->tensor_from_object(object, &t) != 0) {  // a nested tensor, a tensor subclass of sorts
      std::string why = py::error_already_set().what();
      fail_type("expected a tensor with memory of its own, and torch cannot show that of this one (",
                why.substr(0, why.find('\n')), ")");
    }
    out.data = static_cast<char*>(t.data) + t.byte_offset;
    set_dims(out, t.ndim, t.shape, t.strides);
    out.cuda = t.device.type == dlpack::kCUDA;
    FASTLM_CHECK(out.cuda || t.device.type == dlpack::kCPU || t.device.type == dlpack::kCUDAHost,
                 "tensor must be on cpu or cuda, got DLPack device type ", t.device.type);
    out.device = t.device.id;
    out.dtype = dtype_of(t.dtype);
  }

  static DType dtype_of(dlpack::DataType d) {
    switch (d.code) {
      case dlpack::kFloat:
        if (d.bits == 16) return DType::kF16;
        if (d.bits == 32) return DType::kF32;
        if (d.bits == 64) return DType::kF64;
        break;
      case dlpack::kBfloat: return DType::kBF16;
      case dlpack::kBool: return DType::kBool;
      case dlpack::kUInt:
        if (d.bits == 8) return DType::kU8;
        break;
      case dlpack::kInt:
        if (d.bits == 32) return DType::kI32;
        if (d.bits == 64) return DType::kI64;
        break;
    }
    fail_type("tensor has a dtype that no kernel takes (DLPack code ", int(d.code), ", ", int(d.bits), " bits)");
  }

  void read_attributes(PyObject* object, TensorView& out) const {
    require_tensor(object);
    py::handle tensor(object);
    out.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    auto shape = tensor.attr("shape").cast<std::vector<int64_t>>();
    auto strides = tensor.attr("stride")().cast<std::vector<int64_t>>();
    set_dims(out, static_cast<int>(shape.size()), shape.data(), strides.data());
    py::object device = tensor.attr("device");
    std::string type = py::str(device.attr("type"));
    FASTLM_CHECK(type == "cpu" || type == "cuda", "tensor must be on cpu or cuda, got ", type);
    out.cuda = type == "cuda";
    py::object index = device.attr("index");
    out.device = index.is_none() ? 0 : index.cast<int>();
    std::string dtype = py::str(tensor.attr("dtype"));
    for (int i = 0; i < kNumDTypes; ++i) {
      if (dtype == std::string("torch.") + dtype_name(DType(i))) {
        out.dtype = DType(i);
        return;
      }
    }
    fail_type("tensor has a dtype that no kernel takes (", dtype, ")");
  }

  void require_tensor(PyObject* object) const {
    int is_tensor = PyObject_IsInstance(object, tensor_type_);
    if (is_tensor < 0) throw py::error_already_set();
    if (!is_tensor) fail_type("expected a torch.Tensor, got ", Py_TYPE(object)->tp_name);
  }

  static void set_dims(TensorView& out, int ndim, const int64_t* shape, const int64_t* strides) {
    int n = 0, excess = ndim - TensorView::kMaxDims;
    for (int i = 0; i < ndim; ++i) {
      if (excess > 0 && n > 0) {
        int64_t &size = out.shape[n - 1], &stride = out.strides[n - 1];
        if (shape[i] == 1 || size == 1 || stride == shape[i] * strides[i]) {
          if (shape[i] != 1) stride = strides[i];
          size *= shape[i];
          --excess;
          continue;
        }
      }
      FASTLM_CHECK(n < TensorView::kMaxDims, "tensor has ", ndim, " dimensions, more than ", TensorView::kMaxDims,
                   " of which do not lie one behind the other");
      out.shape[n] = shape[i];
      out.strides[n++] = strides[i];
    }
    out.ndim = n;
  }

  PyObject* tensor_type_ = nullptr;
  PyObject* parameter_type_ = nullptr;
  dlpack::ExchangeAPI* api_ = nullptr;
  dlpack::ExchangeAPI* active_ = nullptr;
};

}  // namespace fastlm

namespace pybind11::detail {
// Lets a bound function take TensorView (or std::optional, std::vector of it) where Python passes a tensor.
template <>
struct type_caster<fastlm::TensorView> {
  PYBIND11_TYPE_CASTER(fastlm::TensorView, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    if (source.is_none()) return false;
    fastlm::TensorReader::instance().read(source.ptr(), value);
    return true;
  }
};
}  // namespace pybind11::detail
