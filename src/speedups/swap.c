/* Evictions of one enclave: as softsgx.paging.optimised.PlainSwap and what it calls. */

#include "hw.h"
#include "paging.h"

/* Reservations that are used again, with None in their fields. */
#define SPARE 16
static PyObject *spare[SPARE];
static int spares;

static void
empty(Reservation *reservation)
{
    set_field(&reservation->_file, Py_None);
    set_field(&reservation->_pinned, Py_None);
    set_field(&reservation->_slot, Py_None);
    set_field(&reservation->_va_page, Py_None);
}

Reservation *
new_reservation(void)
{
    Reservation *reservation;

    while (spares > 0) {
        reservation = (Reservation *)spare[--spares];
        if (Py_IS_TYPE((PyObject *)reservation, record_types[KIND_Reservation]))
            return reservation;
        RELEASE(reservation); /* of a class that was bound before */
    }
    reservation = (Reservation *)PyType_GenericAlloc(record_types[KIND_Reservation], 0);
    if (reservation != NULL)
        empty(reservation);
    return reservation;
}

void
end_reservation(PyObject *object)
{
    if (Py_REFCNT(object) == 1 && Py_IS_TYPE(object, record_types[KIND_Reservation])) {
        empty((Reservation *)object);
        if (spares < SPARE) {
            spare[spares++] = object;
            return;
        }
    }
    Py_DECREF(object);
}

/* What swap_prepare needs, and whether there is all of it. */
struct out {
    PyObject *file, *flat, *va, *slowpath;
    VaPage *va_page;
};

static int
gather(PyObject *swap, struct out *out)
{
    PyObject *limit, *sealed, *core;
    int64_t reserved;
    int late = GET_TRUTH(CompiledSwap, swap, _late_backing), plain;

    if (late < 0 || (out->file = GETF(CompiledSwap, swap, _file)) == NULL || (out->va = GETF(CompiledSwap, swap, va)) == NULL)
        return -1;
    if (late || !is_exactly(out->file, given.FlatFile) || !is_exactly(out->va, given.VaArray)
        || record_types[KIND_Reservation] == NULL)
        return 0;
    if ((out->flat = GETF(FlatFile, out->file, _flat)) == NULL
        || GET_INTEGER(FlatBacking, out->flat, reserved, &reserved) < 0
        || (core = GETF(CompiledSwap, swap, _core)) == NULL)
        return -1;
    out->slowpath = GETF(EpcCore, core, slowpath);
    Py_DECREF(core);
    if (out->slowpath == NULL || (limit = GETF(FlatBacking, out->flat, limit_pages)) == NULL)
        return -1;
    plain = is_none(limit);
    Py_DECREF(limit);
    if ((sealed = GETF(FlatFile, out->file, _sealed)) == NULL)
        return -1;
    plain = plain && sealed_has_room(sealed, reserved + 1);
    Py_DECREF(sealed);
    if (plain)
        out->va_page = page_with_room(out->va);
    if (PyErr_Occurred())
        return -1;
    return plain && out->va_page != NULL;
}

/* Backing could be reserved: most often it could before. */
static int
forget_backing_error(PyObject *slowpath)
{
    AllocSlowPath *record = AS(AllocSlowPath, slowpath);
    PyObject *nothing;
    int status;

    if (record != NULL && record->backing_error != NULL
        && PyUnicode_Check(record->backing_error)
        && PyUnicode_GetLength(record->backing_error) == 0)
        return 0;
    if ((nothing = PyUnicode_FromString("")) == NULL)
        return -1;
    status = SET(slowpath, backing_error, nothing);
    Py_DECREF(nothing);
    return status;
}

/* As SwapSpace.prepare(). */
PyObject *
swap_prepare(PyObject *swap, int64_t index)
{
    struct out out = {0};
    PyObject *result = NULL, *number;
    Reservation *reservation = NULL;
    int plain = gather(swap, &out);

    if (plain < 0)
        goto done;
    if (!plain) {
        number = PyLong_FromLongLong(index);
        if (number != NULL)
            result = PyObject_CallFunctionObjArgs(readable[SWAP_PREPARE], swap, number, NULL);
        Py_XDECREF(number);
        goto done;
    }
    if ((reservation = new_reservation()) == NULL)
        goto done;
    if (reserve(out.file, out.flat, index) < 0 || forget_backing_error(out.slowpath) < 0
        || alloc_slot(out.va, out.va_page, &reservation->_number) < 0) {
        RELEASE(reservation);
        goto done;
    }
    reservation->index = index;
    set_field(&reservation->_file, out.file);
    set_field(&reservation->_va_page, (PyObject *)out.va_page);
    result = (PyObject *)reservation;
done:
    RELEASE(out.va_page);
    Py_XDECREF(out.slowpath);
    Py_XDECREF(out.flat);
    Py_XDECREF(out.va);
    Py_XDECREF(out.file);
    return result;
}

/* The EPC address of a slot. */
PyObject *
slot_address(SgxEpcPage *va_epc, int64_t number)
{
    int64_t base;

    if (integer(va_epc->addr, &base))
        return PyLong_FromLongLong(base + number * SLOT_BYTES);
    PyErr_SetString(PyExc_TypeError, "a VA slot without an address");
    return NULL;
}

/* An EWB, and what comes of it. */
struct out_page {
    PyObject *swap, *file;
    SgxEpcPage *page, *va_epc;
    Reservation *reservation;
    struct place slot;
    struct ewb_call eviction;
    struct sealed_place place;
    int64_t tries;
};

/* Keep a page that EWB has written to its place, or (a tuple) to an object. */
static int
keep_page(struct out_page *out, PyObject *sealed)
{
    return PyTuple_Check(sealed) ? keep(out->file, out->reservation, sealed)
                                 : keep_at(out->file, out->reservation, &out->place,
                                           out->eviction.flags, out->eviction.eid);
}

/* The last EWB has succeeded: end the eviction: 0, or -1 with an error. */
static int
conclude(struct out_page *out, PyObject *sealed)
{
    PyObject *swap = out->swap, *va = GETF(CompiledSwap, swap, va);
    PyObject *object = GETF(CompiledSwap, swap, _counters);
    Counters *counters = AS(Counters, object);
    int64_t *succeeded;
    int status = -1;

    if (va == NULL || counters == NULL) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "the core's counters are no Counters");
        goto done;
    }
    succeeded = out->tries == 1 ? &counters->ewb_first
        : out->tries == 2       ? &counters->ewb_second
                                : &counters->ewb_third;
    if (ADD_INTEGER(SwapCounts, swap, ewbs, out->tries) == 0 && add_to_field(succeeded, 1) == 0
        && keep_page(out, sealed) == 0 && slot_written(va, &out->slot) == 0)
        status = ADD_INTEGER(SwapCounts, swap, children, -1);
done:
    Py_XDECREF(object);
    Py_XDECREF(va);
    return status;
}

/* An EWB: what the leaf has returned, or SUCCESS, if ciphertext and MAC are at the place. */
static PyObject *
try_ewb(struct out_page *out)
{
    PyObject *leaves = GETF(CompiledSwap, out->swap, _leaves), *slot_addr, *contents;
    PyObject *sealed = NULL;
    struct bound_leaf leaf = {0};

    if (leaves == NULL || find_leaf(leaves, TRY_EWB, &leaf) < 0)
        goto done;
    if (leaf.self == NULL) {
        slot_addr = slot_address(out->va_epc, out->eviction.slot);
        if (slot_addr != NULL)
            sealed = PyObject_CallFunctionObjArgs(leaf.function, out->page->addr, slot_addr, NULL);
        Py_XDECREF(slot_addr);
        goto done;
    }
    contents = GETF(FlatFile, out->file, _sealed);
    if (contents != NULL && sealed_room(contents, out->reservation->index, &out->place) >= 0) {
        out->eviction.page = out->page;
        out->eviction.va_page = out->va_epc;
        out->eviction.place = out->place.bytes;
        sealed = ewb_to(leaf.self, &out->eviction);
    }
    Py_XDECREF(contents);
done:
    Py_XDECREF(leaf.function);
    Py_XDECREF(leaves);
    return sealed;
}

/* EWB once more, after other tasks may have run. */
static PyObject *
ewb_again(struct out_page *out)
{
    sealed_release(&out->place);
    out->tries++;
    return try_ewb(out);
}

/* As PlainSwap._try_again(), in Python. */
static PyObject *
try_readably(struct out_page *out)
{
    PyObject *slot_addr = slot_address(out->va_epc, out->eviction.slot);
    PyObject *again = NULL, *sealed = NULL;
    long long tries;

    sealed_release(&out->place);
    if (slot_addr != NULL)
        again = CALL(out->swap, _try_again, out->page->addr, slot_addr, NULL);
    if (again != NULL && PyArg_ParseTuple(again, "OL", &sealed, &tries)) {
        Py_INCREF(sealed);
        out->tries = tries;
    }
    Py_XDECREF(again);
    Py_XDECREF(slot_addr);
    return sealed;
}

/* EWB of a page, and again where the first is too early: as PlainSwap._try_again(). */
static PyObject *
evict(struct out_page *out)
{
    PyObject *sealed = ewb_again(out);
    int begun;

    if (sealed == NULL || sealed != given.NOT_TRACKED)
        return sealed;
    Py_DECREF(sealed);
    begun = swap_start_epoch(out->swap);
    if (begun <= 0)
        return begun < 0 ? NULL : try_readably(out);
    sealed = ewb_again(out);
    if (sealed == NULL || sealed != given.NOT_TRACKED)
        return sealed;
    Py_DECREF(sealed);
    return swap_kick_cpus(out->swap) < 0 ? NULL : ewb_again(out);
}

/* As PlainSwap.write(): see paging.h. */
int
swap_write_to(PyObject *swap, PyObject *page, PyObject *reservation, struct written *written)
{
    struct out_page out = {
        .swap = swap,
        .page = AS(SgxEpcPage, page),
        .reservation = AS(Reservation, reservation),
    };
    PyObject *sealed = NULL, *number = NULL;
    int64_t children;
    int status = -1;

    written->place.page = NULL;
    written->entry = NULL;
    if (out.reservation != NULL && reserved_slot(out.reservation, &out.slot))
        out.va_epc = AS(SgxEpcPage, out.slot.page->epc);
    if (out.page == NULL || out.va_epc == NULL || !is_false(out.page->poisoned)
        || (is_none(out.reservation->_pinned) && is_none(out.reservation->_file)))
        goto readably;
    out.eviction.slot = out.slot.number;
    HOLD(out.slot.page); /* EWB may end the reservation */
    HOLD(out.va_epc);
    if (GET_INTEGER(SwapCounts, swap, children, &children) < 0
        || (out.file = GETF(CompiledSwap, swap, _file)) == NULL)
        goto done;
    if (children == 1 || !is_exactly(out.file, given.FlatFile)) {
        RELEASE(out.va_epc);
        RELEASE(out.slot.page);
        goto readably;
    }
    sealed = evict(&out);
    if (sealed == NULL)
        goto done;
    if (PyTuple_Check(sealed) || out.eviction.eid != NULL) {
        if ((status = conclude(&out, sealed)) == 0) {
            written->place = out.slot;
            out.slot.page = NULL;
        }
    }
    else if ((number = PyLong_FromLongLong(out.tries)) != NULL) {
        written->entry = CALL(swap, _conclude, page, reservation, sealed, number, NULL);
        status = written->entry == NULL ? -1 : 0;
    }
    goto done;
readably:
    out.slot.page = NULL;
    out.va_epc = NULL;
    written->entry = PyObject_CallFunctionObjArgs(readable[SWAP_WRITE], swap, page, reservation, NULL);
    status = written->entry == NULL ? -1 : 0;
done:
    RELEASE(out.slot.page);
    RELEASE(out.va_epc);
    sealed_release(&out.place);
    Py_XDECREF(out.eviction.eid);
    Py_XDECREF(number);
    Py_XDECREF(sealed);
    Py_XDECREF(out.file);
    return status;
}

/* As PlainSwap.write(). */
PyObject *
swap_write(PyObject *swap, PyObject *page, PyObject *reservation)
{
    struct written written;
    SwapEntry *entry = NULL;
    PyObject *slot, *index = NULL;

    if (swap_write_to(swap, page, reservation, &written) < 0 || written.place.page == NULL)
        return written.entry;
    slot = GET(reservation, slot);
    if (slot != NULL)
        index = PyLong_FromLongLong(((Reservation *)reservation)->index);
    if (index != NULL)
        entry = (SwapEntry *)PyType_GenericAlloc(record_types[KIND_SwapEntry], 0);
    if (entry != NULL) {
        set_field(&entry->index, index);
        set_field(&entry->slot, slot);
    }
    Py_XDECREF(index);
    Py_XDECREF(slot);
    RELEASE(written.place.page);
    return (PyObject *)entry;
}
