/* What the parts of the leaves in C share: leaves.c, tracking.c, ewb.c, eldu.c, cipher.c, versions.c. */

#ifndef LEAVES_H
#define LEAVES_H

#include "hw.h"
#include "paging.h"

/* SECINFO.FLAGS. */
#define SECINFO_PENDING 8
#define SECINFO_MODIFIED 16
#define SECINFO_PR 32

/* The processor of a leaf, borrowed; its machine, borrowed. */
PyObject *cpu_of(PyObject *self);
PyObject *machine_of(PyObject *self);

/* A machine's map of pages, a new reference, or NULL. */
PyObject *entries_of_machine(PyObject *hw);

/* The EPCM entry at an EPC address, and that of the VA page with a slot, borrowed; NULL: none, perhaps
 * with an error. */
EpcPage *entry_at(PyObject *pages, PyObject *addr);
EpcPage *entry_of_slot(PyObject *pages, int64_t slot_addr);

/* The same of an EPC page: it holds its entry from then on.  Each page of a core is one of its
 * machine, whose map never changes an entry for another. */
EpcPage *entry_of(PyObject *hw, SgxEpcPage *page);

bool right_arguments(Py_ssize_t count, Py_ssize_t wanted);

static inline bool
is_unlocked(const EpcPage *page)
{
    return page->lock == 0;
}

/* Whether a leaf can use a slot of this VA page, sharing the page with other leaves. */
static inline bool
is_usable_va(const EpcPage *page)
{
    return page != NULL && is_true(page->valid) && page->slots != NULL && !is_none(page->slots)
        && page->lock >= 0;
}

/* The bytes of a simulated machine's pages, borrowed; NULL: another store has them. */
static inline PyObject *
simulated_pages(PyObject *store)
{
    return is_exactly(store, (PyObject *)record_types[KIND_DictStore])
        ? ((DictStore *)store)->_pages
        : NULL;
}

/* EBLOCK and ETRACK, in the case that succeeds: 1; 0: another case; -1: an error. */
int try_eblock(EpcPage *page);
int try_etrack(EpcPage *page);

/* Cycles after which a page is tracked. */
int64_t tracked_age(void);

/* EWB of a page to a slot of a VA page, by their entries, either perhaps NULL: as try_ewb(). */
PyObject *ewb(PyObject *hw, EpcPage *page, EpcPage *va_page, struct ewb_call *eviction);

/* The entries of an ELDU, perhaps NULL, and its arguments. */
struct eldu {
    EpcPage *page, *secs, *va_page;
    int64_t slot;
    uint64_t linaddr, flags;
    PyObject *object, *type; /* the ciphertext is an object where `sealed` is NULL */
    const char *sealed;
};

/* Whether a page was loaded: as try_eldu(): 0, 1, or -1 with an error. */
int eldu(PyObject *hw, struct eldu *eldu);

/* The version in a slot of a VA page that has slots: 0, or -1 with an error. */
int get_version(const EpcPage *va_page, int64_t slot, uint64_t *version);
int put_version(EpcPage *va_page, int64_t slot, uint64_t version);

/* A version that no page of a paging key has had: 0, or -1 with an error. */
int next_version(PyObject *key, uint64_t *version);

/* MAC header: what EWB binds a page to beside its version. */
struct mac_header {
    uint64_t eid, linaddr, flags, reserved[13];
};
_Static_assert(sizeof(struct mac_header) == 128, "a MAC header has 128 bytes");

/* False with an error. */
bool fill_header(struct mac_header *header, PyObject *eid, uint64_t linaddr, uint64_t flags);

/* A machine's paging key. */
PyObject *paging_key(PyObject *hw);

/* As PagingKey.seal(): ciphertext and MAC; or None, if they are at `place`, which may be NULL. */
PyObject *seal(PyObject *key, uint64_t version, PyObject *plain, const struct mac_header *header,
               char *place);

/* The plaintext of ciphertext and MAC, which are memory, or (NULL) an object. */
PyObject *unseal(PyObject *key, uint64_t version, PyObject *object, const char *sealed,
                 const struct mac_header *header);

#endif
