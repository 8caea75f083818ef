/* What page tables and pagers ask of an address space: as softsgx.engines.native.tracing. */

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
is_one_mapping(PyObject *image, PyObject *memory, PyObject *start, PyObject *end)
{
    PyObject *mm = GET(image, mm), *found, *mapped = NULL;
    EnclaveVma *vma = NULL;
    uint64_t last, vma_end;
    int status = 0;

    if (mm == NULL || (found = mapping_at(mm, start)) == NULL) {
        Py_XDECREF(mm);
        return -1;
    }
    vma = AS(EnclaveVma, found);
    if (vma != NULL && address(end, &last) && address(vma->end, &vma_end) && last <= vma_end) {
        mapped = GETF(EnclaveFile, vma->file, memory);
        status = mapped == NULL ? -1 : mapped == memory;
    }
    Py_XDECREF(mapped);
    Py_DECREF(found);
    Py_DECREF(mm);
    return status;
}

PyObject *
parts_of(PyObject *table, PyObject *memory, PyObject *start, PyObject *end)
{
    PyObject *image = bound_to(((EnclavePageTable *)table)->_mapped_in, given.mapped_in);
    int status = 0;

    if (image != NULL)
        status = is_one_mapping(image, memory, start, end);
    else if (PyErr_Occurred())
        status = -1;
    Py_XDECREF(image);
    if (status < 0)
        return NULL;
    return status > 0 ? Py_BuildValue("[(OO)]", start, end)
                      : CALL(table, parts, memory, start, end, NULL);
}
