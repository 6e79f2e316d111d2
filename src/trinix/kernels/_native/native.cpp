// Kept launches without Python: a plan is everything about a call that follows from how its tensors lie; run() allocates what it
// makes, launches kernels that Triton compiled, and under autograd leaves a node that runs the plan of the backward pass.
//
// Built on the user's machine against the installed PyTorch (trinix/_native/__init__.py). No CUDA header: the driver's launch
// function comes as an address.

#include <Python.h>

#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/Dtype.h>

namespace {

using torch::autograd::variable_list;

// cuLaunchKernel
using Launch = int (*)(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream, void** params, void** extra);
Launch launch = nullptr;

struct Made {
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
};

struct Step {
  void* function;
  unsigned blocks, threads, shared;
  std::vector<int> tensor;       // of every parameter: which tensor's address it is, or -1
  std::vector<uint64_t> scalar;  // else its bits
};

struct Plan {
  at::TensorOptions options;
  std::vector<Made> made;
  std::vector<Step> steps;
};

struct Pair {
  Plan forward, backward;
  std::vector<int> saved;                   // which of forward's tensors backward reads: inputs first, then what was made
  std::vector<int64_t> dy_sizes, dy_strides;  // of the gradient that backward's plan was made for
  at::ScalarType dy_dtype;
  c10::DispatchKeySet plain;  // of a tensor that is nothing but memory on its device
  PyObject* otherwise = nullptr;  // (saved tensors and dy) -> dx, for all other gradients
};

void run(const Plan& plan, std::vector<at::Tensor>& tensors, void* stream) {
  for (const Made& one : plan.made)
    tensors.push_back(at::empty_strided(one.sizes, one.strides, plan.options.dtype(one.dtype)));
  uint64_t values[64];
  void* params[64];
  for (const Step& step : plan.steps) {
    const size_t count = step.tensor.size();
    for (size_t i = 0; i < count; i++) {
      const int t = step.tensor[i];
      values[i] = t < 0 ? step.scalar[i] : reinterpret_cast<uint64_t>(tensors[t].const_data_ptr());
      params[i] = &values[i];
    }
    const int failed = launch(step.function, step.blocks, 1, 1, step.threads, 1, 1, step.shared, stream, params, nullptr);
    TORCH_CHECK(!failed, "trinix: a kernel could not be launched, CUDA error ", failed);
  }
}

c10::DispatchKeySet below_autograd(const at::Tensor& t) {
  return t.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
}

struct PairNode : public torch::autograd::Node {
  std::shared_ptr<const Pair> pair;
  std::vector<torch::autograd::SavedVariable> saved;
  void* stream;

  variable_list apply(variable_list&& grads) override {
    std::vector<at::Tensor> tensors;
    tensors.reserve(saved.size() + 1 + pair->backward.made.size());
    for (auto& one : saved) tensors.push_back(one.unpack(getptr()));
    const at::Tensor& dy = grads[0];
    if (!dy.defined()) return variable_list(1);
    const bool planned = !at::GradMode::is_enabled() && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
        below_autograd(dy) == pair->plain && dy.scalar_type() == pair->dy_dtype && dy.sizes() == pair->dy_sizes &&
        dy.strides() == pair->dy_strides && !(reinterpret_cast<uint64_t>(dy.const_data_ptr()) & 15);
    tensors.push_back(dy);
    if (!planned) return {otherwise(tensors)};
    const size_t first = tensors.size();
    run(pair->backward, tensors, stream);
    return {tensors[first]};
  }

  at::Tensor otherwise(const std::vector<at::Tensor>& tensors) {
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject* arguments = PyTuple_New(tensors.size());
    for (size_t i = 0; i < tensors.size(); i++) PyTuple_SET_ITEM(arguments, i, THPVariable_Wrap(tensors[i]));
    PyObject* result = PyObject_Call(pair->otherwise, arguments, nullptr);
    Py_DECREF(arguments);
    if (!result) {
      PyErr_Print();
      PyGILState_Release(gil);
      TORCH_CHECK(false, "trinix: the gradient's other way failed, see above");
    }
    at::Tensor dx = THPVariable_Unpack(result);
    Py_DECREF(result);
    PyGILState_Release(gil);
    return dx;
  }

  void release_variables() override {
    for (auto& one : saved) one.reset_data();
  }
  std::string name() const override { return "TrinixBackward"; }
};

// A node is counted by itself since PyTorch 2.13 or a little before, by a shared pointer in 2.11.
template <typename T>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, T>)
    return c10::make_intrusive<T>();
  else
    return std::shared_ptr<T>(new T(), [](T* node) { deleteNode(node); });
}

// ---- Python ------------------------------------------------------------------------------------------------------------

std::vector<int64_t> integers(PyObject* t) {
  std::vector<int64_t> out;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(t); i++) out.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(t, i)));
  return out;
}

// (made, steps): made (sizes, strides, dtype) each, steps (function, blocks, threads, shared, parameters) each, a parameter being
// the number of a tensor or the bytes of a scalar
void read_plan(Plan& plan, PyObject* t) {
  PyObject *made = PyTuple_GET_ITEM(t, 0), *steps = PyTuple_GET_ITEM(t, 1);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(made); i++) {
    PyObject* one = PyTuple_GET_ITEM(made, i);
    auto dtype = reinterpret_cast<THPDtype*>(PyTuple_GET_ITEM(one, 2))->scalar_type;
    plan.made.push_back({integers(PyTuple_GET_ITEM(one, 0)), integers(PyTuple_GET_ITEM(one, 1)), dtype});
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(steps); i++) {
    PyObject* one = PyTuple_GET_ITEM(steps, i);
    Step step;
    step.function = reinterpret_cast<void*>(PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(one, 0)));
    step.blocks = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(one, 1));
    step.threads = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(one, 2));
    step.shared = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(one, 3));
    PyObject* parameters = PyTuple_GET_ITEM(one, 4);
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(parameters); k++) {
      PyObject* p = PyTuple_GET_ITEM(parameters, k);
      uint64_t bits = 0;
      if (PyBytes_Check(p)) std::memcpy(&bits, PyBytes_AS_STRING(p), std::min<Py_ssize_t>(8, PyBytes_GET_SIZE(p)));
      step.tensor.push_back(PyBytes_Check(p) ? -1 : static_cast<int>(PyLong_AsLong(p)));
      step.scalar.push_back(bits);
    }
    TORCH_CHECK(step.tensor.size() <= 64, "trinix: a kernel of more than 64 parameters");
    plan.steps.push_back(std::move(step));
  }
}

void drop_pair(PyObject* capsule) {
  delete static_cast<std::shared_ptr<Pair>*>(PyCapsule_GetPointer(capsule, "pair"));
}

// make_pair(example, forward, backward, saved, dy (sizes, strides, dtype), otherwise)
PyObject* make_pair(PyObject*, PyObject* const* a, Py_ssize_t n) {
  try {
    auto pair = std::make_shared<Pair>();
    const at::Tensor& example = THPVariable_Unpack(a[0]);
    pair->forward.options = pair->backward.options = at::TensorOptions().device(example.device());
    pair->plain = below_autograd(example);
    read_plan(pair->forward, a[1]);
    read_plan(pair->backward, a[2]);
    for (int64_t i : integers(a[3])) pair->saved.push_back(static_cast<int>(i));
    pair->dy_sizes = integers(PyTuple_GET_ITEM(a[4], 0));
    pair->dy_strides = integers(PyTuple_GET_ITEM(a[4], 1));
    pair->dy_dtype = reinterpret_cast<THPDtype*>(PyTuple_GET_ITEM(a[4], 2))->scalar_type;
    pair->otherwise = a[5];
    Py_INCREF(a[5]);  // plans live as long as the process
    return PyCapsule_New(new std::shared_ptr<Pair>(pair), "pair", drop_pair);
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
    return nullptr;
  }
}

// call(pair, stream, x) -> y. The caller has checked that x lies as the pair's example does.
PyObject* call(PyObject*, PyObject* const* a, Py_ssize_t n) {
  try {
    auto& pair = *static_cast<std::shared_ptr<Pair>*>(PyCapsule_GetPointer(a[0], "pair"));
    void* stream = reinterpret_cast<void*>(PyLong_AsUnsignedLongLong(a[1]));
    const at::Tensor x = THPVariable_Unpack(a[2]);
    std::vector<at::Tensor> tensors{x};
    tensors.reserve(1 + pair->forward.made.size());
    {
      at::AutoDispatchBelowADInplaceOrView below;
      run(pair->forward, tensors, stream);
    }
    at::Tensor y = tensors[1];
    if (at::GradMode::is_enabled() && x.requires_grad()) {
      auto node = make_node<PairNode>();
      node->set_next_edges(torch::autograd::collect_next_edges(x));
      node->pair = pair;
      node->stream = stream;
      torch::autograd::set_history(y, node);
      for (int i : pair->saved) node->saved.emplace_back(i == 1 ? y : tensors[i], i == 1);
    }
    return THPVariable_Wrap(std::move(y));
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
    return nullptr;
  }
}

PyObject* set_launch(PyObject*, PyObject* address) {
  launch = reinterpret_cast<Launch>(PyLong_AsUnsignedLongLong(address));
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"make_pair", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(make_pair)), METH_FASTCALL, nullptr},
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, nullptr},
    {"set_launch", set_launch, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "trinix_native", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_trinix_native() { return PyModule_Create(&module); }
