// _native: the kernels for NumPy users, without torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../core/isa.h"
#include "../core/run.h"

namespace py = pybind11;

namespace {

using bf::Dtype;

int cores() { return std::max(1u, std::thread::hardware_concurrency()); }

// Equal shares, one a thread; the core's cut is by shape, so the bits don't depend on how many there are.
const bf::Parallel make_parallel(int threads) {
  return {[](int64_t units, int64_t grain, bf::RangeFn fn, void* context, int wanted) {
            int64_t count = std::min<int64_t>(wanted > 0 ? wanted : cores(), (units + grain - 1) / grain), share = (units + count - 1) / count;
            std::vector<std::thread> helpers;
            for (int64_t begin = share; begin < units; begin += share) helpers.emplace_back(fn, begin, std::min(begin + share, units), context);
            fn(0, std::min(share, units), context);
            for (std::thread& helper : helpers) helper.join();
          },
          threads};
}

[[noreturn]] void refuse(const std::string& name, const std::string& why) { throw py::value_error("`" + name + "` " + why); }

std::string shape_text(const py::array& a) {
  std::string text = "(";
  for (py::ssize_t d = 0; d < a.ndim(); ++d) text += (d ? ", " : "") + std::to_string(a.shape(d));
  return text + (a.ndim() == 1 ? ",)" : ")");
}

struct Array {
  py::array array;   // kept alive; perhaps a copy
  Dtype dtype;
  std::vector<int64_t> sizes, strides;   // in elements
  const void* data() const { return array.data(); }
  int64_t dims() const { return static_cast<int64_t>(sizes.size()); }
};

Array take(const py::object& object, const char* name) {
  if (!py::isinstance<py::array>(object)) refuse(name, "must be a numpy array, got " + std::string(py::str(py::type::of(object))));
  Array a{py::reinterpret_borrow<py::array>(object), bf::kDtypes, {}, {}};
  const py::dtype dtype = a.array.dtype();
  const bool native = dtype.byteorder() == '=' || dtype.byteorder() == '|';
  if (native && dtype.kind() == 'f') a.dtype = dtype.itemsize() == 4 ? bf::kFloat32 : dtype.itemsize() == 8 ? bf::kFloat64 : dtype.itemsize() == 2 ? bf::kFloat16 : bf::kDtypes;
  if (a.dtype == bf::kDtypes) refuse(name, "must be float16, float32 or float64 in native byte order, got " + std::string(py::str(py::object(dtype))));
  for (py::ssize_t d = 0; d < a.array.ndim(); ++d) {
    if (a.array.strides(d) % dtype.itemsize()) {
      a.array = py::module_::import("numpy").attr("ascontiguousarray")(a.array);   // fields of records
      d = -1;
      a.sizes.clear();
      a.strides.clear();
      continue;
    }
    a.sizes.push_back(a.array.shape(d));
    a.strides.push_back(a.array.strides(d) / dtype.itemsize());
  }
  return a;
}

Array contiguous(const Array& a, const char* name) { return take(py::module_::import("numpy").attr("ascontiguousarray")(a.array), name); }

py::array result_array(Dtype dtype, std::vector<py::ssize_t> shape) {
  if (dtype == bf::kFloat64) return py::array_t<double>(std::move(shape));
  return py::array_t<float>(std::move(shape));
}

struct Pair {
  Array x, y;
  bf::Rows rows;
};

Pair pair_of(const py::object& x_object, const py::object& y_object, const char* x_name, const char* y_name, bool need_contiguous) {
  Pair pair{take(x_object, x_name), take(y_object, y_name), {}};
  Array &x = pair.x, &y = pair.y;
  if (x.dims() < 2) refuse(x_name, "must have a shape (N, ...) with rows of at least one element, got " + shape_text(x.array));
  if (y.sizes != x.sizes) refuse(y_name, "must have the shape " + shape_text(x.array) + " of `" + x_name + "`, got " + shape_text(y.array));
  if (y.dtype != x.dtype) refuse(y_name, std::string("must have the dtype of `") + x_name + "`");
  int64_t d = 1;
  for (int64_t i = 1; i < x.dims(); ++i) d *= x.sizes[i];
  if (d == 0) refuse(x_name, "must have rows of at least one element, got " + shape_text(x.array));
  const bool in_place = !need_contiguous && bf::dense(1, x.dims(), x.sizes.data(), x.strides.data()) &&
                        bf::same_walk(1, x.dims(), x.sizes.data(), x.strides.data(), y.strides.data());
  if (!in_place) {
    x = contiguous(x, x_name);
    y = contiguous(y, y_name);
  }
  pair.rows = {x.data(), y.data(), x.sizes[0], d, x.strides[0], y.strides[0], x.dtype};
  return pair;
}

py::array distance(const py::object& x, const py::object& x_hat, double p, const std::string& reduction, const py::object& weight, int threads) {
  const int norm = bf::norm_of(p);
  if (norm < 0) refuse("p", "must be 1, 2 or inf, got " + std::string(py::str(py::float_(p))));
  const int how = reduction == "mean" ? bf::kMean : reduction == "sum" ? bf::kSum : reduction == "norm" ? bf::kRoot : -1;
  if (how < 0) refuse("reduction", "must be 'mean', 'sum' or 'norm', got '" + reduction + "'");
  if (threads < 0) refuse("threads", "must be 0 (all cores) or more, got " + std::to_string(threads));
  Pair pair = pair_of(x, x_hat, "x", "x_hat", !weight.is_none());
  std::optional<Array> w;
  if (!weight.is_none()) {
    w = take(weight, "weight");
    const Dtype wanted = pair.rows.dtype == bf::kFloat64 ? bf::kFloat64 : bf::kFloat32;
    if (w->dims() != 1 || w->sizes[0] != pair.rows.d) refuse("weight", "must have the shape (" + std::to_string(pair.rows.d) + ",), got " + shape_text(w->array));
    if (w->dtype != wanted) w = take(w->array.attr("astype")(wanted == bf::kFloat64 ? "float64" : "float32"), "weight");
    w = contiguous(*w, "weight");
    if (!py::module_::import("numpy").attr("all")(w->array.attr("__ge__")(0)).cast<bool>()) refuse("weight", "must not be negative or NaN");
  }
  py::array out = result_array(pair.rows.dtype, {pair.rows.n});
  const bf::Parallel parallel = make_parallel(threads);
  const void* weights = w ? w->data() : nullptr;
  void* to = out.mutable_data();
  {
    py::gil_scoped_release release;
    bf::distance(parallel, pair.rows, weights, static_cast<bf::Norm>(norm), static_cast<bf::Reduction>(how), to);
  }
  return out;
}

py::tuple channel_stats(const py::object& object, int64_t dim, bool per_sample) {
  Array x = take(object, "x");
  const int64_t dims = x.dims();
  if (dims < 1 || dim < -dims || dim >= dims) refuse("dim", "must name a dimension of `x`, which has the shape " + shape_text(x.array) + ", got " + std::to_string(dim));
  if (dim < 0) dim += dims;
  if (per_sample && dim == 0) refuse("dim", "must not be the sample dimension 0 with per_sample");
  std::vector<py::ssize_t> shape;
  if (per_sample) shape.push_back(x.sizes[0]);
  shape.push_back(x.sizes[dim]);
  bf::StatsPlan plan = bf::plan_stats(dims, x.sizes.data(), x.strides.data(), dim, per_sample);
  if (!plan.ok) {
    // One copy, with the channel next to the samples.
    const int64_t to = std::min<int64_t>(dim, 1);
    x = contiguous(take(x.array.attr("swapaxes")(to, dim), "x"), "x");
    plan = bf::plan_stats(dims, x.sizes.data(), x.strides.data(), to, per_sample);
  }
  py::array linf = result_array(x.dtype, shape);
  py::array_t<double> l1(shape), l2(shape);
  const bf::Parallel parallel = make_parallel(0);
  void* most = linf.mutable_data();
  double *sum = l1.mutable_data(), *square = l2.mutable_data();
  const int64_t results = l2.size();
  {
    py::gil_scoped_release release;
    bf::channel_stats(parallel, plan, x.data(), x.dtype, per_sample, 7, most, sum, square);
    for (int64_t i = 0; i < results; ++i) square[i] = std::sqrt(square[i]);
  }
  return py::make_tuple(linf, l1, l2);
}

py::tuple feature_distance_loss(const py::object& features, const py::object& targets, const std::string& kind, std::optional<double> margin) {
  const int code = kind == "mse" ? bf::kMse : kind == "cosine" ? bf::kCosine : kind == "relative" ? bf::kRelative : -1;
  if (code < 0) refuse("kind", "must be 'mse', 'cosine' or 'relative', got '" + kind + "'");
  Pair pair = pair_of(features, targets, "features", "targets", true);
  py::array gradient = py::module_::import("numpy").attr("empty")(features.attr("shape"), features.attr("dtype"));
  py::array_t<double> values(std::vector<py::ssize_t>{pair.rows.n});
  const bf::Parallel parallel = make_parallel(0);
  void* g = gradient.mutable_data();
  double* to = values.mutable_data();
  {
    py::gil_scoped_release release;
    bf::feature_loss(parallel, pair.rows, static_cast<bf::Kind>(code), margin ? &*margin : nullptr, 1.0, g, pair.rows.d, to);
  }
  py::object shown = values;
  if (pair.rows.dtype != bf::kFloat64) shown = values.attr("astype")("float32");
  return py::make_tuple(shown, gradient);
}

py::dict cpu_features() {
  py::dict out;
  for (const char* name : {"sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"}) out[name] = bf::has_feature(name);
  out["machine_isa"] = bf::isa_name(bf::machine_isa());
  out["isa"] = bf::isa_name(bf::active_isa());
  out["cores"] = cores();
  return out;
}

py::dict build_info() {
  auto text_or_none = [](const std::string& text) -> py::object { return text.empty() ? py::object(py::none()) : py::object(py::str(text)); };
  py::dict out;
  out["version"] = BF_VERSION;
#if defined(__clang__)
  out["compiler"] = "clang " __VERSION__;
#else
  out["compiler"] = "gcc " __VERSION__;
#endif
  out["flags"] = BF_FLAGS;
  py::list isas;
  isas.append("scalar");
#ifdef BF_X86
  isas.append("avx2");
  isas.append("avx512");
#endif
  out["isas"] = isas;
  out["cuda"] = text_or_none(BF_CUDA_VERSION);
  const std::string archs = BF_CUDA_ARCHS;
  out["cuda_archs"] = archs.empty() ? py::object(py::none()) : py::object(py::str(archs).attr("split")(","));
  return out;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  bf::active_isa();   // a wrong BENIFUL_ISA makes the import fail with its own words
  m.doc() = "The kernels of beniful_fast for NumPy arrays (float16, float32, float64), without torch.";
  m.def("distance", &distance, "Row distance of x and x_hat, (N, ...) -> (N,).", py::arg("x"), py::arg("x_hat"), py::arg("p") = 2.0,
        py::arg("reduction") = "mean", py::arg("weight") = py::none(), py::arg("threads") = 0);
  m.def("channel_stats", &channel_stats, "(linf, l1, l2) over all but the channel, and the sample if per_sample.", py::arg("x"), py::arg("dim") = 1,
        py::arg("per_sample") = false);
  m.def("feature_distance_loss", &feature_distance_loss, "(loss of each sample, gradient with respect to features).", py::arg("features"),
        py::arg("targets"), py::arg("kind") = "mse", py::arg("margin") = py::none());
  m.def("cpu_features", &cpu_features, "What the CPU has, and the instruction set in use.");
  m.def("build_info", &build_info, "How the binary was built.");
}
