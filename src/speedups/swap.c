/* The swapping of one enclave: as softsgx.paging.optimised.PlainSwap and what it calls. */

#include "speedups.h"

/* The index of a page: 0, or -1 with an error. */
static int
index_of(PyObject *object, int64_t *index)
{
    if (integer(object, index))
        return 0;
    PyErr_SetString(PyExc_TypeError, "the index of a page is no integer");
    return -1;
}

/* --- out ---------------------------------------------------------------------------------------- */

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

    if (spares > 0)
        return (Reservation *)spare[--spares];
    reservation = (Reservation *)PyType_GenericAlloc(record_types[KIND_Reservation], 0);
    if (reservation != NULL)
        empty(reservation);
    return reservation;
}

void
end_reservation(PyObject *object)
{
    if (Py_REFCNT(object) > 1 || !Py_IS_TYPE(object, record_types[KIND_Reservation])
        || spares == SPARE) {
        Py_DECREF(object);
        return;
    }
    empty((Reservation *)object);
    spare[spares++] = object;
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
swap_prepare(PyObject *swap, PyObject *object)
{
    struct out out = {0};
    PyObject *result = NULL;
    Reservation *reservation = NULL;
    int64_t index;
    int plain = integer(object, &index) ? gather(swap, &out) : 0;

    if (plain < 0)
        goto done;
    if (!plain) {
        result = PyObject_CallFunctionObjArgs(readable[SWAP_PREPARE], swap, object, NULL);
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
static PyObject *
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

/* The first EWB: what the leaf has returned, or SUCCESS, if ciphertext and MAC are at the place. */
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
        out->eviction.addr = out->page->addr;
        out->eviction.va_addr = out->va_epc->addr;
        out->eviction.place = out->place.bytes;
        sealed = ewb_to(leaf.self, &out->eviction);
    }
    Py_XDECREF(contents);
done:
    Py_XDECREF(leaf.function);
    Py_XDECREF(leaves);
    return sealed;
}

/* EWB of a page, and again where the first is too early. */
static PyObject *
evict(struct out_page *out)
{
    PyObject *sealed = try_ewb(out), *slot_addr;

    out->tries = 1;
    if (sealed == NULL || sealed != given.NOT_TRACKED)
        return sealed;
    Py_CLEAR(sealed);
    sealed_release(&out->place);
    slot_addr = slot_address(out->va_epc, out->eviction.slot);
    if (slot_addr != NULL)
        sealed = swap_try_again(out->swap, out->page->addr, slot_addr, &out->tries);
    Py_XDECREF(slot_addr);
    return sealed;
}

/* As PlainSwap.write(): see speedups.h. */
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
    if (GET_INTEGER(SwapCounts, swap, children, &children) < 0
        || (out.file = GETF(CompiledSwap, swap, _file)) == NULL)
        goto done;
    if (children == 1 || !is_exactly(out.file, given.FlatFile)) {
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
    written->entry = PyObject_CallFunctionObjArgs(readable[SWAP_WRITE], swap, page, reservation, NULL);
    status = written->entry == NULL ? -1 : 0;
done:
    RELEASE(out.slot.page);
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

/* --- in ----------------------------------------------------------------------------------------- */

/* Forget the oldest load of a thread. */
static int
forget_oldest(PyObject *loads)
{
    PyObject *owner = NULL;
    Py_ssize_t position = 0;
    int status;

    if (!PyDict_Next(loads, &position, &owner, NULL))
        return 0;
    Py_INCREF(owner);
    status = PyDict_DelItem(loads, owner);
    Py_DECREF(owner);
    return status;
}

/* As Claims.loaded(). */
static int
record_load(PyObject *core, PyObject *claim_object, PyObject *owner, PyObject *page)
{
    Claim *claim = AS(Claim, claim_object);
    PyObject *claims = GETF(EpcCore, core, claims), *holder = NULL, *most = NULL;
    Py_ssize_t limit;
    int status = -1, known = 1;

    if (claims == NULL || (holder = GETF(Claims, claims, holder)) == NULL
        || (most = GETF(Claims, claims, pages)) == NULL)
        goto done;
    if (claim != NULL && claim->loads != NULL && Py_IS_TYPE(claim->loads, &PyDict_Type))
        known = PyDict_Contains(claim->loads, owner);
    limit = PyLong_AsSsize_t(most);
    if (known < 0 || PyErr_Occurred())
        goto done;
    if (known || holder == claim_object) {
        status = effect(CALL(claims, loaded, claim_object, owner, page, NULL));
        goto done;
    }
    if (PyDict_SetItem(claim->loads, owner, page) < 0
        || (PyDict_Size(claim->loads) > limit && forget_oldest(claim->loads) < 0))
        goto done;
    status = PyObject_Size(claim->prerequisites) > 0
        ? effect(CALL0(claim->prerequisites, clear))
        : 0;
done:
    Py_XDECREF(most);
    Py_XDECREF(holder);
    Py_XDECREF(claims);
    return status;
}

/* ELDU has loaded a page: count it, and free its backing and its slot. */
static int
loaded(PyObject *swap, PyObject *file, struct place *slot, int64_t index)
{
    PyObject *object = GETF(CompiledSwap, swap, _counters), *va = GETF(CompiledSwap, swap, va);
    Counters *counters = AS(Counters, object);
    int64_t children, peak;
    int status = -1;

    if (counters != NULL && va != NULL && forget(file, counters, index) == 0
        && slot_loaded(va, slot) == 0 && add_to_field(&counters->eldu, 1) == 0
        && GET_INTEGER(SwapCounts, swap, children, &children) == 0
        && PUT_INTEGER(SwapCounts, swap, children, children + 1) == 0
        && GET_INTEGER(SwapCounts, swap, peak_children, &peak) == 0)
        status = children + 1 > peak ? PUT_INTEGER(SwapCounts, swap, peak_children, children + 1) : 0;
    else if (!PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "the core's counters are no Counters");
    Py_XDECREF(va);
    Py_XDECREF(object);
    return status;
}

/* A load of the page at an index, from a VA slot. */
struct in_page {
    PyObject *swap, *file, *index, *flags;
    SgxEpcPage *page, *secs, *va_epc;
    struct place *slot;
    struct sealed_place sealed;
    int64_t number; /* the index */
};

/* ELDU by the core's leaves: whether it has loaded the page: 0, 1, or -1 with an error. */
static int
try_eldu(struct in_page *in, uint64_t linaddr)
{
    PyObject *leaves = GETF(CompiledSwap, in->swap, _leaves), *address, *slot_addr, *bytes;
    struct bound_leaf leaf = {0};
    struct eldu_call loading = {
        in->page->addr, in->secs->addr, in->va_epc->addr, in->flags,
        linaddr, in->slot->number, in->sealed.bytes,
    };
    int status = -1;

    if (leaves == NULL || find_leaf(leaves, TRY_ELDU, &leaf) < 0)
        goto done;
    if (leaf.self != NULL) {
        status = eldu_from(leaf.self, &loading);
        goto done;
    }
    address = PyLong_FromUnsignedLongLong(linaddr);
    slot_addr = slot_address(in->va_epc, in->slot->number);
    bytes = PyBytes_FromStringAndSize(in->sealed.bytes, SEALED_BYTES);
    if (address != NULL && slot_addr != NULL && bytes != NULL)
        status = is_so(PyObject_CallFunctionObjArgs(leaf.function, address, in->secs->addr, bytes,
                                                    in->flags, in->page->addr, slot_addr, NULL));
    Py_XDECREF(bytes);
    Py_XDECREF(slot_addr);
    Py_XDECREF(address);
done:
    Py_XDECREF(leaf.function);
    Py_XDECREF(leaves);
    return status;
}

/* The readable ELDU, which refuses what the other one has not loaded. */
static int
load_by_leaf(struct in_page *in, uint64_t linaddr)
{
    PyObject *address = PyLong_FromUnsignedLongLong(linaddr);
    PyObject *slot_addr = slot_address(in->va_epc, in->slot->number);
    int status = -1;

    if (address != NULL && slot_addr != NULL)
        status = effect(CALL(in->swap, _load_by_leaf, (PyObject *)in->page, in->index, slot_addr,
                             address, in->secs->addr, NULL));
    Py_XDECREF(slot_addr);
    Py_XDECREF(address);
    return status;
}

/* ELDU of a page into an EPC page; then all that follows from it. */
static int
load_into(struct in_page *in)
{
    uint64_t base;
    int done;

    if (GET_ADDRESS(SwapCounts, in->swap, _base, &base) < 0)
        return -1;
    base += (uint64_t)in->number * PAGE_BYTES;
    done = try_eldu(in, base);
    if (done < 0 || (!done && load_by_leaf(in, base) < 0))
        return -1;
    sealed_release(&in->sealed); /* loaded() may free its block */
    return loaded(in->swap, in->file, in->slot, in->number);
}

static PyObject *
load_readably(PyObject *swap, PyObject *entry, PyObject *owner, PyObject *kind, PyObject *node,
              PyObject *group, PyObject *claim)
{
    PyObject *args = PyTuple_Pack(3, swap, entry, owner), *result = NULL;
    PyObject *named = Py_BuildValue("{sOsOsOsO}", "kind", kind, "cpu_node", node, "group", group,
                                    "claim", claim);

    if (args != NULL && named != NULL)
        result = PyObject_Call(readable[SWAP_LOAD], args, named);
    Py_XDECREF(named);
    Py_XDECREF(args);
    return result;
}

/* As PlainSwap.load(), of the page at `index`; its entry is found where it is needed and NULL. */
PyObject *
swap_load_from(PyObject *swap, PyObject *entry, PyObject *index, struct place *place,
               PyObject *owner, PyObject *kind, PyObject *node, PyObject *group, PyObject *claim)
{
    struct in_page in = {.swap = swap, .index = index, .slot = place};
    PyObject *secs = GETF(CompiledSwap, swap, secs), *core = GETF(CompiledSwap, swap, _core);
    PyObject *page = NULL, *result = NULL;
    VaPage *va_page = place->page;
    int64_t children;
    int found = 0;

    Py_XINCREF(entry);
    in.file = GETF(CompiledSwap, swap, _file);
    if (secs == NULL || core == NULL || in.file == NULL
        || GET_INTEGER(SwapCounts, swap, children, &children) < 0)
        goto done;
    in.secs = AS(SgxEpcPage, secs);
    if (va_page != NULL && is_none(va_page->eviction))
        in.va_epc = AS(SgxEpcPage, va_page->epc);
    if (in.va_epc == NULL || in.secs == NULL || !children || !is_exactly(core, given.CompiledCore)
        || !is_exactly(in.file, given.FlatFile))
        goto readably;
    found = index_of(index, &in.number) < 0 ? -1 : kept(in.file, in.number, &in.sealed, &in.flags);
    if (found < 0)
        goto done;
    if (!found)
        goto readably;
    set_field(&va_page->accessed, Py_True);
    page = core_alloc(core, owner, group, kind, node, claim);
    in.page = (SgxEpcPage *)page;
    if (page == NULL || load_into(&in) < 0)
        goto done;
    if (!is_none(claim) && !is_none(owner) && record_load(core, claim, owner, page) < 0)
        goto done;
    Py_INCREF(result = page);
    goto done;
readably:
    if (entry != NULL || (entry = entry_get(swap, index)) != NULL)
        result = load_readably(swap, entry, owner, kind, node, group, claim);
done:
    sealed_release(&in.sealed);
    Py_XDECREF(page);
    Py_XDECREF(in.flags);
    Py_XDECREF(in.file);
    Py_XDECREF(core);
    Py_XDECREF(secs);
    Py_XDECREF(entry);
    return result;
}

/* As PlainSwap.load(). */
PyObject *
swap_load(PyObject *swap, PyObject *object, PyObject *owner, PyObject *kind, PyObject *node,
          PyObject *group, PyObject *claim)
{
    SwapEntry *entry = AS(SwapEntry, object);
    VaSlot *slot = entry == NULL ? NULL : AS(VaSlot, entry->slot);
    struct place place = {0};
    PyObject *index = entry == NULL ? NULL : entry->index, *result;

    if (slot != NULL && integer(slot->number, &place.number))
        place.page = AS(VaPage, slot->page);
    if (place.page != NULL)
        HOLD(place.page);
    Py_XINCREF(index);
    result = swap_load_from(swap, object, index, &place, owner, kind, node, group, claim);
    Py_XDECREF(index);
    RELEASE(place.page);
    return result;
}
