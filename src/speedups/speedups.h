/* The compiled core: shared declarations.  See docs/internals/compiled.md. */

#ifndef SOFTSGX_SPEEDUPS_H
#define SOFTSGX_SPEEDUPS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

/* Read exactly ``wanted`` integers of 64 bits; -1: a Python error is set. */
int read_words(const char *name, PyObject *const *args, Py_ssize_t count, uint64_t *words,
               Py_ssize_t wanted);

/* Each source file adds its functions and types to the module; -1: a Python error is set. */
int add_headers(PyObject *module);
int add_pages(PyObject *module);
int add_stops(PyObject *module);

#endif
