/* The compiled core: shared declarations.  See docs/internals/compiled.md. */

#ifndef SOFTSGX_SPEEDUPS_H
#define SOFTSGX_SPEEDUPS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* Each source file adds its functions and types to the module; -1: a Python error is set. */
int add_headers(PyObject *module);

#endif
