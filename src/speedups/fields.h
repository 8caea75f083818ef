/* Records with integers of C among their fields: see docs/internals/compiled.md.
 *
 * A list has each field of a structure once: C(name) is a count, an integer of 64 bits with a sign;
 * U(name) is an address, one without a sign; B(name) is a bitmap of 512 bits, an integer in Python;
 * F(name) is a flag, a bool; N(name) is a number from 0 to 255; O(name) is any object, or was never
 * set.  Flags and such numbers are of one byte: they are the last of a list, to stay together.
 * fields.c makes a type of each structure, from which the Python class of that name derives.  LINKS
 * and ENTRY, the first of a list, are no fields: a PageList has the former, leaves the latter.
 */

#ifndef SOFTSGX_FIELDS_H
#define SOFTSGX_FIELDS_H

#define ATOMIC_COUNT(C, O, B, U, F, N) O(_latch) C(value)
#define COUNTERS(C, O, B, U, F, N)                                                               \
    C(alloc_busy) C(alloc_interrupted) C(alloc_none) C(batches) C(claims) C(direct) C(dying)     \
    C(eldu) C(eldu_failed) C(etrack) C(ewb_failed) C(ewb_first) C(ewb_second) C(ewb_third)       \
    O(held) C(kept) C(kicks) C(leaked) C(lost) C(not_blocked) C(not_prepared) C(not_written)     \
    C(pcmd_truncated) C(prev_trk_incmpl) C(reclaimed) C(scanned) C(secs_in) C(secs_out)          \
    C(truncated) C(unsanitized) C(va_in) C(va_made) C(va_out) C(wakeups) C(young)
#define CROSSINGS(C, O, B, U, F, N) C(aex) C(eenter) C(eexit) C(eresume)
#define ENCLAVE_COUNTS(C, O, B, U, F, N)                                                         \
    C(evictions) C(fault_ns) O(faults) C(kicks) C(reloads) C(touched)
#define ENCLAVE_PAGE(C, O, B, U, F, N)                                                           \
    O(enclave) O(epc) C(index) O(kind) O(reservation) F(being_reclaimed) F(touched) N(max_prot)
#define ENCLAVE_VMA(C, O, B, U, F, N) O(enclave) U(end) O(file) O(prot) U(start)
#define EPC_CGROUP(C, O, B, U, F, N)                                                             \
    O(_ancestry) C(_ceiling_pages) O(_dying) O(_max_pages) O(_order) O(_position) O(children)    \
    C(events) C(events_local) O(hierarchy) O(lru) O(name) C(own_pages) O(parent) O(path)         \
    C(peak_pages) O(removed) C(usage_pages)
#define EPC_PAGE(C, O, B, U, F, N)                                                               \
    O(addr) C(bepoch) O(enclave) U(linaddr) C(lock) O(pt) O(secs) O(slots) O(stored)             \
    F(blocked) F(modification_lock) F(modified) F(pending) F(pr) F(valid) N(rwx)
#define FLAT_BACKING(C, O, B, U, F, N)                                                           \
    O(kinds) O(limit_pages) C(pcmd_pages) C(reserved) O(sealed) O(sharers) O(unusual) O(usual)
#define KSGXD(C, O, B, U, F, N)                                                                  \
    O(_counters) O(_failed) O(_faults) O(_in_use) O(_lock) O(_oom_verdicts)                      \
    O(_patience_passes) O(_progress) O(_reclaim) O(_requests) O(_root) O(_runtime)               \
    O(_sanitizer) O(_scarce) O(_stopping) O(_task) O(_tracer) C(_waiters) O(_wake)               \
    C(generation) C(outcomes) O(working) F(_gave_up) F(asleep)
#define PLAIN_FAULTS(C, O, B, U, F, N)                                                           \
    O(_permits) O(_runtime) O(_server) O(_store) O(_transitions) O(_waits) C(served)
#define RESERVATION(C, O, B, U, F, N)                                                            \
    O(_file) C(_number) O(_pinned) O(_slot) O(_va_page) C(index)
#define RESIDENT_SECS(C, O, B, U, F, N)                                                          \
    O(base) O(cet_attributes) O(cet_leg_bitmap_offset) C(children) O(config_id) O(config_svn)    \
    O(context) O(crossings) O(cur_count) O(eid) O(epoch) O(etrack_running) O(flags)              \
    O(isv_ext_prod_id) O(isv_family_id) O(isv_prod_id) O(isv_svn) O(machine_check)               \
    O(measurement_lock) O(miscselect) O(mrenclave) O(mrsigner) O(padding) O(prev_count)          \
    O(size) O(ssa_frame_size) O(tracking_lock) O(virt_children) O(xfrm)
#define RW_LOCK(C, O, B, U, F, N)                                                                \
    O(_changed) O(_lock) C(_readers) O(_reading) O(_uninterleaved) C(_waiting) O(has_writer)
#define SGX_EPC_PAGE(C, O, B, U, F, N)                                                           \
    LINKS ENTRY O(addr) O(group) O(kind) O(lru) O(node) O(owner)                                 \
    F(blocked) F(free) F(kept) F(leaked) F(poisoned) F(tracked)
#define STORED_PAGE(C, O, B, U, F, N)                                                            \
    O(data) U(linaddr) C(maps) O(memory) O(page) F(poisoned) N(rights)
#define SWAP_COUNTS(C, O, B, U, F, N)                                                            \
    U(_base) C(children) C(etracks) C(ewbs) C(peak_children)
#define VA_ARRAY(C, O, B, U, F, N)                                                               \
    O(_made_by_count) O(_pages) O(group) O(level) O(lock) O(pin) C(promised) C(room) O(tree)     \
    C(used)
#define VA_PAGE(C, O, B, U, F, N)                                                                \
    LINKS O(accessed) O(array) O(epc) O(eviction) B(free) C(index) O(lost) O(parent) C(pins)     \
    B(stale)

#define STRUCTURES(X)                                                                            \
    X(AtomicCount, ATOMIC_COUNT) X(Counters, COUNTERS) X(Crossings, CROSSINGS)                   \
    X(EnclaveCounts, ENCLAVE_COUNTS) X(EnclavePage, ENCLAVE_PAGE) X(EnclaveVma, ENCLAVE_VMA)     \
    X(EpcCgroup, EPC_CGROUP) X(EpcPage, EPC_PAGE)                                                \
    X(FlatBacking, FLAT_BACKING) X(Ksgxd, KSGXD) X(PlainFaults, PLAIN_FAULTS)                    \
    X(Reservation, RESERVATION) X(ResidentSecs, RESIDENT_SECS) X(RwLock, RW_LOCK)                \
    X(SgxEpcPage, SGX_EPC_PAGE) X(StoredPage, STORED_PAGE) X(SwapCounts, SWAP_COUNTS)            \
    X(VaArray, VA_ARRAY) X(VaPage, VA_PAGE)

/* The neighbours and the list of a page, borrowed; NULL: it is on none. */
#define LINKS struct linked *before, *after; struct page_list *list;
typedef struct linked { PyObject_HEAD LINKS } Linked;

/* The EPCM entry of a page, an EpcPage, or NULL: leaves have not found it yet. */
#define ENTRY PyObject *entry;

#define BITMAP_WORDS 8

#define COUNT_FIELD(name) int64_t name;
#define OBJECT_FIELD(name) PyObject *name;
#define BITMAP_FIELD(name) uint64_t name[BITMAP_WORDS];
#define ADDRESS_FIELD(name) uint64_t name;
#define FLAG_FIELD(name) bool name;
#define BYTE_FIELD(name) uint8_t name;
#define STRUCTURE_FIELDS(fields)                                                                 \
    fields(COUNT_FIELD, OBJECT_FIELD, BITMAP_FIELD, ADDRESS_FIELD, FLAG_FIELD, BYTE_FIELD)
#define STRUCTURE(type, fields)                                                                  \
    typedef struct {                                                                             \
        PyObject_HEAD STRUCTURE_FIELDS(fields)                                                   \
    } type;
STRUCTURES(STRUCTURE)
#undef STRUCTURE
#undef ENTRY
#define ENTRY
#undef LINKS
#define LINKS

/* The type of a structure, borrowed: NULL, and no error, if there is none of that name. */
PyObject *structure_type(const char *name);

#endif
