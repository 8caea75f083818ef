/* Steps of the driver for the other files: pages and mappings of enclaves, faults. */

#ifndef SOFTSGX_DRIVER_H
#define SOFTSGX_DRIVER_H

#include "speedups.h"

/* The page of an enclave at an index, borrowed, of its pages: as EnclavePages.get(); NULL: there
 * is none, or an error is set. */
EnclavePage *page_at(PyObject *pages, int64_t index);

/* The swapping of a page's enclave, borrowed; NULL, and no error: none that C code knows. */
PyObject *swap_of(EnclavePage *page);

/* Whether an enclave is alive and no task holds its lock: 0, 1, or -1 with an error. */
int enclave_is_plain(PyObject *enclave);

/* The mapping that holds an address, as Mm.find(); a new reference. */
PyObject *mapping_at(PyObject *mm, uint64_t addr);

/* As Mm.fault(addr, access, task); whether that is the method of an address space: 0, 1, or
 * -1 with an error. */
int has_mm_fault(PyObject *mm);
PyObject *mm_fault(PyObject *mm, PyObject *addr, PyObject *access, PyObject *task);

/* As softsgx.driver.optimised.handle. */
PyObject *handle(PyObject *module, PyObject *const *args, Py_ssize_t count);

/* As the methods of PlainPage; 0, 1, or -1 with an error. */
int page_get(PyObject *page);
int page_put(PyObject *page);
int page_age(PyObject *page);
int page_prepare(PyObject *page);
int page_block(PyObject *page);
int page_write(PyObject *page);

#endif
