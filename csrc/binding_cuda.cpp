// The Python module fp4._C_cuda. Importing it loads the library, whose operators then register themselves with torch
// (csrc/cuda/*_binding.cpp); the module itself is empty.
#include <Python.h>

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
