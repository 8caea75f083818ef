/* What the parts of the leaves in C share: leaves.c, tracking.c. */

#ifndef LEAVES_H
#define LEAVES_H

#include "speedups.h"

/* The processor of a leaf, borrowed. */
PyObject *cpu_of(PyObject *self);

/* Its machine, borrowed; the machine's map of pages, a new reference, or NULL. */
PyObject *machine_of(PyObject *self, PyObject **pages);

/* The EPCM entry at an EPC address, borrowed; NULL: none, perhaps with an error. */
EpcPage *entry_at(PyObject *pages, PyObject *addr);

bool right_arguments(Py_ssize_t count, Py_ssize_t wanted);

/* etrack(addr): SUCCESS, or what the readable leaf does. */
PyObject *etrack(PyObject *self, PyObject *const *args, Py_ssize_t count);

#endif
