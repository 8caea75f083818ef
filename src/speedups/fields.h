/* Records with integers of C among their fields: see docs/internals/compiled.md.
 *
 * A list has each field of a structure once: C(name) is a count, an integer of 64 bits with a sign;
 * O(name) is any object, or was never set.  fields.c makes a type of each structure, from which the
 * Python class of that name derives.
 */

#ifndef SOFTSGX_FIELDS_H
#define SOFTSGX_FIELDS_H

#define ATOMIC_COUNT(C, O) O(_latch) C(value)
#define COUNTERS(C, O)                                                                        \
    C(alloc_busy) C(alloc_interrupted) C(alloc_none) C(batches) C(claims) C(direct) C(dying)     \
    C(eldu) C(eldu_failed) C(etrack) C(ewb_failed) C(ewb_first) C(ewb_second) C(ewb_third)       \
    O(held) C(kept) C(kicks) C(leaked) C(lost) C(not_blocked) C(not_prepared) C(not_written)     \
    C(pcmd_truncated) C(prev_trk_incmpl) C(reclaimed) C(scanned) C(secs_in) C(secs_out)          \
    C(truncated) C(unsanitized) C(va_in) C(va_made) C(va_out) C(wakeups) C(young)
#define CROSSINGS(C, O) C(aex) C(eenter) C(eexit) C(eresume)
#define ENCLAVE_COUNTS(C, O)                                                                  \
    C(evictions) C(fault_ns) O(faults) C(kicks) C(reloads) C(touched)

#define STRUCTURES(X)                                                                            \
    X(AtomicCount, ATOMIC_COUNT) X(Counters, COUNTERS) X(Crossings, CROSSINGS)                   \
    X(EnclaveCounts, ENCLAVE_COUNTS)

#define COUNT_FIELD(name) int64_t name;
#define OBJECT_FIELD(name) PyObject *name;
#define STRUCTURE(type, fields)                                                                  \
    typedef struct { PyObject_HEAD fields(COUNT_FIELD, OBJECT_FIELD) } type;
STRUCTURES(STRUCTURE)
#undef STRUCTURE
#undef OBJECT_FIELD
#undef COUNT_FIELD

/* The type of a structure, borrowed: NULL, and no error, if there is none of that name. */
PyObject *structure_type(const char *name);

#endif
