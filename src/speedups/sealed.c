/* Evicted pages: as SwapEntries and SealedPages of softsgx.paging. */

#include "speedups.h"

#define BLOCK_PAGES 255

/* --- entries ------------------------------------------------------------------------------------ */

#define LOST 1
#define FIRST 2
#define VA_SLOTS 512

static SwapEntries *
entries_of(PyObject *swap, PyObject *index, int64_t *number, PyObject **owned)
{
    SwapEntries *entries;

    *owned = GETF(CompiledSwap, swap, entries);
    entries = AS(SwapEntries, *owned);
    if (*owned == NULL)
        return NULL;
    if (entries != NULL && entries->_numbers != NULL && entries->_va_pages != NULL
        && PyDict_Check(entries->_va_pages) && integer(index, number))
        return entries;
    PyErr_SetString(PyExc_TypeError, "entries of pages that are no SwapEntries");
    return NULL;
}

/* Where the version of an evicted page is, with a reference to its VA page: 1; 0: C code does not
 * know of it (as where the page is resident or lost); or -1 with an error. */
int
entry_place(PyObject *swap, PyObject *index, struct place *place)
{
    PyObject *owned, *va_index = NULL;
    uint32_t *kept;
    int64_t page, number;
    SwapEntries *entries = entries_of(swap, index, &page, &owned);
    int status = -1;

    place->page = NULL;
    if (entries == NULL || number_at(entries->_numbers, page, &kept) < 0)
        goto done;
    status = 0;
    number = kept == NULL ? 0 : *kept;
    if (number <= LOST || record_types[KIND_VaSlot] == NULL)
        goto done;
    number -= FIRST;
    place->number = number % VA_SLOTS;
    va_index = PyLong_FromLongLong(number / VA_SLOTS);
    if (va_index != NULL)
        place->page = AS(VaPage, PyDict_GetItemWithError(entries->_va_pages, va_index));
    if (place->page != NULL)
        HOLD(place->page);
    status = PyErr_Occurred() ? -1 : place->page != NULL;
done:
    Py_XDECREF(va_index);
    Py_XDECREF(owned);
    return status;
}

PyObject *
entry_get(PyObject *swap, PyObject *index)
{
    PyObject *entries = GETF(CompiledSwap, swap, entries), *entry = NULL;

    if (entries != NULL)
        entry = CALL(entries, get, index, NULL);
    Py_XDECREF(entries);
    return entry;
}

int
entry_put(PyObject *swap, PyObject *index, PyObject *object)
{
    PyObject *owned;
    uint32_t *kept;
    int64_t page, va_index, number;
    SwapEntries *entries = entries_of(swap, index, &page, &owned);
    SwapEntry *entry = AS(SwapEntry, object);
    VaSlot *slot = AS(VaSlot, entry == NULL ? object : entry->slot);
    VaPage *va_page = slot == NULL ? NULL : AS(VaPage, slot->page);
    int status = -1;

    if (entries == NULL)
        goto done;
    if (is_none(object))
        number = 0;
    else if (va_page != NULL && integer(va_page->index, &va_index)
             && integer(slot->number, &number))
        number += va_index * VA_SLOTS + FIRST;
    else {
        status = effect(CALL(owned, put, index, object, NULL));
        goto done;
    }
    if (number_at(entries->_numbers, page, &kept) == 0)
        status = number_put(entries->_numbers, kept, page, number);
done:
    Py_XDECREF(owned);
    return status;
}

/* --- sealed pages ------------------------------------------------------------------------------- */

static SealedPages *
record_of(PyObject *pages)
{
    SealedPages *record = AS(SealedPages, pages);

    if (record == NULL || record->_blocks == NULL || !PyList_Check(record->_blocks)
        || record->free == NULL || record->_places == NULL) {
        PyErr_SetString(PyExc_TypeError, "backing that is no SealedPages");
        return NULL;
    }
    return record;
}

bool
sealed_has_room(PyObject *pages, int64_t wanted)
{
    SealedPages *record = AS(SealedPages, pages);

    return record != NULL && record->free != NULL && PyObject_Size(record->free) >= wanted;
}

/* The place of a page plus one; 0: it has none; -1: an error.  Also where that number is, or NULL. */
static int64_t
place_of(SealedPages *record, PyObject *index, int64_t *number, uint32_t **kept)
{
    if (!integer(index, number)) {
        PyErr_SetString(PyExc_TypeError, "the index of a page is no integer");
        return -1;
    }
    if (number_at(record->_places, *number, kept) < 0)
        return -1;
    return *kept == NULL ? 0 : **kept;
}

/* The block of a place, borrowed, and where the page is in it. */
static PyObject *
block_of(SealedPages *record, int64_t place, Py_ssize_t *start)
{
    *start = (Py_ssize_t)((place - 1) % BLOCK_PAGES * SEALED_BYTES);
    return PyList_GetItem(record->_blocks, (Py_ssize_t)((place - 1) / BLOCK_PAGES));
}

/* Remove and return the last of an array, which is not empty; by numbers, not by its method. */
static PyObject *
pop(PyObject *places)
{
    Py_ssize_t last = PyObject_Size(places) - 1;
    PyObject *place = last < 0 ? NULL : PySequence_GetItem(places, last);

    if (place != NULL && PySequence_DelItem(places, last) < 0)
        Py_CLEAR(place);
    return place;
}

int
sealed_put(PyObject *pages, PyObject *index, PyObject *sealed)
{
    SealedPages *record = record_of(pages);
    PyObject *block, *taken;
    uint32_t *kept;
    int64_t number, place = record == NULL ? -1 : place_of(record, index, &number, &kept);
    Py_ssize_t start;

    if (place < 0)
        return -1;
    if (!place) {
        if (!sealed_has_room(pages, 1))
            return effect(CALL(pages, put, index, sealed, NULL));
        taken = pop(record->free);
        if (taken == NULL || !integer(taken, &place)
            || number_put(record->_places, kept, number, ++place) < 0) {
            Py_XDECREF(taken);
            return -1;
        }
        Py_DECREF(taken);
    }
    block = block_of(record, place, &start);
    return block == NULL ? -1 : PySequence_SetSlice(block, start, start + SEALED_BYTES, sealed);
}

int
sealed_drop(PyObject *pages, PyObject *index)
{
    SealedPages *record = record_of(pages);
    PyObject *freed;
    uint32_t *kept;
    int64_t number, place = record == NULL ? -1 : place_of(record, index, &number, &kept);
    int status;

    if (place < 0)
        return -1;
    /* The last page: blocks are freed. */
    if (!place
        || PyObject_Size(record->free) + 1 == PyList_Size(record->_blocks) * BLOCK_PAGES)
        return effect(CALL(pages, drop, index, NULL));
    *kept = 0;
    if ((freed = PyLong_FromLongLong(place - 1)) == NULL)
        return -1;
    status = effect(CALL(record->free, append, freed, NULL));
    Py_DECREF(freed);
    return status;
}

/* --- places of sealed pages --------------------------------------------------------------------- */

void
sealed_release(struct sealed_place *place)
{
    if (place->bytes != NULL)
        PyBuffer_Release(&place->block);
    place->bytes = NULL;
}

/* The bytes of a place of a page: 1, or -1 with an error. */
static int
hold(SealedPages *record, struct sealed_place *place)
{
    Py_ssize_t start;
    PyObject *block = block_of(record, place->number, &start);

    if (block == NULL || PyObject_GetBuffer(block, &place->block, PyBUF_WRITABLE) < 0)
        return -1;
    place->bytes = (char *)place->block.buf + start;
    if (place->block.len >= start + SEALED_BYTES)
        return 1;
    sealed_release(place);
    PyErr_SetString(PyExc_ValueError, "a block of the backing is too short");
    return -1;
}

int
sealed_find(PyObject *pages, PyObject *index, struct sealed_place *place)
{
    SealedPages *record = record_of(pages);
    uint32_t *kept;

    place->bytes = NULL;
    place->number = record == NULL ? -1 : place_of(record, index, &place->index, &kept);
    return place->number <= 0 ? (int)place->number : hold(record, place);
}

int
sealed_room(PyObject *pages, PyObject *index, struct sealed_place *place)
{
    SealedPages *record = record_of(pages);
    PyObject *last;
    uint32_t *kept;
    Py_ssize_t count;
    int status;

    place->bytes = NULL;
    place->number = record == NULL ? -1 : place_of(record, index, &place->index, &kept);
    if (place->number)
        return place->number < 0 ? -1 : 0;
    if ((count = PySequence_Size(record->free)) <= 0)
        return (int)count;
    last = PySequence_GetItem(record->free, count - 1);
    status = last != NULL && integer(last, &place->number) ? 1 : -1;
    Py_XDECREF(last);
    place->number++;
    return status < 0 ? -1 : hold(record, place);
}

int
sealed_taken(PyObject *pages, struct sealed_place *place)
{
    SealedPages *record = record_of(pages);
    uint32_t *kept;

    if (record == NULL || PySequence_DelItem(record->free, PySequence_Size(record->free) - 1) < 0
        || number_at(record->_places, place->index, &kept) < 0)
        return -1;
    return number_put(record->_places, kept, place->index, place->number);
}
