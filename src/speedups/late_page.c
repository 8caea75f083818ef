/* The page of a thread that waits, filled at the end of its fault.  See memory.h. */

#include "memory.h"

#define COPY_DONTWAKE 1

/* Of the fault that the driver resolves at the moment. */
static struct late_page *expected;

void
expect_late_page(struct late_page *late, PyObject *table, int uffd, PyObject *linaddr)
{
    if (!address(linaddr, &late->linaddr))
        return;
    late->table = table;
    late->linaddr &= ~(uint64_t)(PAGE_BYTES - 1);
    late->uffd = uffd;
    expected = late;
}

void
expect_no_late_page(void)
{
    expected = NULL;
}

bool
is_late(PyObject *table, int64_t uffd, uint64_t at, EnclaveMemory *memory, PyObject *linaddr,
        PyObject *data, PyObject *rights)
{
    if (expected == NULL || table != expected->table || uffd != expected->uffd
        || at != expected->linaddr || !is_none(((EnclavePageTable *)table)->_installed))
        return false;
    Py_INCREF(expected->memory = (PyObject *)memory);
    Py_INCREF(expected->page = linaddr);
    Py_XINCREF(expected->data = data);
    Py_INCREF(expected->rights = rights);
    return true;
}

/* Copy the late page: 1; 0: there is none, or it was copied otherwise and woke no thread; or -1. */
static int
copy_late_page(struct late_page *late, uint64_t mode)
{
    PyObject *memory = late->memory, *page = late->page, *data = late->data;
    PyObject *rights = late->rights, *user;
    int code;

    if (memory == NULL)
        return 0;
    late->memory = late->page = late->data = late->rights = NULL;
    code = copy_to(late->uffd, late->linaddr, mode, data);
    if (code > 0) { /* again, as far as it fails; then by other means */
        user = PyList_GetItem(((EnclaveMemory *)memory)->users, 0);
        code = user == NULL ? -1
                            : effect(CALL(memory, show, page, data == NULL ? given.ZEROS : data,
                                          rights, user, NULL));
    }
    else if (code == 0)
        code = 1;
    Py_DECREF(rights);
    Py_XDECREF(data);
    Py_DECREF(page);
    Py_DECREF(memory);
    return code;
}

int
show_late_page(struct late_page *late)
{
    PyObject *type, *error, *traceback;
    int status;

    if (late->memory == NULL)
        return 0;
    PyErr_Fetch(&type, &error, &traceback);
    status = copy_late_page(late, COPY_DONTWAKE) < 0 ? -1 : 0;
    if (type != NULL)
        PyErr_Restore(type, error, traceback);
    return status;
}

int
wake_with_late_page(struct late_page *late)
{
    return copy_late_page(late, 0);
}
