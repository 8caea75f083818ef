/* ETRACK: as softsgx.hw.optimised.paging. */

#include "leaves.h"

/* As start_cycle() of tracking.py, with an enclave whose previous cycle is complete. */
static int
start_cycle(ResidentSecs *enclave, int64_t inside)
{
    if (add_to_field(&enclave->epoch, 1) < 0 || set_integer(&enclave->prev_count, inside) < 0)
        return -1;
    return set_integer(&enclave->cur_count, 0);
}

PyObject *
etrack(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    PyObject *pages, *result = NULL;
    ResidentSecs *enclave;
    EpcPage *page;
    int64_t lock, inside, previous;

    machine_of(self, &pages);
    if (pages == NULL || !right_arguments(count, 1))
        goto done;
    page = entry_at(pages, args[0]);
    if (PyErr_Occurred())
        goto done;
    if (page != NULL && is_true(page->valid) && page->pt == given.SECS
        && integer(page->lock, &lock) && lock >= 0
        && (enclave = AS(ResidentSecs, page->enclave)) != NULL && is_false(enclave->tracking_lock)
        && integer(enclave->prev_count, &previous) && previous == 0
        && integer(enclave->cur_count, &inside)) {
        if (start_cycle(enclave, inside) == 0)
            Py_INCREF(result = given.SUCCESS);
    }
    else
        result = PyObject_CallFunctionObjArgs(given.etrack, cpu_of(self), args[0], NULL);
done:
    Py_XDECREF(pages);
    return result;
}
