// The Python module fp4._C_cpu. Importing it loads the library, whose operators then register themselves with torch
// (csrc/cpu/*_binding.cpp); the module itself is empty.
#include <Python.h>

PyMODINIT_FUNC PyInit__C_cpu(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
