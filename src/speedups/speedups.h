/* The compiled core: shared declarations.  See docs/internals/compiled.md.
 *
 * Conventions: a function that returns PyObject * returns a new reference, or NULL with a Python
 * error set; one that returns int returns -1 with a Python error set.  Pointers to fields of
 * records are borrowed.  The extension is for one interpreter, so that its tables are static.
 */

#ifndef SOFTSGX_SPEEDUPS_H
#define SOFTSGX_SPEEDUPS_H

#include "records.h"

#define PAGE_BYTES 4096
#define PAGE_SHIFT 12
#define PAGE_MASK (~(uint64_t)(PAGE_BYTES - 1))
#define SLOT_BYTES 8
#define VA_SLOTS (PAGE_BYTES / SLOT_BYTES)
#define SEALED_BYTES (PAGE_BYTES + 16)  // ciphertext and MAC of a page
#define CHUNK_SHIFT 7  // of EnclavePages and SparseNumbers
#define CHUNK_MASK ((1 << CHUNK_SHIFT) - 1)

/* Read exactly ``wanted`` integers of 64 bits. */
int read_words(const char *name, PyObject *const *args, Py_ssize_t count, uint64_t *words,
               Py_ssize_t wanted);

/* Each source file adds its functions and types to the module. */
int add_instructions(PyObject *module);
int add_pages(PyObject *module);
int add_stops(PyObject *module);
int add_plain_faults(PyObject *module);
int add_records(PyObject *module);
int add_fields(PyObject *module);
int add_page_lists(PyObject *module);
int add_leaves(PyObject *module);
int add_cipher(PyObject *module);
int add_versions(PyObject *module);
int add_numbers(PyObject *module);
int add_places(PyObject *module);
int add_hiding(PyObject *module);
int add_page_maps(PyObject *module);
int add_methods(PyObject *module);
int add_virtual_exit(PyObject *module);
int add_enclave_pages(PyObject *module);
int add_tallies(PyObject *module);

/* Functions that C code falls back to, given with add_method(). */
enum method {
    CORE_FREE, CORE_MARK_RECLAIMABLE, CORE_RECLAIM,
    SWAP_PREPARE, SWAP_WRITE, SWAP_LOAD,
    PAGE_GET, PAGE_PUT, PAGE_AGE, PAGE_PREPARE, PAGE_BLOCK, PAGE_WRITE,
    RECLAIMER_BATCH, RECLAIMER_ISOLATE, RECLAIMER_PREPARE, RECLAIMER_BLOCK, RECLAIMER_WRITE,
    HANDLE, MM_FAULT,
    METHODS
};
extern PyObject *readable[METHODS];

/* As Runtime.now_ns(): 0, or -1 with an error. */
int now_ns(PyObject *runtime, int64_t *time);

#endif
