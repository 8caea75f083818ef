/* VA slots and backing of evicted pages: as VaArray and FlatFile of softsgx.paging. */

#include "speedups.h"

/* --- VA slots ----------------------------------------------------------------------------------- */

static VaSlot *
make_slot(VaPage *page, int64_t number)
{
    VaSlot *slot = (VaSlot *)PyType_GenericAlloc(record_types[KIND_VaSlot], 0);

    if (slot == NULL)
        return NULL;
    set_field(&slot->page, (PyObject *)page);
    if (set_integer(&slot->number, number) < 0)
        RELEASE(slot), slot = NULL;
    return slot;
}

static bool
is_empty(const uint64_t *bitmap)
{
    uint64_t any = 0;

    for (int word = 0; word < BITMAP_WORDS; word++)
        any |= bitmap[word];
    return any == 0;
}

/* Clear the lowest bit of a bitmap that has one; return its number. */
static int64_t
take_lowest(uint64_t *bitmap)
{
    int word = 0;
    int64_t number;

    while (bitmap[word] == 0)
        word++;
    number = word * 64 + __builtin_ctzll(bitmap[word]);
    bitmap[word] &= bitmap[word] - 1;
    return number;
}

/* As VaArray.slot_loaded(). */
int
slot_loaded(PyObject *va, struct place *slot)
{
    VaPage *page = slot->page;
    PyObject *pages;
    int status;

    if (!is_exactly(va, given.VaArray)) {
        PyObject *object = (PyObject *)make_slot(page, slot->number);

        status = object == NULL ? -1 : effect(CALL(va, slot_loaded, object, NULL));
        Py_XDECREF(object);
        return status;
    }
    set_field(&page->accessed, Py_True);
    page->free[slot->number / 64] |= (uint64_t)1 << slot->number % 64;
    if (ADD_INTEGER(VaArray, va, used, -1) < 0)
        return -1;
    if (!is_none(page->eviction))  // resident it is: ELDU has used the slot
        return 0;
    if (ADD_INTEGER(VaArray, va, room, 1) < 0 || (pages = GETF(VaArray, va, _pages)) == NULL)
        return -1;
    status = effect(CALL(pages, move_to_end, (PyObject *)page, Py_False, NULL));
    Py_DECREF(pages);
    return status;
}

/* As VaArray.slot_written(). */
int
slot_written(PyObject *va, VaSlot *slot)
{
    VaPage *page = AS(VaPage, slot->page);
    SgxEpcPage *epc;
    int64_t promised, used;

    if (page == NULL || !is_exactly(va, given.VaArray) || !is_empty(page->stale))
        return effect(CALL(va, slot_written, (PyObject *)slot, NULL));
    page->pins--;
    epc = AS(SgxEpcPage, page->epc);
    if (page->pins || (epc != NULL && is_true(epc->tracked)))  // stays as it is, or is listed already
        return 0;
    if (GET_INTEGER(VaArray, va, promised, &promised) < 0
        || GET_INTEGER(VaArray, va, used, &used) < 0)
        return -1;
    if (promised == used || is_empty(page->free))
        return effect(CALL(va, mark_reclaimable, (PyObject *)page, NULL));
    return 0;
}

/* The page whose slots are taken next, or NULL, perhaps with an error. */
VaPage *
page_with_room(PyObject *pages)
{
    PyObject *iterator = PyObject_GetIter(pages), *first;
    VaPage *page;

    if (iterator == NULL)
        return NULL;
    first = PyIter_Next(iterator);
    Py_DECREF(iterator);
    page = AS(VaPage, first);
    if (page == NULL || is_empty(page->free) || is_none(page->epc)
        || !is_none(page->eviction)) {
        Py_XDECREF(first);
        return NULL;
    }
    return page;
}

/* As VaArray.alloc_slot(), of a page that has room. */
PyObject *
alloc_slot(PyObject *va, PyObject *pages, VaPage *page)
{
    VaSlot *slot = make_slot(page, take_lowest(page->free));

    if (slot == NULL)
        return NULL;
    page->pins++;
    set_field(&page->accessed, Py_True);
    if (ADD_INTEGER(VaArray, va, used, 1) < 0 || ADD_INTEGER(VaArray, va, room, -1) < 0
        || (is_empty(page->free)
            && effect(CALL(pages, move_to_end, (PyObject *)page, NULL)) < 0))
        RELEASE(slot), slot = NULL;
    return (PyObject *)slot;
}

/* --- backing ------------------------------------------------------------------------------------ */

#define PCMDS_SHIFT 5 /* of PCMDS_PER_PAGE */

/* One PCMD more (1) or fewer (-1) in the page that has that of a page: 0; 1: that was the last one, and
 * nothing has changed; or -1 with an error. */
static int
share(PyObject *file, PyObject *flat, int64_t index, int change)
{
    PyObject *sharers = GETF(FlatFile, file, _sharers);
    int64_t group = index >> PCMDS_SHIFT, count;
    uint32_t *kept;
    int status = -1;

    if (sharers == NULL || number_at(sharers, group, &kept) < 0)
        goto done;
    count = (kept == NULL ? 0 : (int64_t)*kept) + change;
    if (count == 0)
        status = 1;
    else if (count > 1 || change < 0 || ADD_INTEGER(FlatBacking, flat, pcmd_pages, 1) == 0)
        status = number_put(sharers, kept, group, count);
done:
    Py_XDECREF(sharers);
    return status;
}

/* As FlatFile.reserve(), of a file without a limit that has a buffer. */
PyObject *
reserve(PyObject *file, PyObject *flat, PyObject *buffers, PyObject *index)
{
    PyObject *pinned = NULL;
    Py_ssize_t last = PyList_Size(buffers) - 1;
    int64_t number;

    if (!integer(index, &number)) {
        PyErr_SetString(PyExc_TypeError, "the index of a page is no integer");
        return NULL;
    }
    if (share(file, flat, number, 1) < 0 || ADD_INTEGER(FlatBacking, flat, reserved, 1) < 0
        || (pinned = PyList_GetItem(buffers, last)) == NULL)
        return NULL;
    Py_INCREF(pinned);
    set_field(&((Pinned *)pinned)->index, index);
    if (PyList_SetSlice(buffers, last, last + 1, NULL) < 0)
        Py_CLEAR(pinned);
    return pinned;
}

/* Whether SECINFO flags and an EID are those of most pages: 0, 1, or -1 with an error. */
static int
is_usual(PyObject *flat, int64_t flags, PyObject *eid)
{
    PyObject *usual = GETF(FlatBacking, flat, usual);
    int64_t its;
    int same = usual == NULL ? -1
        : PyTuple_Check(usual) && PyTuple_Size(usual) == 2
            && integer(PyTuple_GetItem(usual, 0), &its) && its == flags;

    if (same > 0)
        same = PyObject_RichCompareBool(eid, PyTuple_GetItem(usual, 1), Py_EQ);
    Py_XDECREF(usual);
    return same;
}

/* As FlatFile.keep(). */
int
keep(PyObject *file, PyObject *pinned, PyObject *sealed)
{
    PyObject *flat = GETF(FlatFile, file, _flat), *contents = NULL, *buffers = NULL;
    int64_t flags, index;
    int usual = flat == NULL ? -1
        : integer(((Pinned *)pinned)->index, &index) && integer(PyTuple_GetItem(sealed, 1), &flags)
        ? is_usual(flat, flags, PyTuple_GetItem(sealed, 2))
        : 0;
    int status = -1;

    if (usual < 0)
        goto done;
    if (!usual) {
        status = effect(CALL(file, keep, pinned, sealed, NULL));
        goto done;
    }
    contents = GETF(FlatFile, file, _sealed);
    buffers = GETF(FlatFile, file, _buffers);
    if (contents != NULL && buffers != NULL && ADD_INTEGER(FlatBacking, flat, reserved, -1) == 0
        && sealed_put(contents, index, PyTuple_GetItem(sealed, 0)) == 0)
        status = PyList_Append(buffers, pinned);
done:
    Py_XDECREF(buffers);
    Py_XDECREF(contents);
    Py_XDECREF(flat);
    return status;
}

int
keep_at(PyObject *file, PyObject *pinned, struct sealed_place *place, int64_t flags, PyObject *eid)
{
    PyObject *flat = GETF(FlatFile, file, _flat), *contents = NULL, *buffers = NULL;
    PyObject *number = NULL;
    int usual = flat == NULL ? -1 : is_usual(flat, flags, eid), status = -1;

    if (usual < 0 || (contents = GETF(FlatFile, file, _sealed)) == NULL
        || (buffers = GETF(FlatFile, file, _buffers)) == NULL
        || ADD_INTEGER(FlatBacking, flat, reserved, -1) < 0 || sealed_taken(contents, place) < 0)
        goto done;
    if (!usual
        && ((number = PyLong_FromLongLong(flags)) == NULL
            || effect(CALL(file, keep_kind, ((Pinned *)pinned)->index, number, eid, NULL)) < 0))
        goto done;
    status = PyList_Append(buffers, pinned);
done:
    Py_XDECREF(number);
    Py_XDECREF(buffers);
    Py_XDECREF(contents);
    Py_XDECREF(flat);
    return status;
}

/* The flags of a page, a new reference, if it has other ones than most: 1; 0; or -1 with an error. */
static int
unusual_flags(PyObject *flat, int64_t index, PyObject **flags)
{
    PyObject *unusual = GETF(FlatBacking, flat, unusual), *number = NULL, *kind = NULL;
    int found = unusual == NULL ? -1 : 0;

    if (unusual != NULL && PyDict_Size(unusual) > 0) {
        number = PyLong_FromLongLong(index);
        kind = number == NULL ? NULL : PyDict_GetItemWithError(unusual, number);
        found = PyErr_Occurred() ? -1 : kind != NULL && PyTuple_Check(kind);
    }
    if (found > 0)
        Py_XINCREF(*flags = PyTuple_GetItem(kind, 0));
    Py_XDECREF(number);
    Py_XDECREF(unusual);
    return found;
}

/* What FlatFile.kept() returns: the place of the ciphertext, and the flags, a new reference: 1; 0: no
 * such page, -1: an error. */
int
kept(PyObject *file, int64_t index, struct sealed_place *place, PyObject **flags)
{
    PyObject *contents = GETF(FlatFile, file, _sealed), *flat = GETF(FlatFile, file, _flat);
    PyObject *usual = NULL;
    int found = -1, unusual;

    if (contents == NULL || flat == NULL || (usual = GETF(FlatBacking, flat, usual)) == NULL
        || (found = sealed_find(contents, index, place)) <= 0)
        goto done;
    unusual = unusual_flags(flat, index, flags);
    if (unusual)
        found = unusual;
    else if ((found = PyTuple_Check(usual)) > 0)
        Py_XINCREF(*flags = PyTuple_GetItem(usual, 0));
done:
    Py_XDECREF(usual);
    Py_XDECREF(flat);
    Py_XDECREF(contents);
    return found;
}

/* A PCMD page has its last sharer no more: as FlatFile._leave(). */
static int
leave(PyObject *file, int64_t index)
{
    PyObject *number = PyLong_FromLongLong(index);
    int status = number == NULL ? -1 : effect(CALL(file, _leave, number, NULL));

    Py_XDECREF(number);
    return status;
}

static int
forget_unusual(PyObject *flat, int64_t index)
{
    PyObject *unusual = GETF(FlatBacking, flat, unusual), *number;
    int status = unusual == NULL ? -1 : 0;

    if (unusual != NULL && PyDict_Size(unusual) > 0) {
        number = PyLong_FromLongLong(index);
        status = number == NULL ? -1 : effect(CALL(unusual, pop, number, Py_None, NULL));
        Py_XDECREF(number);
    }
    Py_XDECREF(unusual);
    return status;
}

/* As FlatFile.forget(). */
int
forget(PyObject *file, Counters *counters, int64_t index)
{
    PyObject *contents = GETF(FlatFile, file, _sealed), *flat = GETF(FlatFile, file, _flat);
    int status = -1;

    if (contents != NULL && flat != NULL && sealed_drop(contents, index) == 0
        && forget_unusual(flat, index) == 0 && add_to_field(&counters->truncated, 1) == 0)
        status = share(file, flat, index, -1);
    if (status > 0)
        status = leave(file, index);
    Py_XDECREF(flat);
    Py_XDECREF(contents);
    return status;
}
