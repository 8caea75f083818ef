/* Counts by label: what Counters.held and EnclaveCounts.faults are, a mapping (softsgx.paging.counters). */

#include "paging.h"

#include <string.h>

/* The labels in the order in which they were put first, as those of a dict are. */
struct entry {
    PyObject *label; /* a string */
    int64_t count;
};
typedef struct {
    PyObject_HEAD
    struct entry *entries;
    Py_ssize_t used, room;
} Tally;

static PyObject *tally_type;

/* The entry of a label; NULL: it has none. */
static struct entry *
find(Tally *tally, PyObject *label)
{
    struct entry *end = tally->entries + tally->used;

    for (struct entry *one = tally->entries; one < end; one++)
        if (one->label == label)
            return one;
    if (PyUnicode_Check(label))
        for (struct entry *one = tally->entries; one < end; one++)
            if (PyUnicode_Compare(one->label, label) == 0)
                return one;
    return NULL;
}

/* The same, with a new entry of 0 where there is none; NULL with an error. */
static struct entry *
make(Tally *tally, PyObject *label)
{
    struct entry *found = find(tally, label), *entries;

    if (found != NULL)
        return found;
    if (!PyUnicode_Check(label)) {
        PyErr_SetString(PyExc_TypeError, "the label of a count is a string");
        return NULL;
    }
    if (tally->used == tally->room) {
        entries = PyMem_Realloc(tally->entries, (size_t)(tally->room + 8) * sizeof *entries);
        if (entries == NULL) {
            PyErr_NoMemory();
            return NULL;
        }
        tally->entries = entries;
        tally->room += 8;
    }
    found = tally->entries + tally->used++;
    Py_INCREF(found->label = label);
    found->count = 0;
    return found;
}

/* The same of a mapping of Python. */
static int
add_to_dict(PyObject *counts, PyObject *label, int64_t change)
{
    PyObject *found = PyDict_GetItemWithError(counts, label), *number;
    int64_t count = 0;
    int status = -1;

    if (found != NULL && !integer(found, &count))
        PyErr_SetString(PyExc_TypeError, "the count of a label is no integer");
    number = PyErr_Occurred() || add_to_count(&count, change) < 0 ? NULL : PyLong_FromLongLong(count);
    if (number != NULL)
        status = PyDict_SetItem(counts, label, number);
    Py_XDECREF(number);
    return status;
}

static bool
is_tally(PyObject *object)
{
    return object != NULL
        && (is_exactly(object, given.Tally)
            || PyType_IsSubtype(Py_TYPE(object), (PyTypeObject *)tally_type));
}

bool
has_counts(PyObject *object)
{
    return is_tally(object) || (object != NULL && PyDict_Check(object));
}

int
count_label(PyObject *counts, PyObject *label, int64_t change)
{
    struct entry *entry;

    if (is_tally(counts))
        return (entry = make((Tally *)counts, label)) == NULL ? -1
                                                              : add_to_count(&entry->count, change);
    if (has_counts(counts))
        return add_to_dict(counts, label, change);
    PyErr_SetString(PyExc_TypeError, "counts by label are no Tally");
    return -1;
}

/* --- the mapping -------------------------------------------------------------------------------- */

static void
dealloc(PyObject *self)
{
    Tally *tally = (Tally *)self;

    for (Py_ssize_t index = 0; index < tally->used; index++)
        Py_DECREF(tally->entries[index].label);
    PyMem_Free(tally->entries);
    free_object(self);
}

static Py_ssize_t
length(PyObject *self)
{
    return ((Tally *)self)->used;
}

static int
contains(PyObject *self, PyObject *label)
{
    return find((Tally *)self, label) != NULL;
}

static PyObject *
get_item(PyObject *self, PyObject *label)
{
    struct entry *entry = find((Tally *)self, label);

    if (entry != NULL)
        return PyLong_FromLongLong(entry->count);
    PyErr_SetObject(PyExc_KeyError, label);
    return NULL;
}

static int
delete_item(Tally *tally, PyObject *label)
{
    struct entry *entry = find(tally, label);
    PyObject *old;

    if (entry == NULL) {
        PyErr_SetObject(PyExc_KeyError, label);
        return -1;
    }
    old = entry->label;
    tally->used--;
    memmove(entry, entry + 1, (size_t)((char *)(tally->entries + tally->used) - (char *)entry));
    Py_DECREF(old);
    return 0;
}

static int
set_item(PyObject *self, PyObject *label, PyObject *value)
{
    struct entry *entry;
    int64_t count;

    if (value == NULL)
        return delete_item((Tally *)self, label);
    count = PyLong_AsLongLong(value);
    if ((count == -1 && PyErr_Occurred()) || (entry = make((Tally *)self, label)) == NULL)
        return -1;
    entry->count = count;
    return 0;
}

/* An iterator over the labels that there are now. */
static PyObject *
iterate(PyObject *self)
{
    Tally *tally = (Tally *)self;
    PyObject *labels = PyList_New(0), *iterator = NULL;
    int status = labels == NULL ? -1 : 0;

    for (Py_ssize_t index = 0; status == 0 && index < tally->used; index++)
        status = PyList_Append(labels, tally->entries[index].label);
    if (status == 0)
        iterator = PyObject_GetIter(labels);
    Py_XDECREF(labels);
    return iterator;
}

int
add_tallies(PyObject *module)
{
    PyType_Slot slots[] = {
        {Py_tp_dealloc, (void *)dealloc},
        {Py_tp_iter, (void *)iterate},
        {Py_mp_length, (void *)length},
        {Py_mp_subscript, (void *)get_item},
        {Py_mp_ass_subscript, (void *)set_item},
        {Py_sq_contains, (void *)contains},
        {0, NULL},
    };
    PyType_Spec spec = {
        .name = "softsgx._speedups.Tally",
        .basicsize = sizeof(Tally),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
        .slots = slots,
    };

    if (tally_type == NULL)
        tally_type = PyType_FromSpec(&spec);
    return tally_type == NULL ? -1 : PyModule_AddObjectRef(module, "Tally", tally_type);
}
