/* The compiled core: shared declarations.  See docs/internals/compiled.md.
 *
 * Conventions: a function that returns PyObject * returns a new reference, or NULL with a Python
 * error set; one that returns int returns -1 with a Python error set.  Pointers to fields of
 * records are borrowed.  The extension is for one interpreter, so that its tables are static.
 */

#ifndef SOFTSGX_SPEEDUPS_H
#define SOFTSGX_SPEEDUPS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>

#define PAGE_BYTES 4096
#define PAGE_SHIFT 12
#define SLOT_BYTES 8

/* Read exactly ``wanted`` integers of 64 bits. */
int read_words(const char *name, PyObject *const *args, Py_ssize_t count, uint64_t *words,
               Py_ssize_t wanted);

/* Each source file adds its functions and types to the module. */
int add_pages(PyObject *module);
int add_stops(PyObject *module);
int add_records(PyObject *module);
int add_leaves(PyObject *module);
int add_methods(PyObject *module);

/* --- records ------------------------------------------------------------------------------------
 *
 * Classes with __slots__, declared in Python.  CPython sorts slots by name and puts them behind the
 * object's head; bind() checks that, and a class that is not bound has no instances here.
 */

#define CLAIM(X) X(grace_ns) X(loads) X(loads_left) X(prerequisites) X(since_ns)
#define COUNTERS(X)                                                                              \
    X(alloc_busy) X(alloc_interrupted) X(alloc_none) X(batches) X(claims) X(direct) X(dying)     \
    X(eldu) X(eldu_failed) X(etrack) X(ewb_failed) X(ewb_first) X(ewb_second) X(ewb_third)       \
    X(held) X(kept) X(kicks) X(leaked) X(lost) X(not_blocked) X(not_prepared) X(not_written)     \
    X(pcmd_truncated) X(prev_trk_incmpl) X(reclaimed) X(scanned) X(secs_in) X(secs_out)          \
    X(truncated) X(unsanitized) X(va_in) X(va_made) X(va_out) X(wakeups) X(young)
#define ENCLAVE_COUNTS(X)                                                                        \
    X(evictions) X(fault_ns) X(faults) X(kicks) X(reloads) X(touched)
#define ENCLAVE_MM(X) X(enclave) X(mm)
#define ENCLAVE_PAGE(X)                                                                          \
    X(being_modified) X(being_reclaimed) X(enclave) X(entry) X(epc) X(index) X(kind)             \
    X(max_prot) X(reservation) X(swap) X(touched)
#define ENCLAVE_VMA(X) X(enclave) X(end) X(file) X(prot) X(start)
#define EPC_PAGE(X)                                                                              \
    X(addr) X(bepoch) X(blocked) X(enclave) X(linaddr) X(lock) X(modification_lock)              \
    X(modified) X(pending) X(pr) X(pt) X(rwx) X(secs) X(slots) X(valid)
#define INLINE_LOCK(X) X(_holder) X(_runtime) X(name)
#define PINNED(X) X(data) X(index) X(pcmd_bytes)
#define RESERVATION(X) X(index) X(pinned) X(slot)
#define RESIDENT_SECS(X)                                                                         \
    X(base) X(cet_attributes) X(cet_leg_bitmap_offset) X(children) X(config_id) X(config_svn)    \
    X(context) X(crossings) X(cur_count) X(eid) X(epoch) X(etrack_running) X(flags)              \
    X(isv_ext_prod_id) X(isv_family_id) X(isv_prod_id) X(isv_svn) X(machine_check)               \
    X(measurement_lock) X(miscselect) X(mrenclave) X(mrsigner) X(padding) X(prev_count)          \
    X(size) X(ssa_frame_size) X(tracking_lock) X(virt_children) X(xfrm)
#define SGX_EPC_PAGE(X)                                                                          \
    X(addr) X(blocked) X(free) X(group) X(kept) X(kind) X(leaked) X(lru) X(node) X(owner)        \
    X(poisoned) X(tracked)
#define SWAP_ENTRY(X) X(index) X(slot)
#define VA_PAGE(X)                                                                               \
    X(accessed) X(array) X(epc) X(eviction) X(free) X(index) X(lost) X(parent) X(pins) X(stale)
#define VA_SLOT(X) X(number) X(page)

/* Those of a derived class come behind those of its base. */
#define EPC_CGROUP(X) \
    X(_ancestry) X(_ceiling_pages) X(_dying) X(_max_pages) X(_order) X(_position) \
    X(children) X(events) X(events_local) X(hierarchy) X(lru) X(name) X(own_pages) \
    X(parent) X(path) X(peak_pages) X(removed) X(usage_pages)
#define VA_ARRAY(X) \
    X(_made_by_count) X(_pages) X(group) X(level) X(lock) X(pin) X(promised) X(room) \
    X(tree) X(used)
#define KSGXD(X) \
    X(_counters) X(_failed) X(_faults) X(_gave_up) X(_in_use) X(_lock) X(_oom_verdicts) \
    X(_patience_passes) X(_progress) X(_reclaim) X(_requests) X(_root) X(_runtime) \
    X(_sanitizer) X(_scarce) X(_stopping) X(_task) X(_tracer) X(_waiters) X(_wake) \
    X(asleep) X(generation) X(outcomes) X(working)
#define FLAT_BACKING(X) \
    X(kinds) X(limit_pages) X(reserved) X(sealed) X(sharers) X(unusual) X(usual)
#define FLAT_FILE(X) \
    X(_buffers) X(_counters) X(_flat) X(_layout) X(_sealed) X(_sharers) X(_tracer)
#define ENCLAVE(X) \
    X(_latch) X(_uninterleaved) X(references) X(_mm_version) X(_swap) X(allowed) \
    X(attributes) X(base) X(changed) X(counts) X(created) X(dead) X(driver) X(group) \
    X(initialized) X(lock) X(mms) X(number) X(pages) X(refusal) X(size) X(srcu) \
    X(waiting) X(xfrm)
#define MM(X) \
    X(_ended) X(_latch) X(_pick) X(_starts) X(_uninterleaved) X(_vmas) X(found) \
    X(mmap_lock) X(name) X(notifiers) X(owner) X(pid) X(ptes) X(runtime) X(users)
#define RW_LOCK(X) \
    X(_changed) X(_lock) X(_readers) X(_reading) X(_uninterleaved) X(_waiting) \
    X(has_writer)
#define ATOMIC_COUNT(X) \
    X(_latch) X(value)
#define COMPILED_SWAP(X) \
    X(_backing) X(_core) X(_counters) X(_file) X(_group) X(_late_backing) X(_leaves) \
    X(_pages) X(lock) X(pin) X(va) X(_base) X(_discards_failed) X(_frees_failed) \
    X(_ignores_poison) X(_kick) X(_leaks_slots) X(_secs_may_leave) X(_secs_page) \
    X(children) X(etracks) X(ewbs) X(peak_children) X(secs) X(secs_entry)

#define RECORDS(X)                                                                               \
    X(Claim, CLAIM) X(Counters, COUNTERS) X(EnclaveCounts, ENCLAVE_COUNTS)                       \
    X(EnclaveMm, ENCLAVE_MM) X(EnclavePage, ENCLAVE_PAGE) X(EnclaveVma, ENCLAVE_VMA)             \
    X(EpcPage, EPC_PAGE) X(InlineLock, INLINE_LOCK) X(Pinned, PINNED)                            \
    X(Reservation, RESERVATION) X(ResidentSecs, RESIDENT_SECS) X(SgxEpcPage, SGX_EPC_PAGE)       \
    X(SwapEntry, SWAP_ENTRY) X(VaPage, VA_PAGE) X(VaSlot, VA_SLOT) \
    X(EpcCgroup, EPC_CGROUP) X(VaArray, VA_ARRAY) X(Ksgxd, KSGXD) X(FlatBacking, FLAT_BACKING) \
    X(FlatFile, FLAT_FILE) X(Enclave, ENCLAVE) X(Mm, MM) \
    X(RwLock, RW_LOCK) X(AtomicCount, ATOMIC_COUNT) X(CompiledSwap, COMPILED_SWAP)

#define FIELD(name) PyObject *name;
#define STRUCTURE(type, fields) typedef struct { PyObject_HEAD fields(FIELD) } type;
RECORDS(STRUCTURE)
#undef STRUCTURE
#undef FIELD

#define KIND(type, fields) KIND_##type,
enum kind { RECORDS(KIND) KINDS };
#undef KIND

extern PyTypeObject *record_types[KINDS];

static inline bool
is_record(PyObject *object, enum kind kind)
{
    PyTypeObject *type = record_types[kind];

    return object != NULL && type != NULL
        && (Py_IS_TYPE(object, type) || PyType_IsSubtype(Py_TYPE(object), type));
}

/* The record of that kind, or NULL (without an error). */
#define AS(kind, object) ((kind *)(is_record(object, KIND_##kind) ? (object) : NULL))

/* References of records. */
#define HOLD(record) Py_INCREF((PyObject *)(record))
#define RELEASE(record) Py_XDECREF((PyObject *)(record))

static inline bool
is_true(PyObject *field)
{
    return field == Py_True;
}

static inline bool
is_false(PyObject *field)
{
    return field == Py_False;
}

static inline bool
is_none(PyObject *field)
{
    return field == Py_None;
}

/* Whether a field is an integer that fits; then it is stored. */
bool integer(PyObject *field, int64_t *value);

/* A linear address of 64 bits; false, and no error, if the field is none. */
bool address(PyObject *field, uint64_t *value);

/* Store a value in a field, which must be of a record with another reference. */
static inline void
set_field(PyObject **field, PyObject *value)
{
    PyObject *old = *field;

    Py_INCREF(value);
    *field = value;
    Py_XDECREF(old);
}

/* Replace a reference by another one, which is taken over. */
static inline void
replace(PyObject **place, PyObject *value)
{
    PyObject *old = *place;

    *place = value;
    Py_XDECREF(old);
}

int set_integer(PyObject **field, int64_t value);
int add_to_field(PyObject **field, int64_t change);

/* --- other objects ------------------------------------------------------------------------------ */

#define NAMES(X) \
    X(_aead) X(_ancestry) X(_base) X(_buffers) X(_ceiling_pages) X(_core) X(_counters) \
    X(_file) X(_flat) X(_free) X(_gave_up) X(_ksgxd) X(_late_backing) X(_leave) X(_leaves) \
    X(_load_by_leaf) X(_low) X(_max_pages) X(_oom_verdicts) X(_pages) X(_policy) X(_pool) \
    X(_refused_alloc) X(_sealed) X(_sharers) X(_skip) X(_versions) X(_waiters) \
    X(_wake_waiters) X(age) X(append) X(asleep) X(backing_error) X(base) X(block) \
    X(children) X(claim) X(claims) X(clear) X(core) X(counters) X(counts) X(dead) X(decrypt) \
    X(driver) X(drop) X(eblock) X(encrypt) X(ewbs) X(fill) X(find) X(first) X(found) \
    X(freed) X(freeze) X(generation) X(group_and_node) X(has_reclaimable) X(has_writer) \
    X(hierarchy) X(holder) X(hw) X(install) X(keep) X(leaves) X(limit_pages) X(loaded) \
    X(lock) X(lru) X(mark_reclaimable) X(mmap_lock) X(mms) X(move_to_end) X(neighbours) \
    X(nodes) X(old) X(outcomes) X(own_pages) X(pages) X(paging) X(peak_children) \
    X(peak_pages) X(policy) X(pop) X(popitem) X(popleft) X(prepare) X(promised) X(ptes) \
    X(put) X(reclaim_ahead) X(references) X(removed) X(request) X(reserved) X(room) X(root) \
    X(secrets) X(secs) X(should_reclaim) X(size) X(slot_loaded) X(slot_written) X(slowpath) \
    X(store) X(test_and_clear_accessed) X(try_charge) X(try_eldu) X(try_ewb) X(uncharge) \
    X(unusual) X(usage_pages) X(used) X(users) X(usual) X(va) X(value) X(waiting) X(write) \
    X(zap)

#define NAME(name) PyObject *name;
struct names { NAMES(NAME) };
#undef NAME
extern struct names names;

#define GET(object, name) PyObject_GetAttr((PyObject *)(object), names.name)
#define SET(object, name, value) PyObject_SetAttr((PyObject *)(object), names.name, value)
#define CALL(object, name, ...)                                                                  \
    PyObject_CallMethodObjArgs((PyObject *)(object), names.name, __VA_ARGS__)
#define CALL0(object, name) PyObject_CallMethodObjArgs((PyObject *)(object), names.name, NULL)

/* An integer attribute: 0, or -1 with an error. */
int get_integer(PyObject *object, PyObject *name, int64_t *value);
int get_address(PyObject *object, PyObject *name, uint64_t *value);
int put_integer(PyObject *object, PyObject *name, int64_t value);
int add_integer(PyObject *object, PyObject *name, int64_t change);

/* The truth of an attribute: 0, 1, or -1 with an error. */
int get_truth(PyObject *object, PyObject *name);

/* The same of an object that is expected to be a record, and otherwise has such an attribute. */
#define IS(kind, object) is_record((PyObject *)(object), KIND_##kind)
#define PLACE(kind, object, name) (&((kind *)(object))->name)
#define GETF(kind, object, name)                                                                 \
    (IS(kind, object) ? reference(*PLACE(kind, object, name), (PyObject *)(object), names.name)  \
                      : GET(object, name))
#define SETF(kind, object, name, value)                                                          \
    (IS(kind, object) ? (set_field(PLACE(kind, object, name), value), 0)                         \
                      : SET(object, name, value))
#define GET_INTEGER(kind, object, name, value)                                                   \
    (IS(kind, object) && integer(*PLACE(kind, object, name), value)                              \
         ? 0                                                                                     \
         : get_integer((PyObject *)(object), names.name, value))
#define GET_ADDRESS(kind, object, name, value)                                                   \
    (IS(kind, object) && address(*PLACE(kind, object, name), value)                              \
         ? 0                                                                                     \
         : get_address((PyObject *)(object), names.name, value))
#define PUT_INTEGER(kind, object, name, value)                                                   \
    (IS(kind, object) ? set_integer(PLACE(kind, object, name), value)                            \
                      : put_integer((PyObject *)(object), names.name, value))
#define ADD_INTEGER(kind, object, name, change)                                                  \
    (IS(kind, object) ? add_to_field(PLACE(kind, object, name), change)                          \
                      : add_integer((PyObject *)(object), names.name, change))
#define GET_TRUTH(kind, object, name)                                                            \
    (IS(kind, object) && *PLACE(kind, object, name) != NULL                                      \
         ? PyObject_IsTrue(*PLACE(kind, object, name))                                           \
         : get_truth((PyObject *)(object), names.name))

/* A field; one that was never set is an AttributeError. */
static inline PyObject *
reference(PyObject *field, PyObject *object, PyObject *name)
{
    if (field == NULL)
        return PyObject_GetAttr(object, name);
    Py_INCREF(field);
    return field;
}

/* Call a method for its effect. */
int effect(PyObject *result);

/* --- what Python code gives ---------------------------------------------------------------------
 *
 * Classes of which C code does what their methods do (exactly those classes, not derived ones), and
 * objects that it uses.
 */

#define GIVEN(X)                                                                                 \
    X(CompiledCore) X(CompiledPage) X(CompiledSwap) X(EpcCgroup) X(FlatFile) X(InvalidTag)       \
    X(Ksgxd) X(PagingKey) X(VaArray) X(Policy) X(child_types) X(labels) X(NOPAGE) X(NOT_TRACKED) \
    X(TRACKED_AGE) X(SUCCESS) X(Fault)         \
    X(eblock) X(load_ahead) X(major) X(page_ended)

#define POINTER(name) PyObject *name;
struct given { GIVEN(POINTER) };
#undef POINTER
extern struct given given;

static inline bool
is_exactly(PyObject *object, PyObject *type)
{
    return type != NULL && (PyObject *)Py_TYPE(object) == type;
}

/* --- steps that others build on ----------------------------------------------------------------- */

/* paging: a free page, as PlainCore.alloc with reclaim=False; NULL with an error. */
PyObject *core_alloc(PyObject *core, PyObject *owner, PyObject *group, PyObject *kind,
                     PyObject *node, PyObject *claim);
int core_free(PyObject *core, PyObject *page);
int core_mark_reclaimable(PyObject *core, PyObject *page);

/* paging: as the methods of PlainSwap. */
PyObject *swap_prepare(PyObject *swap, PyObject *index);
PyObject *swap_write(PyObject *swap, PyObject *page, PyObject *reservation);
PyObject *swap_load(PyObject *swap, PyObject *entry, PyObject *owner, PyObject *kind,
                    PyObject *node, PyObject *group, PyObject *claim);

/* paging: VA slots and backing; as the methods of those names. */
int slot_loaded(PyObject *va, VaSlot *slot);
int slot_written(PyObject *va, VaSlot *slot);
VaPage *page_with_room(PyObject *pages);
PyObject *alloc_slot(PyObject *va, PyObject *pages, VaPage *page);
PyObject *reserve(PyObject *file, PyObject *flat, PyObject *buffers, PyObject *index);
int keep(PyObject *file, PyObject *pinned, PyObject *sealed);
int kept(PyObject *file, PyObject *index, PyObject **sealed, PyObject **flags);
int forget(PyObject *file, Counters *counters, PyObject *index);

/* paging: the phases of a batch, as the methods of PlainReclaimer. */
PyObject *reclaimer_prepare(PyObject *reclaimer, PyObject *lru, PyObject *pages, int force);
PyObject *reclaimer_block(PyObject *reclaimer, PyObject *lru, PyObject *pages);
PyObject *reclaimer_write(PyObject *reclaimer, PyObject *lru, PyObject *pages);

/* driver: whether an enclave is alive and no task holds its lock: 0, 1, or -1 with an error. */
int enclave_is_plain(PyObject *enclave);

/* driver: as softsgx.driver.optimised.handle. */
PyObject *handle(PyObject *module, PyObject *const *args, Py_ssize_t count);

/* driver: as the methods of PlainPage; 0, 1, or -1 with an error. */
int page_get(PyObject *page);
int page_put(PyObject *page);
int page_age(PyObject *page);
int page_prepare(PyObject *page);
int page_block(PyObject *page);
int page_write(PyObject *page);

/* Functions that C code falls back to, given with add_method(). */
enum method {
    CORE_FREE, CORE_MARK_RECLAIMABLE,
    SWAP_PREPARE, SWAP_WRITE, SWAP_LOAD,
    PAGE_GET, PAGE_PUT, PAGE_AGE, PAGE_PREPARE, PAGE_BLOCK, PAGE_WRITE,
    RECLAIMER_PREPARE, RECLAIMER_BLOCK, RECLAIMER_WRITE,
    HANDLE,
    METHODS
};
extern PyObject *readable[METHODS];

#endif
