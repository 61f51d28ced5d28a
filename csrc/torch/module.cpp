// Importing the module registers the kernels (static initialisers); all it offers itself is the path in use.
#include <Python.h>

#include <exception>

#include "../core/isa.h"

static PyObject* isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(bf::isa_name(bf::active_isa()));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

static PyMethodDef methods[] = {{"isa", isa, METH_NOARGS, "The instruction set in use: scalar, avx2 or avx512."}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "CPU kernels of beniful_fast.", -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) {
  try {
    bf::active_isa();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
  return PyModule_Create(&definition);
}
