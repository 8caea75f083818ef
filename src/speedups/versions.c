/* Versions of evicted pages: those that a VA page holds, and the next one of a paging key. */

#include "leaves.h"

#include <string.h>

#define VERSION_STEP 8

/* --- of a VA page ------------------------------------------------------------------------------- */

/* As array("Q") of 512 integers. */
typedef struct {
    PyObject_HEAD
    uint64_t words[VA_SLOTS];
} VaVersions;

/* What count(8, 8) is in Python. */
typedef struct {
    PyObject_HEAD
    uint64_t last;
} VersionCounter;

static PyTypeObject *versions_type, *counter_type;

static PyObject *
new_versions(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(named))
{
    const char *bytes;
    Py_ssize_t length;
    PyObject *made;

    if (!PyArg_ParseTuple(args, "y#", &bytes, &length))
        return NULL;
    if (length != PAGE_BYTES) {
        PyErr_SetString(PyExc_ValueError, "the versions of a VA page are 4096 bytes");
        return NULL;
    }
    made = PyType_GenericAlloc(type, 0);
    if (made != NULL)
        memcpy(((VaVersions *)made)->words, bytes, PAGE_BYTES); /* x86 is little-endian */
    return made;
}

static Py_ssize_t
length_of(PyObject *Py_UNUSED(self))
{
    return VA_SLOTS;
}

static bool
is_slot(int64_t slot)
{
    if (slot >= 0 && slot < VA_SLOTS)
        return true;
    PyErr_SetString(PyExc_IndexError, "a VA page has 512 versions");
    return false;
}

static PyObject *
get_item(PyObject *self, Py_ssize_t slot)
{
    return is_slot(slot) ? PyLong_FromUnsignedLongLong(((VaVersions *)self)->words[slot]) : NULL;
}

static int
set_item(PyObject *self, Py_ssize_t slot, PyObject *value)
{
    uint64_t version;

    if (!is_slot(slot))
        return -1;
    if (value == NULL) {
        PyErr_SetString(PyExc_TypeError, "a version cannot be deleted");
        return -1;
    }
    version = PyLong_AsUnsignedLongLong(value);
    if (version == (uint64_t)-1 && PyErr_Occurred())
        return -1;
    ((VaVersions *)self)->words[slot] = version;
    return 0;
}

static PyType_Slot versions_slots[] = {
    {Py_tp_doc, "VaVersions(bytes): the versions of a VA page, from its 4096 bytes."},
    {Py_tp_new, (void *)new_versions},
    {Py_tp_dealloc, (void *)free_object},
    {Py_sq_length, (void *)length_of},
    {Py_sq_item, (void *)get_item},
    {Py_sq_ass_item, (void *)set_item},
    {0, NULL},
};

static PyType_Spec versions_spec = {
    .name = "softsgx._speedups.VaVersions",
    .basicsize = sizeof(VaVersions),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = versions_slots,
};

int
get_version(const EpcPage *va_page, int64_t slot, uint64_t *version)
{
    PyObject *slots = va_page->slots, *found;
    int status;

    if (Py_IS_TYPE(slots, versions_type)) {
        if (!is_slot(slot))
            return -1;
        *version = ((VaVersions *)slots)->words[slot];
        return 0;
    }
    found = PySequence_GetItem(slots, (Py_ssize_t)slot);
    status = found == NULL || !unsigned_of(found, version) ? -1 : 0;
    Py_XDECREF(found);
    return status;
}

int
put_version(EpcPage *va_page, int64_t slot, uint64_t version)
{
    PyObject *slots = va_page->slots, *number;
    int status;

    if (Py_IS_TYPE(slots, versions_type)) {
        if (!is_slot(slot))
            return -1;
        ((VaVersions *)slots)->words[slot] = version;
        return 0;
    }
    number = PyLong_FromUnsignedLongLong(version);
    status = number == NULL ? -1 : PySequence_SetItem(slots, (Py_ssize_t)slot, number);
    Py_XDECREF(number);
    return status;
}

/* --- of a paging key ---------------------------------------------------------------------------- */

/* The interpreter's lock makes this one step, as next() of an iterator in C. */
static int
count_on(VersionCounter *counter, uint64_t *version)
{
    if (__builtin_add_overflow(counter->last, VERSION_STEP, version)) {
        PyErr_SetString(PyExc_AssertionError, "the versions of a paging key have ended");
        return -1;
    }
    counter->last = *version;
    return 0;
}

static PyObject *
next_of(PyObject *self)
{
    uint64_t version;

    return count_on((VersionCounter *)self, &version) < 0 ? NULL
                                                          : PyLong_FromUnsignedLongLong(version);
}

static PyType_Slot counter_slots[] = {
    {Py_tp_doc, "VersionCounter(): an iterator over versions: 8, 16, 24 …"},
    {Py_tp_new, (void *)PyType_GenericNew},
    {Py_tp_dealloc, (void *)free_object},
    {Py_tp_iter, (void *)PyObject_SelfIter},
    {Py_tp_iternext, (void *)next_of},
    {0, NULL},
};

static PyType_Spec counter_spec = {
    .name = "softsgx._speedups.VersionCounter",
    .basicsize = sizeof(VersionCounter),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = counter_slots,
};

int
next_version(PyObject *key, uint64_t *version)
{
    PyObject *versions = GETF(PagingKey, key, _versions), *found;
    int status;

    if (versions == NULL)
        return -1;
    if (Py_IS_TYPE(versions, counter_type)) {
        status = count_on((VersionCounter *)versions, version);
        Py_DECREF(versions);
        return status;
    }
    found = PyIter_Next(versions);
    Py_DECREF(versions);
    if (found == NULL && !PyErr_Occurred())
        PyErr_SetString(PyExc_AssertionError, "the versions of a paging key have ended");
    status = found == NULL || !unsigned_of(found, version) ? -1 : 0;
    Py_XDECREF(found);
    return status;
}

int
add_versions(PyObject *module)
{
    if (versions_type == NULL)
        versions_type = (PyTypeObject *)PyType_FromSpec(&versions_spec);
    if (counter_type == NULL)
        counter_type = (PyTypeObject *)PyType_FromSpec(&counter_spec);
    if (versions_type == NULL || counter_type == NULL
        || PyModule_AddObjectRef(module, "VaVersions", (PyObject *)versions_type) < 0)
        return -1;
    return PyModule_AddObjectRef(module, "VersionCounter", (PyObject *)counter_type);
}
