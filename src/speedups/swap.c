/* The swapping of one enclave: as softsgx.paging.optimised.PlainSwap and what it calls. */

#include "speedups.h"

/* --- out ---------------------------------------------------------------------------------------- */

/* What swap_prepare needs, and whether there is all of it. */
struct out {
    PyObject *file, *flat, *sealed, *va, *pages, *buffers, *core, *slowpath;
    VaPage *va_page;
};

static int
gather(PyObject *swap, struct out *out)
{
    PyObject *limit;
    int64_t reserved;
    int late = GET_TRUTH(CompiledSwap, swap, _late_backing), plain;

    if (late < 0 || (out->file = GETF(CompiledSwap, swap, _file)) == NULL || (out->va = GETF(CompiledSwap, swap, va)) == NULL)
        return -1;
    if (late || !is_exactly(out->file, given.FlatFile) || !is_exactly(out->va, given.VaArray)
        || record_types[KIND_VaSlot] == NULL || record_types[KIND_Reservation] == NULL)
        return 0;
    if ((out->flat = GETF(FlatFile, out->file, _flat)) == NULL
        || (out->sealed = GETF(FlatFile, out->file, _sealed)) == NULL
        || GET_INTEGER(FlatBacking, out->flat, reserved, &reserved) < 0
        || (out->buffers = GETF(FlatFile, out->file, _buffers)) == NULL
        || (out->pages = GETF(VaArray, out->va, _pages)) == NULL
        || (out->core = GETF(CompiledSwap, swap, _core)) == NULL
        || (out->slowpath = GETF(EpcCore, out->core, slowpath)) == NULL
        || (limit = GETF(FlatBacking, out->flat, limit_pages)) == NULL)
        return -1;
    plain = is_none(limit) && sealed_has_room(out->sealed, reserved + 1)
        && PyList_Check(out->buffers) && PyList_Size(out->buffers) > 0
        && is_record(PyList_GetItem(out->buffers, PyList_Size(out->buffers) - 1), KIND_Pinned);
    Py_DECREF(limit);
    if (plain)
        out->va_page = page_with_room(out->pages);
    if (PyErr_Occurred())
        return -1;
    return plain && out->va_page != NULL;
}

/* As SwapSpace.prepare(). */
PyObject *
swap_prepare(PyObject *swap, PyObject *index)
{
    struct out out = {0};
    PyObject *pinned = NULL, *slot = NULL, *empty = NULL, *result = NULL;
    Reservation *reservation;
    int plain = gather(swap, &out);

    if (plain < 0)
        goto done;
    if (!plain) {
        result = PyObject_CallFunctionObjArgs(readable[SWAP_PREPARE], swap, index, NULL);
        goto done;
    }
    if ((pinned = reserve(out.file, out.flat, out.buffers, index)) == NULL
        || (empty = PyUnicode_FromString("")) == NULL
        || SET(out.slowpath, backing_error, empty) < 0
        || (slot = alloc_slot(out.va, out.pages, out.va_page)) == NULL)
        goto done;
    reservation = (Reservation *)PyType_GenericAlloc(record_types[KIND_Reservation], 0);
    if (reservation != NULL) {
        set_field(&reservation->index, index);
        set_field(&reservation->slot, slot);
        set_field(&reservation->pinned, pinned);
    }
    result = (PyObject *)reservation;
done:
    Py_XDECREF(empty);
    Py_XDECREF(slot);
    Py_XDECREF(pinned);
    RELEASE(out.va_page);
    Py_XDECREF(out.slowpath);
    Py_XDECREF(out.core);
    Py_XDECREF(out.pages);
    Py_XDECREF(out.buffers);
    Py_XDECREF(out.sealed);
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

/* The last of so many EWBs has succeeded: end the eviction; return the slot of the version. */
static PyObject *
written(PyObject *swap, Reservation *reservation, PyObject *sealed, int64_t tries)
{
    PyObject *file = GETF(CompiledSwap, swap, _file), *va = GETF(CompiledSwap, swap, va), *object = GETF(CompiledSwap, swap, _counters);
    Counters *counters = AS(Counters, object);
    PyObject *slot = NULL;
    int64_t *succeeded;

    if (file == NULL || va == NULL || counters == NULL) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "the core's counters are no Counters");
        goto done;
    }
    succeeded = tries == 1 ? &counters->ewb_first
        : tries == 2       ? &counters->ewb_second
                           : &counters->ewb_third;
    if (ADD_INTEGER(CompiledSwap, swap, ewbs, tries) < 0 || add_to_field(succeeded, 1) < 0
        || keep(file, reservation->pinned, sealed) < 0
        || slot_written(va, (VaSlot *)reservation->slot) < 0
        || ADD_INTEGER(CompiledSwap, swap, children, -1) < 0)
        goto done;
    Py_INCREF(slot = reservation->slot);
done:
    Py_XDECREF(object);
    Py_XDECREF(va);
    Py_XDECREF(file);
    return slot;
}

/* EWB of a page, and again where the first is too early: what the last one returned, and how many there
 * were. */
static PyObject *
evict(PyObject *swap, PyObject *addr, PyObject *slot_addr, int64_t *tries)
{
    PyObject *leaves = GETF(CompiledSwap, swap, _leaves), *sealed = NULL;

    if (leaves != NULL)
        sealed = call_leaf(leaves, TRY_EWB, (PyObject *[7]){addr, slot_addr});
    Py_XDECREF(leaves);
    *tries = 1;
    if (sealed != given.NOT_TRACKED)
        return sealed;
    Py_DECREF(sealed);
    return swap_try_again(swap, addr, slot_addr, tries);
}

/* As PlainSwap.write(); but where C code has written the page, the slot of its version. */
PyObject *
swap_write_to(PyObject *swap, PyObject *page_object, PyObject *reservation_object)
{
    SgxEpcPage *page = AS(SgxEpcPage, page_object), *va_epc = NULL;
    Reservation *reservation = AS(Reservation, reservation_object);
    VaSlot *slot = reservation == NULL ? NULL : AS(VaSlot, reservation->slot);
    VaPage *va_page = slot == NULL ? NULL : AS(VaPage, slot->page);
    PyObject *addr = NULL, *sealed = NULL, *file = NULL, *number = NULL, *result = NULL;
    int64_t children, tries, at;

    if (va_page != NULL)
        va_epc = AS(SgxEpcPage, va_page->epc);
    if (page == NULL || va_epc == NULL || !is_false(page->poisoned)
        || !is_record(reservation->pinned, KIND_Pinned) || !integer(slot->number, &at)
        || record_types[KIND_SwapEntry] == NULL)
        goto readably;
    if (GET_INTEGER(CompiledSwap, swap, children, &children) < 0 || (file = GETF(CompiledSwap, swap, _file)) == NULL)
        return NULL;
    if (children == 1 || !is_exactly(file, given.FlatFile))
        goto readably;
    addr = slot_address(va_epc, at);
    sealed = addr == NULL ? NULL : evict(swap, page->addr, addr, &tries);
    if (sealed == NULL)
        goto done;
    if (PyTuple_Check(sealed))
        result = written(swap, reservation, sealed, tries);
    else if ((number = PyLong_FromLongLong(tries)) != NULL)
        result = CALL(swap, _conclude, page_object, reservation_object, sealed, number, NULL);
    goto done;
readably:
    result = PyObject_CallFunctionObjArgs(readable[SWAP_WRITE], swap, page_object,
                                          reservation_object, NULL);
done:
    Py_XDECREF(number);
    Py_XDECREF(sealed);
    Py_XDECREF(addr);
    Py_XDECREF(file);
    return result;
}

/* As PlainSwap.write(). */
PyObject *
swap_write(PyObject *swap, PyObject *page, PyObject *reservation)
{
    PyObject *result = swap_write_to(swap, page, reservation);
    SwapEntry *entry;

    if (!IS(VaSlot, result))
        return result;
    entry = (SwapEntry *)PyType_GenericAlloc(record_types[KIND_SwapEntry], 0);
    if (entry != NULL) {
        set_field(&entry->index, ((Reservation *)reservation)->index);
        set_field(&entry->slot, result);
    }
    Py_DECREF(result);
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
loaded(PyObject *swap, PyObject *file, struct place *slot, PyObject *index)
{
    PyObject *object = GETF(CompiledSwap, swap, _counters), *va = GETF(CompiledSwap, swap, va);
    Counters *counters = AS(Counters, object);
    int64_t children, peak;
    int status = -1;

    if (counters != NULL && va != NULL && forget(file, counters, index) == 0
        && slot_loaded(va, slot) == 0 && add_to_field(&counters->eldu, 1) == 0
        && GET_INTEGER(CompiledSwap, swap, children, &children) == 0
        && PUT_INTEGER(CompiledSwap, swap, children, children + 1) == 0
        && GET_INTEGER(CompiledSwap, swap, peak_children, &peak) == 0)
        status = children + 1 > peak ? PUT_INTEGER(CompiledSwap, swap, peak_children, children + 1) : 0;
    else if (!PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "the core's counters are no Counters");
    Py_XDECREF(va);
    Py_XDECREF(object);
    return status;
}

/* ELDU of a page into EPC page `page`; then all that follows from it. */
static int
load_into(PyObject *swap, PyObject *file, PyObject *secs_addr, struct place *slot,
          PyObject *slot_addr, PyObject *index, PyObject *sealed, PyObject *flags, SgxEpcPage *page)
{
    PyObject *leaves = GETF(CompiledSwap, swap, _leaves), *linaddr = NULL, *answer = NULL;
    uint64_t base;
    int64_t number;
    int status = -1, done;

    if (leaves == NULL || GET_ADDRESS(CompiledSwap, swap, _base, &base) < 0 || !integer(index, &number)
        || (linaddr = PyLong_FromUnsignedLongLong(base + (uint64_t)number * PAGE_BYTES)) == NULL)
        goto done;
    answer = call_leaf(leaves, TRY_ELDU, (PyObject *[7]){linaddr, secs_addr, sealed, flags,
                                                         page->addr, slot_addr});
    done = answer == NULL ? -1 : PyObject_IsTrue(answer);
    if (done < 0
        || (!done
            && effect(CALL(swap, _load_by_leaf, (PyObject *)page, index, slot_addr, linaddr,
                           secs_addr, NULL)) < 0))
        goto done;
    status = loaded(swap, file, slot, index);
done:
    Py_XDECREF(answer);
    Py_XDECREF(linaddr);
    Py_XDECREF(leaves);
    return status;
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
    VaPage *va_page = place->page;
    SgxEpcPage *va_epc = NULL, *secs;
    PyObject *secs_object = GETF(CompiledSwap, swap, secs), *core = GETF(CompiledSwap, swap, _core), *file = GETF(CompiledSwap, swap, _file);
    PyObject *sealed = NULL, *flags = NULL, *slot_addr = NULL, *page = NULL;
    PyObject *result = NULL;
    int64_t children;
    int found = 0;

    Py_XINCREF(entry);
    if (secs_object == NULL || core == NULL || file == NULL
        || GET_INTEGER(CompiledSwap, swap, children, &children) < 0)
        goto done;
    secs = AS(SgxEpcPage, secs_object);
    if (va_page != NULL && is_none(va_page->eviction))
        va_epc = AS(SgxEpcPage, va_page->epc);
    if (va_epc == NULL || secs == NULL || !children || !is_exactly(core, given.CompiledCore)
        || !is_exactly(file, given.FlatFile))
        goto readably;
    found = kept(file, index, &sealed, &flags);
    if (found < 0)
        goto done;
    if (!found)
        goto readably;
    if ((slot_addr = slot_address(va_epc, place->number)) == NULL)
        goto done;
    set_field(&va_page->accessed, Py_True);
    page = core_alloc(core, owner, group, kind, node, claim);
    if (page == NULL
        || load_into(swap, file, secs->addr, place, slot_addr, index, sealed, flags,
                     (SgxEpcPage *)page) < 0)
        goto done;
    if (!is_none(claim) && !is_none(owner) && record_load(core, claim, owner, page) < 0)
        goto done;
    Py_INCREF(result = page);
    goto done;
readably:
    if (entry != NULL || (entry = entry_get(swap, index)) != NULL)
        result = load_readably(swap, entry, owner, kind, node, group, claim);
done:
    Py_XDECREF(page);
    Py_XDECREF(slot_addr);
    Py_XDECREF(flags);
    Py_XDECREF(sealed);
    Py_XDECREF(file);
    Py_XDECREF(core);
    Py_XDECREF(secs_object);
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
