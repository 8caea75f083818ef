/* VA slots and backing of evicted pages: as VaArray and FlatFile of softsgx.paging. */

#include "page_list.h"
#include "paging.h"

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

/* Where the slot of a reservation is, borrowed. */
bool
reserved_slot(Reservation *reservation, struct place *place)
{
    VaSlot *slot;

    place->page = AS(VaPage, reservation->_va_page);
    place->number = reservation->_number;
    if (place->page == NULL && (slot = AS(VaSlot, reservation->_slot)) != NULL
        && integer(slot->number, &place->number))
        place->page = AS(VaPage, slot->page);
    return place->page != NULL;
}

/* Call a method of another VaArray with a slot. */
static int
with_slot(PyObject *va, PyObject *name, struct place *place)
{
    PyObject *slot = (PyObject *)make_slot(place->page, place->number);
    int status = slot == NULL ? -1 : effect(PyObject_CallMethodObjArgs(va, name, slot, NULL));

    Py_XDECREF(slot);
    return status;
}

/* As VaArray.slot_loaded(). */
int
slot_loaded(PyObject *va, struct place *slot)
{
    VaPage *page = slot->page;
    PyObject *pages;
    int status = 0;

    if (!is_exactly(va, given.VaArray))
        return with_slot(va, names.slot_loaded, slot);
    set_field(&page->accessed, Py_True);
    page->free[slot->number / 64] |= (uint64_t)1 << slot->number % 64;
    if (ADD_INTEGER(VaArray, va, used, -1) < 0)
        return -1;
    if (!is_none(page->eviction))  // resident it is: ELDU has used the slot
        return 0;
    if (ADD_INTEGER(VaArray, va, room, 1) < 0 || (pages = GETF(VaArray, va, _pages)) == NULL)
        return -1;
    if (first_va_page(pages) != page)
        status = move_va_page(pages, page, false);
    Py_DECREF(pages);
    return status;
}

/* As VaArray.slot_written(). */
int
slot_written(PyObject *va, struct place *slot)
{
    VaPage *page = slot->page;
    SgxEpcPage *epc;
    int64_t promised, used;

    if (!is_exactly(va, given.VaArray) || !is_empty(page->stale))
        return with_slot(va, names.slot_written, slot);
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

/* The page whose slots are taken next, with a reference, or NULL, perhaps with an error. */
VaPage *
page_with_room(PyObject *va)
{
    PyObject *pages = GETF(VaArray, va, _pages);
    VaPage *page = pages == NULL ? NULL : first_va_page(pages);

    if (page != NULL
        && (is_empty(page->free) || is_none(page->epc) || !is_none(page->eviction)))
        page = NULL;
    if (page != NULL)
        HOLD(page);
    Py_XDECREF(pages);
    return page;
}

/* As VaArray.alloc_slot(), of a page that has room: 0, or -1 with an error. */
int
alloc_slot(PyObject *va, VaPage *page, int64_t *number)
{
    PyObject *pages;
    int status;

    *number = take_lowest(page->free);
    page->pins++;
    set_field(&page->accessed, Py_True);
    if (ADD_INTEGER(VaArray, va, used, 1) < 0 || ADD_INTEGER(VaArray, va, room, -1) < 0)
        return -1;
    if (!is_empty(page->free))
        return 0;
    if ((pages = GETF(VaArray, va, _pages)) == NULL)
        return -1;
    status = move_va_page(pages, page, true);
    Py_DECREF(pages);
    return status;
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

/* As FlatFile.reserve(), of a file without a limit; the buffer is taken where one is needed. */
int
reserve(PyObject *file, PyObject *flat, int64_t index)
{
    return share(file, flat, index, 1) < 0 ? -1 : ADD_INTEGER(FlatBacking, flat, reserved, 1);
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

/* Give back the buffer of a reservation that has one. */
static int
put_back(PyObject *file, Reservation *reservation)
{
    PyObject *buffers;
    int status;

    if (is_none(reservation->_pinned))
        return 0;
    if ((buffers = GETF(FlatFile, file, _buffers)) == NULL)
        return -1;
    status = PyList_Append(buffers, reservation->_pinned);
    Py_DECREF(buffers);
    return status;
}

static int
keep_readably(PyObject *file, Reservation *reservation, PyObject *sealed)
{
    PyObject *pinned = GET(reservation, pinned);
    int status = pinned == NULL ? -1 : effect(CALL(file, keep, pinned, sealed, NULL));

    Py_XDECREF(pinned);
    return status;
}

/* As FlatFile.keep(). */
int
keep(PyObject *file, Reservation *reservation, PyObject *sealed)
{
    PyObject *flat = GETF(FlatFile, file, _flat), *contents = NULL;
    int64_t flags;
    int usual = flat == NULL ? -1
        : integer(PyTuple_GetItem(sealed, 1), &flags)
        ? is_usual(flat, flags, PyTuple_GetItem(sealed, 2))
        : 0;
    int status = -1;

    if (usual == 0)
        status = keep_readably(file, reservation, sealed);
    else if (usual > 0 && (contents = GETF(FlatFile, file, _sealed)) != NULL
             && ADD_INTEGER(FlatBacking, flat, reserved, -1) == 0
             && sealed_put(contents, reservation->index, PyTuple_GetItem(sealed, 0)) == 0)
        status = put_back(file, reservation);
    Py_XDECREF(contents);
    Py_XDECREF(flat);
    return status;
}

/* As FlatFile.keep_kind(). */
static int
keep_kind(PyObject *file, int64_t index, int64_t flags, PyObject *eid)
{
    PyObject *at = PyLong_FromLongLong(index), *number = PyLong_FromLongLong(flags);
    int status = -1;

    if (at != NULL && number != NULL)
        status = effect(CALL(file, keep_kind, at, number, eid, NULL));
    Py_XDECREF(number);
    Py_XDECREF(at);
    return status;
}

int
keep_at(PyObject *file, Reservation *reservation, struct sealed_place *place, int64_t flags,
        PyObject *eid)
{
    PyObject *flat = GETF(FlatFile, file, _flat), *contents = NULL;
    int usual = flat == NULL ? -1 : is_usual(flat, flags, eid), status = -1;

    if (usual >= 0 && (contents = GETF(FlatFile, file, _sealed)) != NULL
        && ADD_INTEGER(FlatBacking, flat, reserved, -1) == 0 && sealed_taken(contents, place) == 0
        && (usual || keep_kind(file, place->index, flags, eid) == 0))
        status = put_back(file, reservation);
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
leave(PyObject *file, PyObject *flat, Counters *counters, int64_t index)
{
    FlatFile *record = AS(FlatFile, file);
    uint32_t *kept = NULL;

    if (record != NULL && record->_sharers != NULL && record->_tracer == Py_None
        && number_at(record->_sharers, index >> PCMDS_SHIFT, &kept) < 0)
        return -1;
    if (kept != NULL) {
        *kept = 0;
        if (ADD_INTEGER(FlatBacking, flat, pcmd_pages, -1) < 0)
            return -1;
        return add_to_field(&counters->pcmd_truncated, 1);
    }
    return effect(call_with(file, names._leave, PyLong_FromLongLong(index), NULL));
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
        status = leave(file, flat, counters, index);
    Py_XDECREF(flat);
    Py_XDECREF(contents);
    return status;
}
