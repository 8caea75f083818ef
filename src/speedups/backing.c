/* VA slots and backing of evicted pages: as VaArray and FlatFile of softsgx.paging. */

#include "speedups.h"

/* --- VA slots ----------------------------------------------------------------------------------- */

/* The bit of a slot, as the bitmaps of VA pages have it. */
static PyObject *
bit_of(int64_t number)
{
    PyObject *one = PyLong_FromLong(1), *places = PyLong_FromLongLong(number), *bit = NULL;

    if (one != NULL && places != NULL)
        bit = PyNumber_Lshift(one, places);
    Py_XDECREF(places);
    Py_XDECREF(one);
    return bit;
}

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

/* Replace a field by what a function makes of it and another number. */
static int
combine(PyObject **field, PyObject *(*function)(PyObject *, PyObject *), PyObject *other)
{
    PyObject *result = function(*field, other), *old = *field;

    if (result == NULL)
        return -1;
    *field = result;
    Py_DECREF(old);
    return 0;
}

/* As VaArray.slot_loaded(). */
int
slot_loaded(PyObject *va, struct place *slot)
{
    VaPage *page = slot->page;
    PyObject *bit, *pages;
    int status;

    if (!is_exactly(va, given.VaArray)) {
        PyObject *object = (PyObject *)make_slot(page, slot->number);

        status = object == NULL ? -1 : effect(CALL(va, slot_loaded, object, NULL));
        Py_XDECREF(object);
        return status;
    }
    set_field(&page->accessed, Py_True);
    bit = bit_of(slot->number);
    if (bit == NULL)
        return -1;
    status = combine(&page->free, PyNumber_Or, bit);
    Py_DECREF(bit);
    if (status < 0 || ADD_INTEGER(VaArray, va, used, -1) < 0)
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
    int64_t promised, used, stale, pins;

    if (page == NULL || !is_exactly(va, given.VaArray) || !integer(page->stale, &stale) || stale
        || !integer(page->pins, &pins))
        return effect(CALL(va, slot_written, (PyObject *)slot, NULL));
    if (set_integer(&page->pins, --pins) < 0)
        return -1;
    epc = AS(SgxEpcPage, page->epc);
    if (pins || (epc != NULL && is_true(epc->tracked)))  // stays as it is, or is listed already
        return 0;
    if (GET_INTEGER(VaArray, va, promised, &promised) < 0
        || GET_INTEGER(VaArray, va, used, &used) < 0)
        return -1;
    if (promised == used || PyObject_Not(page->free) > 0)
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
    if (page == NULL || PyObject_Not(page->free) != 0 || is_none(page->epc)
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
    PyObject *one = PyLong_FromLong(1), *less = NULL, *rest = NULL, *bit = NULL, *bits = NULL;
    VaSlot *slot = NULL;
    int64_t length;
    int full;

    if (one == NULL || (less = PyNumber_Subtract(page->free, one)) == NULL
        || (rest = PyNumber_And(page->free, less)) == NULL
        || (bit = PyNumber_Xor(page->free, rest)) == NULL
        || (bits = CALL0(bit, bit_length)) == NULL)
        goto done;
    set_field(&page->free, rest);
    if (add_to_field(&page->pins, 1) < 0)
        goto done;
    set_field(&page->accessed, Py_True);
    full = PyObject_Not(rest);
    if (ADD_INTEGER(VaArray, va, used, 1) < 0 || ADD_INTEGER(VaArray, va, room, -1) < 0 || full < 0
        || (full && effect(CALL(pages, move_to_end, (PyObject *)page, NULL)) < 0))
        goto done;
    if (integer(bits, &length))
        slot = make_slot(page, length - 1);
done:
    Py_XDECREF(bits);
    Py_XDECREF(bit);
    Py_XDECREF(rest);
    Py_XDECREF(less);
    Py_XDECREF(one);
    return (PyObject *)slot;
}

/* --- backing ------------------------------------------------------------------------------------ */

static PyObject *
group_of(PyObject *index)
{
    int64_t value;

    if (!integer(index, &value)) {
        PyErr_SetString(PyExc_TypeError, "the index of a page is no integer");
        return NULL;
    }
    return PyLong_FromLongLong(value >> 5);  // PCMDS_PER_PAGE
}

/* The number of PCMDs that share a page: 0, or -1 with an error. */
static int
count_sharers(PyObject *sharers, PyObject *group, int64_t *count)
{
    PyObject *found = PyDict_GetItemWithError(sharers, group);

    *count = 0;
    if (found != NULL && !integer(found, count))
        PyErr_SetString(PyExc_TypeError, "the number of PCMDs is no integer");
    return PyErr_Occurred() ? -1 : 0;
}

static int
put_sharers(PyObject *sharers, PyObject *group, int64_t count)
{
    PyObject *number = PyLong_FromLongLong(count);
    int status = number == NULL ? -1 : PyDict_SetItem(sharers, group, number);

    Py_XDECREF(number);
    return status;
}

/* As FlatFile.reserve(), of a file without a limit that has a buffer. */
PyObject *
reserve(PyObject *file, PyObject *flat, PyObject *buffers, PyObject *index)
{
    PyObject *sharers = GETF(FlatFile, file, _sharers), *group = group_of(index), *pinned = NULL;
    Py_ssize_t last = PyList_Size(buffers) - 1;
    int64_t count;

    if (sharers == NULL || group == NULL || count_sharers(sharers, group, &count) < 0
        || put_sharers(sharers, group, count + 1) < 0 || ADD_INTEGER(FlatBacking, flat, reserved, 1) < 0)
        goto done;
    pinned = PyList_GetItem(buffers, last);
    if (pinned == NULL)
        goto done;
    Py_INCREF(pinned);
    set_field(&((Pinned *)pinned)->index, index);
    if (PyList_SetSlice(buffers, last, last + 1, NULL) < 0)
        Py_CLEAR(pinned);
done:
    Py_XDECREF(group);
    Py_XDECREF(sharers);
    return pinned;
}

/* Whether a pair of SECINFO flags and EID is that of most pages: 0, 1, or -1 with an error. */
static int
is_usual(PyObject *flat, PyObject *sealed)
{
    PyObject *usual = GETF(FlatBacking, flat, usual);
    int same = usual == NULL ? -1 : PyTuple_Check(usual) && PyTuple_Size(usual) == 2;

    for (Py_ssize_t index = 0; same > 0 && index < 2; index++)
        same = PyObject_RichCompareBool(PyTuple_GetItem(sealed, index + 1),
                                        PyTuple_GetItem(usual, index), Py_EQ);
    Py_XDECREF(usual);
    return same;
}

/* As FlatFile.keep(). */
int
keep(PyObject *file, PyObject *pinned, PyObject *sealed)
{
    PyObject *flat = GETF(FlatFile, file, _flat), *contents = NULL, *buffers = NULL;
    int usual = flat == NULL ? -1 : is_usual(flat, sealed), status = -1;

    if (usual < 0)
        goto done;
    if (!usual) {
        status = effect(CALL(file, keep, pinned, sealed, NULL));
        goto done;
    }
    contents = GETF(FlatFile, file, _sealed);
    buffers = GETF(FlatFile, file, _buffers);
    if (contents != NULL && buffers != NULL && ADD_INTEGER(FlatBacking, flat, reserved, -1) == 0
        && sealed_put(contents, ((Pinned *)pinned)->index, PyTuple_GetItem(sealed, 0)) == 0)
        status = PyList_Append(buffers, pinned);
done:
    Py_XDECREF(buffers);
    Py_XDECREF(contents);
    Py_XDECREF(flat);
    return status;
}

/* What FlatFile.kept() returns, its parts new references; 0: no such page, -1: an error. */
int
kept(PyObject *file, PyObject *index, PyObject **sealed, PyObject **flags)
{
    PyObject *contents = GETF(FlatFile, file, _sealed), *flat = GETF(FlatFile, file, _flat), *unusual = NULL;
    PyObject *usual = NULL, *kind = NULL;
    int found = -1;

    if (contents == NULL || flat == NULL || (unusual = GETF(FlatBacking, flat, unusual)) == NULL
        || (usual = GETF(FlatBacking, flat, usual)) == NULL)
        goto done;
    *sealed = sealed_get(contents, index);
    kind = *sealed == NULL ? NULL : PyDict_GetItemWithError(unusual, index);
    if (PyErr_Occurred())
        goto done;
    if (kind == NULL)
        kind = usual;
    found = *sealed != NULL && PyTuple_Check(kind);
    if (found) {
        *flags = PyTuple_GetItem(kind, 0);
        Py_XINCREF(*flags);
    }
done:
    Py_XDECREF(usual);
    Py_XDECREF(unusual);
    Py_XDECREF(flat);
    Py_XDECREF(contents);
    return found;
}

/* As FlatFile.forget(). */
int
forget(PyObject *file, Counters *counters, PyObject *index)
{
    PyObject *contents = GETF(FlatFile, file, _sealed), *flat = GETF(FlatFile, file, _flat), *unusual = NULL;
    PyObject *sharers = GETF(FlatFile, file, _sharers), *group = group_of(index);
    int64_t count;
    int status = -1;

    if (contents == NULL || flat == NULL || sharers == NULL || group == NULL
        || (unusual = GETF(FlatBacking, flat, unusual)) == NULL || sealed_drop(contents, index) < 0)
        goto done;
    if (PyDict_Size(unusual) > 0 && effect(CALL(unusual, pop, index, Py_None, NULL)) < 0)
        goto done;
    if (add_to_field(&counters->truncated, 1) < 0 || count_sharers(sharers, group, &count) < 0)
        goto done;
    status = count > 1 ? put_sharers(sharers, group, count - 1)
                       : effect(CALL(file, _leave, index, NULL));
done:
    Py_XDECREF(group);
    Py_XDECREF(sharers);
    Py_XDECREF(unusual);
    Py_XDECREF(flat);
    Py_XDECREF(contents);
    return status;
}
