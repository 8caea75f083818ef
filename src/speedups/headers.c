/* Structures of the manual as bytes. */

#include "speedups.h"

#include <stdint.h>
#include <string.h>

#define MAC_HEADER_BYTES 128

static PyObject *
mac_header(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    /* EID, LINADDR, SECINFO.FLAGS; the rest is zero. */
    uint64_t header[MAC_HEADER_BYTES / sizeof(uint64_t)] = {0};

    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "mac_header() takes 3 integers");
        return NULL;
    }
    for (Py_ssize_t index = 0; index < count; index++) {
        header[index] = PyLong_AsUnsignedLongLong(args[index]);
        if (header[index] == (uint64_t)-1 && PyErr_Occurred())
            return NULL;
    }
    return PyBytes_FromStringAndSize((const char *)header, sizeof header);
}

static PyMethodDef functions[] = {
    {"mac_header", (PyCFunction)(void (*)(void))mac_header, METH_FASTCALL,
     "mac_header(eid, linaddr, flags): the 128 bytes that the MAC of an evicted page covers."},
    {NULL, NULL, 0, NULL},
};

int
add_headers(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
