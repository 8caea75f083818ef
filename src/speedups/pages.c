/* Enclave memory: userfaultfd and memory files, a page or a run of pages at a time.
 *
 * The readable form is softsgx/engines/native/kernel.py. */

#define _GNU_SOURCE

#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#define COPY 0xC028AA03
#define WRITEPROTECT 0xC018AA06
#define MOST_AT_ONCE 64

/* An ioctl that is repeated while the mappings are changing.
 * Return errno, or -1: a Python error is set. */
static int
until_done(int descriptor, unsigned long command, void *argument)
{
    int result, code;

    for (;;) {
        Py_BEGIN_ALLOW_THREADS
        result = ioctl(descriptor, command, argument);
        code = errno;
        Py_END_ALLOW_THREADS
        if (result != -1)
            return 0;
        if (code != EAGAIN)
            return code;
        if (PyErr_CheckSignals() < 0)
            return -1;
    }
}

static PyObject *
number_or_error(int code)
{
    return code < 0 ? NULL : PyLong_FromLong(code);
}

int
copy_to(int uffd, uint64_t linaddr, uint64_t mode, PyObject *data)
{
    static const char zeros[PAGE_BYTES];
    uint64_t words[5] = {linaddr, (uintptr_t)zeros, PAGE_BYTES, mode, 0};
    Py_buffer bytes;
    int code;

    if (data == NULL)
        return until_done(uffd, COPY, words);
    if (PyObject_GetBuffer(data, &bytes, PyBUF_SIMPLE) < 0)
        return -1;
    words[1] = (uintptr_t)bytes.buf;
    if (bytes.len == PAGE_BYTES)
        code = until_done(uffd, COPY, words);
    else {
        PyErr_SetString(PyExc_ValueError, "copy_page() takes the bytes of one page");
        code = -1;
    }
    PyBuffer_Release(&bytes);
    return code;
}

static PyObject *
copy_page(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    uint64_t values[3];

    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "copy_page() takes 4 arguments");
        return NULL;
    }
    if (read_words("copy_page", args, 3, values, 3) < 0)
        return NULL;
    return number_or_error(copy_to((int)values[0], values[1], values[2], args[3]));
}

static PyObject *
protect_pages(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    uint64_t values[4], words[3];

    if (read_words("protect_pages", args, count, values, 4) < 0)
        return NULL;
    words[0] = values[1];
    words[1] = values[2] - values[1];
    words[2] = values[3];
    return number_or_error(until_done((int)values[0], WRITEPROTECT, words));
}

/* Read up to MOST_AT_ONCE pages from ``start``: 0, or -1 with an error, and no contents. */
static int
read_some(int descriptor, off_t start, int pages, PyObject **contents)
{
    struct iovec parts[MOST_AT_ONCE];
    ssize_t got = 0;
    int count = 0, code = 0;

    for (; count < pages; count++) {
        contents[count] = PyBytes_FromStringAndSize(NULL, PAGE_BYTES);
        if (contents[count] == NULL)
            goto failed;
        parts[count].iov_base = PyBytes_AsString(contents[count]);
        parts[count].iov_len = PAGE_BYTES;
    }
    do {
        Py_BEGIN_ALLOW_THREADS
        got = preadv(descriptor, parts, pages, start);
        code = errno;
        Py_END_ALLOW_THREADS
    } while (got < 0 && code == EINTR && PyErr_CheckSignals() == 0);
    if (got == (ssize_t)pages * PAGE_BYTES)
        return 0;
    if (!PyErr_Occurred()) {
        errno = got < 0 ? code : EIO;
        PyErr_SetFromErrno(PyExc_OSError);
    }
failed:
    while (count-- > 0)
        Py_CLEAR(contents[count]);
    return -1;
}

static int
punch(int descriptor, off_t start, off_t length)
{
    int result, code;

    Py_BEGIN_ALLOW_THREADS
    result = fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, length);
    code = errno;
    Py_END_ALLOW_THREADS
    if (result == -1) {
        errno = code;
        PyErr_SetFromErrno(PyExc_OSError);
    }
    return result;
}

int
take_run(int descriptor, uint64_t start, uint64_t end, PyObject **contents)
{
    for (uint64_t at = start; at < end; at += (uint64_t)MOST_AT_ONCE * PAGE_BYTES) {
        uint64_t rest = (end - at) / PAGE_BYTES;
        int pages = rest < MOST_AT_ONCE ? (int)rest : MOST_AT_ONCE;

        if (read_some(descriptor, (off_t)at, pages, contents) < 0)
            return -1;
        contents += pages;
    }
    return punch(descriptor, (off_t)start, (off_t)(end - start));
}

/* The bytes of a run of pages, appended to a list. */
static int
append_run(int descriptor, uint64_t start, uint64_t end, PyObject *list)
{
    PyObject *contents[MOST_AT_ONCE];
    int status = 0;

    for (uint64_t at = start; at < end; at += (uint64_t)MOST_AT_ONCE * PAGE_BYTES) {
        uint64_t rest = (end - at) / PAGE_BYTES;
        int pages = rest < MOST_AT_ONCE ? (int)rest : MOST_AT_ONCE;

        if (status < 0 || read_some(descriptor, (off_t)at, pages, contents) < 0)
            return -1;
        for (int index = 0; index < pages; index++) {
            if (status == 0)
                status = PyList_Append(list, contents[index]);
            Py_DECREF(contents[index]);
        }
    }
    return status < 0 ? -1 : punch(descriptor, (off_t)start, (off_t)(end - start));
}

static PyObject *
take_pages(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    PyObject *contents;
    Py_ssize_t parts;
    long descriptor;

    if (count != 2 || !PyList_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "take_pages() takes a descriptor and a list");
        return NULL;
    }
    descriptor = PyLong_AsLong(args[0]);
    if (descriptor == -1 && PyErr_Occurred())
        return NULL;
    parts = PyList_Size(args[1]);
    if (parts < 0)
        return NULL;
    contents = PyList_New(0);
    if (contents == NULL)
        return NULL;
    for (Py_ssize_t index = 0; index < parts; index++) {
        PyObject *part = PyList_GetItem(args[1], index);
        unsigned long long start, end;

        if (part != NULL && !PyTuple_Check(part))
            PyErr_SetString(PyExc_TypeError, "a run of pages is a tuple of start and end");
        if (PyErr_Occurred() || !PyArg_ParseTuple(part, "KK", &start, &end)
            || append_run((int)descriptor, start, end, contents) < 0) {
            Py_DECREF(contents);
            return NULL;
        }
    }
    return contents;
}

static PyMethodDef functions[] = {
    {"copy_page", (PyCFunction)(void (*)(void))copy_page, METH_FASTCALL,
     "copy_page(uffd, address, mode, data): UFFDIO_COPY of a page; 0 or errno."},
    {"protect_pages", (PyCFunction)(void (*)(void))protect_pages, METH_FASTCALL,
     "protect_pages(uffd, start, end, mode): UFFDIO_WRITEPROTECT; 0 or errno."},
    {"take_pages", (PyCFunction)(void (*)(void))take_pages, METH_FASTCALL,
     "take_pages(descriptor, runs): the bytes of pages of a file, which are holes then."},
    {NULL, NULL, 0, NULL},
};

int
add_pages(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
