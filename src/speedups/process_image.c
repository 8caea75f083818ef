/* What page tables and pagers ask of an address space: as softsgx.engines.native.tracing. */

#include "driver.h"
#include "memory.h"

/* Whether a thread of an address space may be executing: as ThreadsOfImage.is_running(). */
static int
has_running_thread(PyObject *image)
{
    PyObject *threads = GET(image, threads), *faulting = GETF(FaultingImage, image, faulting);
    PyObject *each = NULL, *thread;
    int status = threads == NULL || faulting == NULL ? -1 : 0;

    if (status == 0 && (each = PyMapping_Values(threads)) == NULL)
        status = -1;
    for (Py_ssize_t index = 0; status == 0 && index < PyList_Size(each); index++) {
        thread = PyList_GetItem(each, index);
        if (thread != faulting)
            status = GET_TRUTH(FaultingThread, thread, running);
    }
    Py_XDECREF(each);
    Py_XDECREF(faulting);
    Py_XDECREF(threads);
    return status;
}

int
is_running(PyObject *function)
{
    PyObject *image = bound_to(function, given.is_running);
    int status;

    if (image == NULL)
        return PyErr_Occurred() ? -1 : is_so(PyObject_CallNoArgs(function));
    status = has_running_thread(image);
    Py_DECREF(image);
    return status;
}

/* Whether one mapping has a range, and maps a memory file: 0, 1, or -1 with an error. */
static int
is_one_mapping(PyObject *image, PyObject *memory, struct run range)
{
    PyObject *mm = GET(image, mm), *mapped = NULL;
    PyObject *found = mm == NULL ? NULL : mapping_at(mm, range.start);
    EnclaveVma *vma = AS(EnclaveVma, found);
    int status = found == NULL ? -1 : 0;

    if (vma != NULL && range.end <= vma->end) {
        mapped = GETF(EnclaveFile, vma->file, memory);
        status = mapped == NULL ? -1 : mapped == memory;
    }
    Py_XDECREF(mapped);
    Py_XDECREF(found);
    Py_XDECREF(mm);
    return status;
}

/* The same in Python. */
static int
add_by_method(PyObject *table, PyObject *memory, struct run range, struct runs *parts)
{
    PyObject *start = PyLong_FromUnsignedLongLong(range.start);
    PyObject *end = PyLong_FromUnsignedLongLong(range.end), *found = NULL;
    unsigned long long first, last;
    int status = start == NULL || end == NULL ? -1 : 0;

    if (status == 0 && (found = CALL(table, parts, memory, start, end, NULL)) == NULL)
        status = -1;
    for (Py_ssize_t index = 0; status == 0 && index < PyList_Size(found); index++)
        status = PyArg_ParseTuple(PyList_GetItem(found, index), "KK", &first, &last)
            ? add_run(parts, (struct run){first, last})
            : -1;
    Py_XDECREF(found);
    Py_XDECREF(end);
    Py_XDECREF(start);
    return status;
}

int
add_parts(PyObject *table, PyObject *memory, struct run range, struct runs *parts)
{
    PyObject *image = bound_to(((EnclavePageTable *)table)->_mapped_in, given.mapped_in);
    int status = 0;

    if (image != NULL)
        status = is_one_mapping(image, memory, range);
    else if (PyErr_Occurred())
        status = -1;
    Py_XDECREF(image);
    if (status < 0)
        return -1;
    return status ? add_run(parts, range) : add_by_method(table, memory, range, parts);
}
