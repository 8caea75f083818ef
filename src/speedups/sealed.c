/* Evicted pages: as SwapEntries and SealedPages of softsgx.paging. */

#include "paging.h"
#include "places.h"

/* --- entries ------------------------------------------------------------------------------------ */

#define LOST 1
#define FIRST 2

static SwapEntries *
entries_of(PyObject *swap, PyObject **owned)
{
    SwapEntries *entries;

    *owned = GETF(CompiledSwap, swap, entries);
    entries = AS(SwapEntries, *owned);
    if (*owned == NULL)
        return NULL;
    if (entries != NULL && entries->_numbers != NULL && entries->_va_pages != NULL
        && PyDict_Check(entries->_va_pages))
        return entries;
    PyErr_SetString(PyExc_TypeError, "entries of pages that are no SwapEntries");
    return NULL;
}

/* Where the version of an evicted page is, with a reference to its VA page: 1; 0: C code does not
 * know of it (as where the page is resident or lost); or -1 with an error. */
int
entry_place(PyObject *swap, int64_t index, struct place *place)
{
    PyObject *owned, *va_index = NULL;
    uint32_t *kept;
    int64_t number;
    SwapEntries *entries = entries_of(swap, &owned);
    int status = -1;

    place->page = NULL;
    if (entries == NULL || number_at(entries->_numbers, index, &kept) < 0)
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
entry_get(PyObject *swap, int64_t index)
{
    PyObject *entries = GETF(CompiledSwap, swap, entries), *entry = NULL;

    if (entries != NULL)
        entry = call_with(entries, names.get, PyLong_FromLongLong(index), NULL);
    Py_XDECREF(entries);
    return entry;
}

/* As put() of SwapEntries and of SealedPages, in Python: the latter makes room for a page. */
static int
put_readably(PyObject *object, int64_t index, PyObject *value)
{
    return effect(call_with(object, names.put, PyLong_FromLongLong(index), value));
}

int
entry_put(PyObject *swap, int64_t index, PyObject *object)
{
    PyObject *owned;
    uint32_t *kept;
    int64_t va_index, number;
    SwapEntries *entries = entries_of(swap, &owned);
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
        status = put_readably(owned, index, object);
        goto done;
    }
    if (number_at(entries->_numbers, index, &kept) == 0)
        status = number_put(entries->_numbers, kept, index, number);
done:
    Py_XDECREF(owned);
    return status;
}

int
entry_written(PyObject *swap, int64_t index, const struct written *written)
{
    PyObject *owned;
    uint32_t *kept;
    SwapEntries *entries;
    int status = -1;

    if (written->place.page == NULL)
        return entry_put(swap, index, written->entry);
    entries = entries_of(swap, &owned);
    if (entries != NULL && number_at(entries->_numbers, index, &kept) == 0)
        status = number_put(entries->_numbers, kept, index,
                            written->place.page->index * VA_SLOTS + written->place.number + FIRST);
    Py_XDECREF(owned);
    return status;
}

/* --- sealed pages ------------------------------------------------------------------------------- */

/* A page of a SealedPages: its place plus one (0: it has none), and where that number is, or NULL. */
struct page {
    SealedPages *pages;
    Places *free;
    int64_t index, place;
    uint32_t *kept;
};

/* Find a page; false with an error. */
static bool
find_page(PyObject *pages, int64_t index, struct page *page)
{
    SealedPages *record = AS(SealedPages, pages);

    page->pages = record;
    page->free = record == NULL ? NULL : as_places(record->free);
    if (page->free == NULL || record->_blocks == NULL || !PyList_Check(record->_blocks)) {
        PyErr_SetString(PyExc_TypeError, "backing that is no SealedPages");
        return false;
    }
    page->index = index;
    if (number_at(record->_places, index, &page->kept) < 0)
        return false;
    page->place = page->kept == NULL ? 0 : *page->kept;
    return true;
}

bool
sealed_has_room(PyObject *pages, int64_t wanted)
{
    SealedPages *record = AS(SealedPages, pages);
    Places *places = record == NULL ? NULL : as_places(record->free);

    return places != NULL && places->count >= wanted;
}

/* The last free place is that of the page now. */
static int
take_last(struct page *page)
{
    page->free->count--;
    return number_put(page->pages->_places, page->kept, page->index, page->place);
}

int
sealed_put(PyObject *pages, int64_t index, PyObject *sealed)
{
    struct page page;
    Py_ssize_t start;
    PyObject *block;

    if (!find_page(pages, index, &page))
        return -1;
    if (!page.place) {
        if (page.free->count == 0)
            return put_readably(pages, index, sealed);
        page.place = (int64_t)page.free->numbers[page.free->count - 1] + 1;
        if (take_last(&page) < 0)
            return -1;
    }
    start = (Py_ssize_t)((page.place - 1) % SEALED_BLOCK_PAGES * SEALED_BYTES);
    block = PyList_GetItem(page.pages->_blocks, (Py_ssize_t)((page.place - 1) / SEALED_BLOCK_PAGES));
    return block == NULL ? -1 : PySequence_SetSlice(block, start, start + SEALED_BYTES, sealed);
}

int
sealed_drop(PyObject *pages, int64_t index)
{
    struct page page;

    if (!find_page(pages, index, &page))
        return -1;
    if (page.place && page.free->count + 1 < PyList_Size(page.pages->_blocks) * SEALED_BLOCK_PAGES) {
        *page.kept = 0;
        return places_append(page.free, (uint32_t)(page.place - 1));
    }
    /* There is none, or it is the last page: blocks are freed. */
    return effect(call_with(pages, names.drop, PyLong_FromLongLong(index), NULL));
}

/* --- places of sealed pages --------------------------------------------------------------------- */

void
sealed_release(struct sealed_place *place)
{
    place->bytes = NULL;
    Py_CLEAR(place->keeper);
}

/* The bytes of the place of a page: 1, or -1 with an error. */
static int
hold(const struct page *page, struct sealed_place *place)
{
    place->index = page->index;
    place->number = page->place;
    place->bytes = places_memory(page->free, page->pages->_blocks, page->place - 1);
    if (place->bytes == NULL)
        return -1;
    Py_INCREF(place->keeper = (PyObject *)page->free);
    return 1;
}

int
sealed_find(PyObject *pages, int64_t index, struct sealed_place *place)
{
    struct page page;

    place->bytes = NULL;
    place->keeper = NULL;
    if (!find_page(pages, index, &page))
        return -1;
    return page.place ? hold(&page, place) : 0;
}

int
sealed_room(PyObject *pages, int64_t index, struct sealed_place *place)
{
    struct page page;

    place->bytes = NULL;
    place->keeper = NULL;
    if (!find_page(pages, index, &page))
        return -1;
    if (page.place || page.free->count == 0)
        return 0;
    page.place = (int64_t)page.free->numbers[page.free->count - 1] + 1;
    return hold(&page, place);
}

int
sealed_taken(PyObject *pages, struct sealed_place *place)
{
    struct page page;

    if (!find_page(pages, place->index, &page))
        return -1;
    if (page.place || page.free->count == 0
        || page.free->numbers[page.free->count - 1] != (uint32_t)(place->number - 1)) {
        PyErr_SetString(PyExc_AssertionError, "a place was taken while a page was written to it");
        return -1;
    }
    page.place = place->number;
    return take_last(&page);
}
