/* Steps of paging for the other files: EPC pages, swapping, VA slots, backing, batches. */

#ifndef SOFTSGX_PAGING_H
#define SOFTSGX_PAGING_H

#include "speedups.h"

/* Counts by label: add to one, 0 or -1 with an error; whether an object can have such counts. */
int count_label(PyObject *counts, PyObject *label, int64_t change);
bool has_counts(PyObject *object);

/* A free page, as PlainCore.alloc with reclaim=False; NULL with an error. */
PyObject *core_alloc(PyObject *core, PyObject *owner, PyObject *group, PyObject *kind,
                     PyObject *node, PyObject *claim);
int core_free(PyObject *core, PyObject *page);
int core_mark_reclaimable(PyObject *core, PyObject *page);

/* As EpcCore.reclaim(); the group is None for the root. */
PyObject *core_reclaim(PyObject *core, PyObject *group, int force);

/* As the methods of PlainSwap. */
PyObject *swap_prepare(PyObject *swap, int64_t index);
PyObject *swap_write(PyObject *swap, PyObject *page, PyObject *reservation);
PyObject *swap_load(PyObject *swap, PyObject *entry, PyObject *owner, PyObject *kind,
                    PyObject *node, PyObject *group, PyObject *claim);

/* As EnclaveSwap._start_epoch(): 1; 0: C code does not do it, and nothing has changed; or -1 with
 * an error.  As EnclaveSwap._kick_cpus(): 0, or -1. */
int swap_start_epoch(PyObject *swap);
int swap_kick_cpus(PyObject *swap);

/* Where the version of an evicted page is: a VA page, and its slot. */
struct place {
    VaPage *page;
    int64_t number;
};

/* The same without a SwapEntry: write() sets the place, with a reference to its page, if C code has
 * written the page, otherwise what PlainSwap.write() has returned: 0, or -1 with an error.  load() takes
 * the page's index, and NULL for what it then finds itself. */
struct written {
    struct place place;
    PyObject *entry;
};
int swap_write_to(PyObject *swap, PyObject *page, PyObject *reservation, struct written *written);
PyObject *swap_load_from(PyObject *swap, PyObject *entry, int64_t index, struct place *place,
                         PyObject *owner, PyObject *kind, PyObject *node, PyObject *group,
                         PyObject *claim);

/* Where an evicted page is: a SwapEntry, or None; and its inverse, which also takes the
 * slot alone. */
PyObject *entry_get(PyObject *swap, int64_t index);
int entry_put(PyObject *swap, int64_t index, PyObject *entry);
int entry_written(PyObject *swap, int64_t index, const struct written *written);
int entry_place(PyObject *swap, int64_t index, struct place *place);

/* VA slots and backing; as the methods of those names. */
int slot_loaded(PyObject *va, struct place *slot);
int slot_written(PyObject *va, struct place *slot);
VaPage *page_with_room(PyObject *va);
int alloc_slot(PyObject *va, VaPage *page, int64_t *number);
int reserve(PyObject *file, PyObject *flat, int64_t index);
int keep(PyObject *file, Reservation *reservation, PyObject *sealed);
int forget(PyObject *file, Counters *counters, int64_t index);

/* Where the number of a page is in a SparseNumbers, for use at once: NULL: it is 0, and has no
 * place; and put() of it, with what number_at() has found. */
int number_at(PyObject *numbers, int64_t index, uint32_t **number);
int number_put(PyObject *numbers, uint32_t *place, int64_t index, int64_t number);

/* As the methods of SealedPages. */
bool sealed_has_room(PyObject *pages, int64_t wanted);
int sealed_put(PyObject *pages, int64_t index, PyObject *sealed);
int sealed_drop(PyObject *pages, int64_t index);

/* Where ciphertext and MAC of a page are in memory, or will be, until it is released; the keeper
 * holds the buffer of the block. */
struct sealed_place {
    char *bytes; /* NULL: there is no place */
    PyObject *keeper;
    int64_t number, index;
};

/* Find a page, or a free place for one that has none: 1; 0: there is none; or -1 with an error. */
int sealed_find(PyObject *pages, int64_t index, struct sealed_place *place);
int sealed_room(PyObject *pages, int64_t index, struct sealed_place *place);

/* The page was written to the place that sealed_room() has found. */
int sealed_taken(PyObject *pages, struct sealed_place *place);
void sealed_release(struct sealed_place *place);

/* As FlatFile.kept(); as FlatFile.keep(), of a page that is at a place. */
int kept(PyObject *file, int64_t index, struct sealed_place *place, PyObject **flags);
int keep_at(PyObject *file, Reservation *reservation, struct sealed_place *place, int64_t flags,
            PyObject *eid);

/* The EPC address of a VA slot. */
PyObject *slot_address(SgxEpcPage *va_epc, int64_t number);

/* A reservation of C code, and its end, where a reference of it is released; where its slot is,
 * borrowed: false, and no error: C code does not know it. */
Reservation *new_reservation(void);
void end_reservation(PyObject *reservation);
bool reserved_slot(Reservation *reservation, struct place *place);

/* A batch, and its phases, as the methods of PlainReclaimer. */
PyObject *new_batch(int64_t scanned, int64_t freed);
int reclaimer_run(PyObject *reclaimer, PyObject *lru, int force, int64_t *scanned,
                  int64_t *evicted);
PyObject *reclaimer_batch(PyObject *reclaimer, PyObject *lru, int force);
PyObject *reclaimer_isolate(PyObject *lru, Py_ssize_t count);
PyObject *reclaimer_prepare(PyObject *reclaimer, PyObject *lru, PyObject *pages, int force);
PyObject *reclaimer_block(PyObject *reclaimer, PyObject *lru, PyObject *pages);
PyObject *reclaimer_write(PyObject *reclaimer, PyObject *lru, PyObject *pages);

#endif
