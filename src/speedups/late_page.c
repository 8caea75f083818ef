/* The page of a thread that waits, filled at the end of its fault.  See memory.h. */

#include "engine.h"
#include "memory.h"

#define COPY_DONTWAKE 1

/* Of the fault that the driver resolves at the moment, and the frame of Python that it began under.
 * Not on the stack: while its task waits, others use the memory of that. */
static struct {
    struct late_page page;
    PyObject *frame; /* borrowed; NULL: there is none */
} expected;

bool
expect_late_page(PyObject *table, int uffd, uint64_t linaddr)
{
    if (expected.frame != NULL) /* of a task that waits */
        return false;
    expected.page = (struct late_page){.table = table, .linaddr = linaddr, .uffd = uffd};
    expected.frame = (PyObject *)PyEval_GetFrame();
    return true;
}

void
take_late_page(struct late_page *late)
{
    *late = expected.page;
    expected.page = (struct late_page){0};
    expected.frame = NULL;
}

/* Whether the fault has called the code that runs: other tasks have frames of their own. */
static bool
is_in_fault(void)
{
    PyObject *frame = (PyObject *)PyEval_GetFrame();
    bool found;

    Py_XINCREF(frame);
    while (frame != NULL && !is_none(frame) && frame != expected.frame)
        replace(&frame, PyObject_GetAttrString(frame, "f_back"));
    found = frame != NULL && frame == expected.frame;
    Py_XDECREF(frame);
    return found;
}

bool
is_late(PyObject *table, int64_t uffd, uint64_t linaddr, EnclaveMemory *memory, PyObject *data,
        int64_t rights)
{
    if (expected.frame == NULL || table != expected.page.table || uffd != expected.page.uffd
        || linaddr != expected.page.linaddr || expected.page.memory != NULL
        || !is_none(((EnclavePageTable *)table)->_installed) || !is_in_fault())
        return false;
    Py_INCREF(expected.page.memory = (PyObject *)memory);
    Py_XINCREF(expected.page.data = data);
    expected.page.rights = rights;
    return true;
}

int
show_by_method(PyObject *memory, uint64_t linaddr, PyObject *data, int64_t rights, PyObject *user)
{
    PyObject *at = PyLong_FromUnsignedLongLong(linaddr), *number = PyLong_FromLongLong(rights);
    int status = at == NULL || number == NULL
        ? -1
        : effect(CALL(memory, show, at, data == NULL ? given.ZEROS : data, number, user, NULL));

    Py_XDECREF(number);
    Py_XDECREF(at);
    return status;
}

/* Copy the late page: 1; 0: there is none, or it was copied otherwise and woke no thread; or -1. */
static int
copy_late_page(struct late_page *late, uint64_t mode)
{
    PyObject *memory = late->memory, *data = late->data, *user;
    int code;

    if (memory == NULL)
        return 0;
    late->memory = late->data = NULL;
    code = copy_to(late->uffd, late->linaddr, mode, data);
    if (code > 0) { /* again, as far as it fails; then by other means */
        user = PyList_GetItem(((EnclaveMemory *)memory)->users, 0);
        code = user == NULL ? -1
                            : show_by_method(memory, late->linaddr, data, late->rights, user);
    }
    else if (code == 0)
        code = 1;
    Py_XDECREF(data);
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
