/* What the parts of the leaves in C share: leaves.c, tracking.c, cipher.c, versions.c. */

#ifndef LEAVES_H
#define LEAVES_H

#include "speedups.h"

/* The processor of a leaf, borrowed. */
PyObject *cpu_of(PyObject *self);

/* Its machine, borrowed; the machine's map of pages, a new reference, or NULL. */
PyObject *machine_of(PyObject *self, PyObject **pages);

/* The EPCM entry at an EPC address, borrowed; NULL: none, perhaps with an error. */
EpcPage *entry_at(PyObject *pages, PyObject *addr);

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

bool right_arguments(Py_ssize_t count, Py_ssize_t wanted);

/* etrack(addr): SUCCESS, or what the readable leaf does. */
PyObject *etrack(PyObject *self, PyObject *const *args, Py_ssize_t count);

#endif
