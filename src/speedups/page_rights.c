/* Rights of pages by linear address: as softsgx/engines/native/memory/page_rights.py. */

#include "memory.h"

#include <string.h>

#define BLOCK_SHIFT 21
#define BLOCK_PAGES 512

/* The rights of the pages of a block, borrowed; NULL: it has no page, or an error is set. */
static char *
block_at(PyObject *pages, uint64_t linaddr)
{
    PyObject *key = PyLong_FromUnsignedLongLong(linaddr >> BLOCK_SHIFT), *block;

    if (key == NULL)
        return NULL;
    block = PyDict_GetItemWithError(((PageRights *)pages)->blocks, key);
    Py_DECREF(key);
    if (block == NULL)
        return NULL;
    if (PyByteArray_Check(block) && PyByteArray_Size(block) == BLOCK_PAGES)
        return PyByteArray_AsString(block);
    PyErr_SetString(PyExc_TypeError, "a block of rights has another size");
    return NULL;
}

int
put_rights(PyObject *pages, uint64_t linaddr, int64_t rights)
{
    PyObject *page, *number;
    char *block = NULL;
    int status;

    if (IS(PageRights, pages) && rights > 0 && rights < 8
        && (block = block_at(pages, linaddr)) != NULL) {
        block[linaddr >> PAGE_SHIFT & (BLOCK_PAGES - 1)] = (char)rights;
        return 0;
    }
    if (PyErr_Occurred())
        return -1;
    page = PyLong_FromUnsignedLongLong(linaddr);
    number = PyLong_FromLongLong(rights);
    status = page == NULL || number == NULL ? -1 : PyObject_SetItem(pages, page, number);
    Py_XDECREF(number);
    Py_XDECREF(page);
    return status;
}

/* The same where Python code has another layout. */
static int
discard_pages(PyObject *pages, uint64_t start, uint64_t end)
{
    PyObject *page;
    int status = 0;

    for (; status == 0 && start < end; start += PAGE_BYTES) {
        page = PyLong_FromUnsignedLongLong(start);
        status = page == NULL ? -1 : effect(CALL(pages, discard, page, NULL));
        Py_XDECREF(page);
    }
    return status;
}

int
drop_rights(PyObject *pages, uint64_t start, uint64_t end)
{
    uint64_t first, count;
    char *block;

    if (!IS(PageRights, pages))
        return discard_pages(pages, start, end);
    for (; start < end; start += count << PAGE_SHIFT) {
        first = start >> PAGE_SHIFT & (BLOCK_PAGES - 1);
        count = BLOCK_PAGES - first;
        if (count > (end - start) >> PAGE_SHIFT)
            count = (end - start) >> PAGE_SHIFT;
        block = block_at(pages, start);
        if (block != NULL)
            memset(block + first, 0, count);
        else if (PyErr_Occurred())
            return -1;
    }
    return 0;
}
