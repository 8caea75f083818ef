/* Records, attributes of other objects, and what Python code gives: see docs/internals/compiled.md. */

#ifndef SOFTSGX_RECORDS_H
#define SOFTSGX_RECORDS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>

#include "fields.h"

/* --- records ------------------------------------------------------------------------------------
 *
 * Classes with __slots__, declared in Python.  CPython sorts slots by name and puts them behind the
 * object's head; bind() checks that, and a class that is not bound has no instances here.
 */

#define ALLOC_SLOW_PATH(X)                                                                       \
    X(_core) X(_in_use) X(_ksgxd) X(_patience_passes) X(_pool) X(backing_error)
#define CLAIM(X) X(expired) X(group) X(loads) X(loads_left) X(prerequisites) X(since_ns)
#define DICT_STORE(X) X(_pages)
#define ENCLAVE_MODE(X)                                                                          \
    X(cet_slot) X(enclave) X(entry_epoch) X(frame) X(outside) X(secs) X(tcs) X(tcs_linaddr)
#define ENCLAVE_MM(X) X(enclave) X(mm)
#define ENCLAVE_PAGES(X) X(_count) X(chunks) X(latest)
#define ENCLAVE_MEMORY(X)                                                                        \
    X(_windows) X(fd) X(forbidden) X(former_jumps) X(jumps) X(key) X(marked) X(pages)            \
    X(trapped) X(users)
#define ENCLAVE_PAGE_TABLE(X)                                                                    \
    X(_entries) X(_installed) X(_mapped_in) X(_marked) X(_pages) X(_prots) X(_store) X(_used)    \
    X(index) X(is_readable) X(kick_all) X(memory_at) X(pager)
#define FAULT_EVENTS(X)                                                                          \
    X(epoll) X(images) X(in_a_row) X(latest) X(may_have_stopped) X(signals)
#define FAULTING_IMAGE(X)                                                                        \
    X(_deferred_calls) X(current) X(faulting) X(page_table) X(permits) X(watched)
#define FAULTING_THREAD(X)                                                                       \
    X(blocked) X(breakpoints) X(claim) X(cpu) X(group) X(image) X(resumes) X(running)            \
    X(spurious) X(unstoppable) X(watched)
#define FETCHES(X) X(_prot_at) X(_taken) X(due) X(rights)
#define INLINE_LOCK(X) X(_holder) X(_runtime) X(name)
#define NATIVE_STORE(X) X(_leaving) X(_pages)
#define PERMIT_TABLE(X)                                                                          \
    X(_anchor) X(_by_own_tid) X(_memory) X(_slots) X(_threads) X(address) X(mapped_at) X(words)
#define PINNED(X) X(data) X(index) X(pcmd_bytes)
#define PROCESSOR_MODE(X) X(hw) X(inside)
#define SLOT(X)                                                                                  \
    X(_at) X(_words) X(address) X(enclave) X(entry) X(gate_at) X(inside) X(memory) X(number)     \
    X(opened) X(stay) X(table) X(tcs)
#define SRCU(X) X(_drained) X(_gone) X(_index) X(_lock) X(_readers) X(_turn) X(_turning) X(_uninterleaved)
#define SWAP_ENTRIES(X) X(_numbers) X(_va_pages)
#define SWAP_ENTRY(X) X(index) X(slot)
#define UFFD_PAGER(X)                                                                            \
    X(_close_events) X(_dontwake) X(_failed) X(_fetches) X(_inject) X(_pagemap) X(_present)      \
    X(_running) X(_uffd) X(_watched)
#define UNSEEN_CROSSINGS(X) X(_exited) X(_open) X(_recorded) X(_unused)
#define VA_SLOT(X) X(number) X(page)
#define WAITS(X)                                                                                 \
    X(_ended_by) X(_keeps_exits) X(_looks) X(_received) X(_signals) X(asked) X(clock) X(faults)  \
    X(kept) X(look_ns) X(places) X(unreported)

#define CLAIMS(X) \
    X(_counters) X(_kept) X(_kept_prerequisites) X(_latch) X(_queue) X(_released) \
    X(_runtime) X(grace_ns) X(holder) X(pages) X(short_in)
#define DRIVER(X) \
    X(_compiled) X(_enclaves) X(_files) X(_group_of) X(_latch) X(_lifecycle_listeners) \
    X(_loaded) X(_node_of) X(_numbers) X(_openings) X(_optimised) X(_pids) X(backing) \
    X(core) X(defects) X(handle_fault) X(launch_control) X(launch_lock) X(page_type) \
    X(runtime) X(sgx2) X(tokens) X(tracer) X(unprivileged)
#define EPC_CORE(X) \
    X(_free) X(_held_latch) X(_high) X(_ksgxd) X(_low) X(_pool) X(_reclaimer) X(_sanitizer) \
    X(claims) X(counters) X(defects) X(epc_pages) X(hw) X(leaves) X(policy) X(reclaim_ns) \
    X(root) X(runtime) X(slowpath) X(tracer) X(va)
#define FREE_PAGES(X) \
    X(_counts_poisoned) X(_orders) X(_sections) X(_walk) X(_walks_without_end) X(count) \
    X(latest) X(nodes) X(records)
#define LRU(X) \
    X(_latch) X(pages)
#define MACHINE(X) \
    X(_bases) X(_eids) X(_sections) X(config) X(cpus) X(cpusvn) X(crossings) \
    X(einit_outcome) X(entropy_failures) X(feature_control) X(features) X(kernel) X(latch) \
    X(launch_key_hash) X(leaf_locks) X(leaves) X(measurements) X(microcode_svn) X(optimised) \
    X(pages) X(point) X(ram) X(runtime) X(secrets) X(store) X(tracer) X(virtual_cpus) \
    X(xsave)
#define NODE(X) \
    X(_fresh) X(_latch) X(_pages) X(epc_pages) X(freed) X(number) X(quarantine)
#define PAGING_KEY(X) \
    X(_aead) X(_key) X(_versions)
#define SECRETS(X) \
    X(_entropy) X(device_key) X(owner_epoch) X(paging) X(report_key_id) X(seal_fuses) \
    X(tee_report_key)

/* Those of a derived class come behind those of its base. */
#define FLAT_FILE(X) \
    X(_buffers) X(_counters) X(_flat) X(_layout) X(_sealed) X(_sharers) X(_tracer)
#define ENCLAVE_FILE(X)                                                                          \
    X(_latch) X(_uninterleaved) X(references) X(_driver) X(memory) X(_in_ioctl) X(enclave)
#define INLINE_RUNTIME(X)                                                                        \
    X(_closed) X(_current) X(_failure) X(_has_failures) X(_main) X(_names) X(_over) X(_tasks)    \
    X(_tie_break) X(_timers) X(_clock_ns) X(_lock_waiters) X(_main_is_last) X(_ready)            \
    X(_sleep_ns) X(random)
#define SEALED_PAGES(X) X(_blocks) X(_places) X(free)
#define SPARSE_NUMBERS(X) X(chunks) X(latest)
#define ENCLAVE(X) \
    X(_latch) X(_uninterleaved) X(references) X(_mm_version) X(_swap) X(allowed) \
    X(attributes) X(base) X(changed) X(counts) X(created) X(dead) X(driver) X(group) \
    X(initialized) X(lock) X(mms) X(modified) X(number) X(pages) X(refusal) X(size) X(srcu) \
    X(waiting) X(xfrm)
#define MM(X) \
    X(_ended) X(_latch) X(_pick) X(_starts) X(_uninterleaved) X(_vmas) X(found) \
    X(mmap_lock) X(name) X(notifiers) X(owner) X(pid) X(ptes) X(runtime) X(users)
#define COMPILED_SWAP(X) \
    X(_backing) X(_core) X(_counters) X(_file) X(_group) X(_late_backing) X(_leaves) \
    X(_pages) X(entries) X(lock) X(pin) X(va) X(_discards_failed) X(_frees_failed) \
    X(_ignores_poison) X(_kick) X(_leaks_slots) X(_secs_may_leave) X(_secs_page) \
    X(secs) X(secs_entry)

#define RECORDS(X)                                                                               \
    X(Claim, CLAIM) X(DictStore, DICT_STORE) X(EnclaveMode, ENCLAVE_MODE) X(Slot, SLOT)          \
    X(EnclaveMm, ENCLAVE_MM) X(EnclavePages, ENCLAVE_PAGES) X(InlineLock, INLINE_LOCK)           \
    X(Pinned, PINNED) X(AllocSlowPath, ALLOC_SLOW_PATH) X(SwapEntries, SWAP_ENTRIES)             \
    X(SwapEntry, SWAP_ENTRY) X(VaSlot, VA_SLOT) X(FlatFile, FLAT_FILE)                           \
    X(SealedPages, SEALED_PAGES) X(SparseNumbers, SPARSE_NUMBERS) X(Enclave, ENCLAVE) X(Mm, MM)  \
    X(EnclaveMemory, ENCLAVE_MEMORY) X(EnclavePageTable, ENCLAVE_PAGE_TABLE)                     \
    X(FaultEvents, FAULT_EVENTS) X(Fetches, FETCHES) X(NativeStore, NATIVE_STORE)                \
    X(UffdPager, UFFD_PAGER) X(Claims, CLAIMS) X(Driver, DRIVER) X(EpcCore, EPC_CORE)            \
    X(FreePages, FREE_PAGES) X(Lru, LRU) X(Machine, MACHINE) X(Node, NODE)                       \
    X(PagingKey, PAGING_KEY) X(Secrets, SECRETS) X(Srcu, SRCU) X(FaultingImage, FAULTING_IMAGE)  \
    X(FaultingThread, FAULTING_THREAD) X(InlineRuntime, INLINE_RUNTIME)                          \
    X(PermitTable, PERMIT_TABLE) X(ProcessorMode, PROCESSOR_MODE)                                \
    X(UnseenCrossings, UNSEEN_CROSSINGS) X(Waits, WAITS) X(EnclaveFile, ENCLAVE_FILE)

#define FIELD(name) PyObject *name;
#define STRUCTURE(type, fields) typedef struct { PyObject_HEAD fields(FIELD) } type;
RECORDS(STRUCTURE)
#undef STRUCTURE

/* Those of a class whose base is a structure of fields.h come behind the base's. */
#define DERIVED(X) X(CompiledSwap, COMPILED_SWAP, SWAP_COUNTS)
#define STRUCTURE(type, fields, base)                                                            \
    typedef struct { PyObject_HEAD STRUCTURE_FIELDS(base) fields(FIELD) } type;
DERIVED(STRUCTURE)
#undef STRUCTURE
#undef FIELD

#define KIND(type, ...) KIND_##type,
enum kind { RECORDS(KIND) DERIVED(KIND) STRUCTURES(KIND) KINDS };
#undef KIND

/* Of each kind the class, and the derived one that was asked for last. */
extern PyTypeObject *record_types[KINDS], *derived_types[KINDS];
bool is_derived(PyTypeObject *type, enum kind kind);

static inline bool
is_record(PyObject *object, enum kind kind)
{
    PyTypeObject *type = object == NULL ? NULL : Py_TYPE(object);

    return type != NULL
        && (type == record_types[kind] || type == derived_types[kind] || is_derived(type, kind));
}

/* The record of that kind, or NULL (without an error). */
#define AS(kind, object) ((kind *)as_record((PyObject *)(object), KIND_##kind))

static inline PyObject *
as_record(PyObject *object, enum kind kind)
{
    return is_record(object, kind) ? object : NULL;
}

/* References of records. */
#define HOLD(record) Py_INCREF((PyObject *)(record))
#define RELEASE(record) Py_XDECREF((PyObject *)(record))

/* Of a flag, or of a field that is True, False or another object. */
#define is_true(field) _Generic((field), bool: flag_is_true, default: object_is_true)(field)
#define is_false(field) _Generic((field), bool: flag_is_false, default: object_is_false)(field)

static inline bool
object_is_true(PyObject *field)
{
    return field == Py_True;
}

static inline bool
object_is_false(PyObject *field)
{
    return field == Py_False;
}

static inline bool
flag_is_true(bool field)
{
    return field;
}

static inline bool
flag_is_false(bool field)
{
    return !field;
}

static inline bool
is_none(PyObject *field)
{
    return field == Py_None;
}

/* Whether a field is an integer that fits; then it is stored. */
#define integer(field, value)                                                                    \
    _Generic((field), int64_t: read_count, uint8_t: read_byte, default: read_integer)(field, value)
bool read_integer(PyObject *field, int64_t *value);

static inline bool
read_count(int64_t field, int64_t *value)
{
    *value = field;
    return true;
}

static inline bool
read_byte(uint8_t field, int64_t *value)
{
    *value = field;
    return true;
}

/* A linear address of 64 bits; false, and no error, if the field is none. */
#define address(field, value)                                                                    \
    _Generic((field), uint64_t: copy_address, default: read_address)(field, value)
bool read_address(PyObject *field, uint64_t *value);

static inline bool
copy_address(uint64_t field, uint64_t *value)
{
    *value = field;
    return true;
}

/* Store a value in a field, which must be of a record with another reference. */
static inline void
set_field(PyObject **field, PyObject *value)
{
    PyObject *old = *field;

    Py_INCREF(value);
    *field = value;
    Py_XDECREF(old);
}

/* The same of a flag, or of a field that is True or False. */
#define set_flag(field, value)                                                                   \
    _Generic((field), bool *: store_flag, default: store_truth)(field, value)

static inline void
store_flag(bool *field, bool value)
{
    *field = value;
}

static inline void
store_truth(PyObject **field, bool value)
{
    set_field(field, value ? Py_True : Py_False);
}

/* Replace a reference by another one, which is taken over. */
static inline void
replace(PyObject **place, PyObject *value)
{
    PyObject *old = *place;

    *place = value;
    Py_XDECREF(old);
}

/* Beyond what the field takes is an OverflowError; it stays as it is. */
#define set_integer(field, value)                                                                \
    _Generic((field), int64_t *: put_count, uint8_t *: put_byte, default: put_object)(field, value)
#define add_to_field(field, change)                                                              \
    _Generic((field), int64_t *: add_to_count, default: add_to_object)(field, change)
int put_object(PyObject **field, int64_t value);
int put_byte(uint8_t *field, int64_t value);
int add_to_object(PyObject **field, int64_t change);
int no_count(void);

static inline int
put_count(int64_t *field, int64_t value)
{
    *field = value;
    return 0;
}

static inline int
add_to_count(int64_t *field, int64_t change)
{
    int64_t sum;

    if (__builtin_add_overflow(*field, change, &sum))
        return no_count();
    *field = sum;
    return 0;
}

/* --- other objects ------------------------------------------------------------------------------ */

#define NAMES(X)                                                                                 \
    X(_aead) X(_alloc_for_load) X(_ancestry) X(_at_signal) X(_base) X(_batch_pages) X(_borrowed) \
    X(_buffers) X(_ceiling_pages) X(_changed) X(_cipher) X(_clock_ns) X(_collecting)             \
    X(_conclude) X(_core) X(_counters) X(_deferred_calls) X(_elsewhere) X(_ended) X(_exited)     \
    X(_fetched) X(_file) X(_flat) X(_free) X(_gave_up) X(_group_of) X(_has_failures) X(_kept)    \
    X(_kick_cpus) X(_ksgxd) X(_late_backing) X(_leave) X(_leaves) X(_leaving) X(_load_by_leaf)   \
    X(_loaded) X(_lock_waiters) X(_low) X(_max_pages) X(_new_xstate) X(_next) X(_node_of)        \
    X(_oom_verdicts) X(_open) X(_orders) X(_own_tid) X(_pages) X(_permits) X(_policy) X(_pool)   \
    X(_position) X(_ready) X(_real_xstate) X(_recorded) X(_runtime) X(_scan_pages) X(_sealed)    \
    X(_server) X(_sharers) X(_skip) X(_slots) X(_store) X(_take_otherwise) X(_take_out)          \
    X(_timers) X(_transitions) X(_try_again) X(_unused) X(_versions) X(_waiters) X(_waits)       \
    X(_wake_waiters) X(aex) X(age) X(alloc_busy) X(append) X(args) X(asked) X(asleep) X(at_call) \
    X(background) X(backing_error) X(base) X(before_hide) X(block) X(blocked) X(breakpoints)     \
    X(called) X(calls) X(children) X(claim) X(claims) X(clear) X(core) X(counters) X(counts)     \
    X(cpu) X(cpuid_stubs) X(crossings) X(current) X(dead) X(decrypt) X(decrypt_into) X(defects)  \
    X(discard) X(driver) X(drop) X(eblock) X(enclave) X(encrypt) X(encrypt_into) X(end_borrowed) \
    X(entries) X(entry) X(epoll) X(eresume) X(etrack) X(ewbs) X(exits) X(failed) X(fault)        \
    X(faulted) X(faulting) X(faults) X(fill) X(find) X(first) X(flush) X(found) X(freed)         \
    X(freeze) X(from_bytes) X(func) X(gate_at) X(generation) X(get) X(going) X(gpr) X(group)     \
    X(guard) X(handle_fault) X(has_entry) X(has_reclaimable) X(has_writer) X(held) X(hide)       \
    X(hide_unmapped) X(hierarchy) X(hold) X(holder) X(hw) X(image) X(images) X(in_call)          \
    X(info_at) X(inject_at) X(inside) X(install) X(interrupt) X(keep) X(keep_kind) X(kept)       \
    X(kick) X(kicked) X(leave) X(leaves) X(limit_pages) X(little) X(loaded) X(lock) X(look_ns)   \
    X(lru) X(mark_reclaimable) X(may_have_stopped) X(memory) X(memory_fd) X(mid_call) X(mm)      \
    X(mmap_lock) X(mms) X(mode64) X(move_to_end) X(neighbours) X(next) X(next_or_fault) X(nodes) \
    X(now_ns) X(old) X(opened) X(outcomes) X(own_pages) X(page_changed) X(page_table) X(pages)   \
    X(paging) X(parts) X(pcmd_pages) X(peak_children) X(peak_pages) X(pending) X(permits) X(pid) \
    X(pin) X(pinned) X(places) X(policy) X(pop) X(prepare) X(process) X(promised) X(ptes) X(put) \
    X(raises_refused) X(reclaim_ahead) X(references) X(release_read) X(removed) X(report)        \
    X(request) X(reserved) X(resume) X(resume_thread) X(resumes) X(return_at_once) X(room)       \
    X(root) X(running) X(scanned) X(secrets) X(secs) X(served) X(settle) X(should_reclaim)       \
    X(show) X(shown) X(sigmask) X(signals) X(size) X(skip) X(slot) X(slot_loaded)                \
    X(slot_written) X(slowpath) X(space) X(spurious) X(stay) X(stays_inside) X(stop_at)          \
    X(stopped) X(store) X(subtree) X(table) X(tcs_linaddr) X(test_and_clear_accessed) X(tf)      \
    X(thread) X(threads) X(tid) X(tlb) X(to_bytes) X(tracer) X(try_charge) X(try_eldu)           \
    X(try_ewb) X(uncharge) X(unpin) X(unstoppable) X(unusual) X(usage_pages) X(used) X(users)    \
    X(usual) X(va) X(value) X(vdso) X(vdso_base) X(wait_for_page) X(waiting) X(watched) X(write) \
    X(xsave) X(zap)

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
#define SET_FLAG(kind, object, name, value)                                                      \
    (IS(kind, object) ? (set_flag(PLACE(kind, object, name), value), 0)                          \
                      : SET(object, name, (value) ? Py_True : Py_False))
#define GET_TRUTH(kind, object, name)                                                            \
    (IS(kind, object)                                                                            \
         ? truth_of(*PLACE(kind, object, name), (PyObject *)(object), names.name)                \
         : get_truth((PyObject *)(object), names.name))
#define truth_of(field, object, name)                                                            \
    _Generic((field), bool: flag_truth, default: object_truth)(field, object, name)

static inline int
flag_truth(bool field, PyObject *Py_UNUSED(object), PyObject *Py_UNUSED(name))
{
    return field;
}

/* A field that was never set is an AttributeError. */
static inline int
object_truth(PyObject *field, PyObject *object, PyObject *name)
{
    if (field == NULL)
        return get_truth(object, name);
    return is_true(field) ? 1 : is_false(field) ? 0 : PyObject_IsTrue(field);
}

/* Whether a field is an object, and whether one that has a length has anything in it: 0, 1, or -1
 * with an error. */
#define HAS(kind, object, name, value)                                                           \
    (IS(kind, object) && *PLACE(kind, object, name) != NULL                                      \
         ? *PLACE(kind, object, name) == (value)                                                 \
         : has((PyObject *)(object), names.name, value))
#define HAS_ANY(kind, object, name)                                                              \
    (IS(kind, object) && *PLACE(kind, object, name) != NULL                                      \
         ? any_in(*PLACE(kind, object, name))                                                    \
         : has_any((PyObject *)(object), names.name))
int has(PyObject *object, PyObject *name, PyObject *value);
int has_any(PyObject *object, PyObject *name);
int any_in(PyObject *container);

/* A field; one that was never set is an AttributeError. */
static inline PyObject *
reference(PyObject *field, PyObject *object, PyObject *name)
{
    if (field == NULL)
        return PyObject_GetAttr(object, name);
    Py_INCREF(field);
    return field;
}

/* The object of which `method` is that function: a new reference; NULL, and no error: of none. */
PyObject *bound_to(PyObject *method, PyObject *function);

/* Call a method with a number, whose reference is taken over (NULL with an error), and another
 * argument, or NULL: none. */
PyObject *call_with(PyObject *object, PyObject *name, PyObject *number, PyObject *other);

/* Call a method for its effect; for its truth: 0, 1, or -1 with an error. */
int effect(PyObject *result);
int is_so(PyObject *result);

/* Whether a method of a policy is that of a class of policies, when the class of the policy was asked
 * for it first: 0, 1, or -1 with an error. */
int has_method_of(PyObject *policy, PyObject *type, PyObject *name);

/* --- what Python code gives ---------------------------------------------------------------------
 *
 * Classes of which C code does what their methods do (exactly those classes, not derived ones), and
 * objects that it uses.
 */

#define GIVEN(X)                                                                                 \
    X(AsynchronousExits) X(BUS_ADRERR) X(Batch) X(CompiledCore) X(CompiledPage)                  \
    X(CompiledReclaimer) X(CompiledSwap) X(EnclaveMemory) X(EnclavePageTable) X(EpcBusy)         \
    X(EpcCgroup) X(Fault) X(FaultEvent) X(Fifo) X(FlatFile) X(InlineRuntime) X(InvalidTag)       \
    X(NOPAGE) X(NOT_TRACKED) X(NO_REPETITION) X(NativeStore) X(PF) X(PREV_TRK_INCMPL)            \
    X(PageRights) X(PagingKey) X(Permits) X(Policy) X(ProcessImage) X(ProgramThread) X(READ)     \
    X(REG) X(RETRY) X(SECS) X(SUCCESS) X(TRACKED_AGE) X(Tally) X(Transitions) X(UffdPager)       \
    X(VaArray) X(ZEROS) X(busy) X(child_types) X(closed_behind) X(eblock) X(etrack)              \
    X(exited_word) X(first_node) X(handle) X(is_running) X(kick_enclave) X(kick_image) X(labels) \
    X(load_ahead) X(major) X(mapped_in) X(monotonic_ns) X(own_group) X(page_ended) X(partial)    \
    X(reg) X(sigbus_stop) X(virtual_exit)

#define POINTER(name) PyObject *name;
struct given { GIVEN(POINTER) };
#undef POINTER
extern struct given given;

static inline bool
is_exactly(PyObject *object, PyObject *type)
{
    return type != NULL && object != NULL && (PyObject *)Py_TYPE(object) == type;
}

/* The end of what frees an instance of a type that was made from slots: its memory, and the reference
 * that it has to its type. */
void free_object(PyObject *self);

#endif
