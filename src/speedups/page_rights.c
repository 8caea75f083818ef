/* Rights of pages by linear address: as softsgx/engines/native/memory/page_maps.py. */

#include "memory.h"

int
put_rights(PyObject *pages, uint64_t linaddr, int64_t rights)
{
    PyObject *page, *number;
    int status;

    if (is_exactly(pages, given.PageRights) && rights > 0 && rights < 8)
        return rights_put(pages, linaddr, (uint8_t)rights);
    page = PyLong_FromUnsignedLongLong(linaddr);
    number = PyLong_FromLongLong(rights);
    status = page == NULL || number == NULL ? -1 : PyObject_SetItem(pages, page, number);
    Py_XDECREF(number);
    Py_XDECREF(page);
    return status;
}

int
drop_rights(PyObject *pages, uint64_t start, uint64_t end)
{
    int status = 0;

    if (is_exactly(pages, given.PageRights)) {
        drop_range(pages, start, end);
        return 0;
    }
    for (; status == 0 && start < end; start += PAGE_BYTES)
        status = effect(call_with(pages, names.discard, PyLong_FromUnsignedLongLong(start), NULL));
    return status;
}
