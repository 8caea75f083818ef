/* Loads of one enclave: as softsgx.paging.optimised.PlainSwap and what it calls. */

#include "hw.h"
#include "paging.h"

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
    PyObject *swap, *file, *flags;
    SgxEpcPage *page, *secs, *va_epc;
    struct place *slot;
    struct sealed_place sealed;
    int64_t index;
};

/* ELDU by the core's leaves: whether it has loaded the page: 0, 1, or -1 with an error. */
static int
try_eldu(struct in_page *in, uint64_t linaddr)
{
    PyObject *leaves = GETF(CompiledSwap, in->swap, _leaves), *address, *slot_addr, *bytes;
    struct bound_leaf leaf = {0};
    struct eldu_call loading = {
        in->page, in->secs, in->va_epc, in->flags,
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
    PyObject *index = PyLong_FromLongLong(in->index);
    int status = -1;

    if (address != NULL && slot_addr != NULL && index != NULL)
        status = effect(CALL(in->swap, _load_by_leaf, (PyObject *)in->page, index, slot_addr,
                             address, in->secs->addr, NULL));
    Py_XDECREF(index);
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
    base += (uint64_t)in->index * PAGE_BYTES;
    done = try_eldu(in, base);
    if (done < 0 || (!done && load_by_leaf(in, base) < 0))
        return -1;
    sealed_release(&in->sealed); /* loaded() may free its block */
    return loaded(in->swap, in->file, in->slot, in->index);
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
swap_load_from(PyObject *swap, PyObject *entry, int64_t index, struct place *place,
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
    found = kept(in.file, index, &in.sealed, &in.flags);
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
    VaSlot *slot;
    struct place place = {0};
    PyObject *result;
    int64_t index;

    if (entry == NULL || !integer(entry->index, &index))
        return load_readably(swap, object, owner, kind, node, group, claim);

    slot = AS(VaSlot, entry->slot);
    if (slot != NULL && integer(slot->number, &place.number))
        place.page = AS(VaPage, slot->page);
    if (place.page != NULL)
        HOLD(place.page);
    result = swap_load_from(swap, object, index, &place, owner, kind, node, group, claim);
    RELEASE(place.page);
    return result;
}
