/* Steps of hw for the other layers: the leaves of paging, and virtual exits. */

#ifndef SOFTSGX_HW_H
#define SOFTSGX_HW_H

#include "speedups.h"

/* An integer of 64 bits without a sign; false with an error. */
bool unsigned_of(PyObject *number, uint64_t *value);

/* A leaf of a core's leaves: what C code has bound it to, or (NULL) it is another function. */
enum leaf { EBLOCK, ETRACK, TRY_EWB, TRY_ELDU };
struct bound_leaf {
    PyObject *function, *self;
};
int find_leaf(PyObject *leaves, enum leaf which, struct bound_leaf *leaf);

/* Call EBLOCK or ETRACK on a page. */
PyObject *call_on_page(PyObject *leaves, enum leaf which, SgxEpcPage *page);

/* Call a leaf with arguments that end with NULL. */
PyObject *call_leaf(PyObject *leaves, enum leaf leaf, PyObject *const args[7]);

/* As try_ewb() of a leaf that C code has bound: with a place for ciphertext and MAC that may be
 * SUCCESS, if they are there. */
struct ewb_call {
    SgxEpcPage *page, *va_page; /* borrowed, as all that is given */
    int64_t slot;
    char *place;
    int64_t flags; /* for SUCCESS; and a new reference: */
    PyObject *eid;
};
PyObject *ewb_to(PyObject *self, struct ewb_call *eviction);

/* As try_eldu() of such a leaf, of ciphertext and MAC in memory. */
struct eldu_call {
    SgxEpcPage *page, *secs, *va_page;
    PyObject *flags;
    uint64_t linaddr;
    int64_t slot;
    const char *sealed;
};
int eldu_from(PyObject *self, const struct eldu_call *loading);

/* As softsgx.hw.optimised.entry.try_virtual_exit(): 0, 1, or -1 with an error. */
int try_virtual_exit(PyObject *cpu);

#endif
