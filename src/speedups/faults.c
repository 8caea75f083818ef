/* The fault that loads a page: as softsgx.driver.optimised.handle. */

#include "speedups.h"

struct fault {
    PyObject *enclave, *mm, *linaddr, *task;
    EnclaveVma *vma;
    EnclavePage *page;
    PyObject *driver, *core;
    EnclaveCounts *counts;
    int64_t index;
};

/* The page that a fault can load by the plain path; NULL: none, perhaps with an error. */
static EnclavePage *
loadable(struct fault *fault)
{
    PyObject *pages, *number;
    EnclavePage *page = NULL;
    uint64_t base, linaddr;
    int64_t wanted, most;
    int plain;

    if (GET_ADDRESS(Enclave, fault->enclave, base, &base) < 0
        || (pages = GETF(Enclave, fault->enclave, pages)) == NULL)
        return NULL;
    if (PyDict_Check(pages) && address(fault->linaddr, &linaddr)) {
        /* An address below the base wraps to an index that no enclave has. */
        fault->index = (int64_t)((linaddr - base) >> PAGE_SHIFT);
        number = PyLong_FromLongLong(fault->index);
        if (number != NULL)
            page = AS(EnclavePage, PyDict_GetItemWithError(pages, number));
        Py_XDECREF(number);
        if (page != NULL)
            HOLD(page);
    }
    Py_DECREF(pages);
    if (page == NULL)
        return NULL;
    if (is_none(page->entry) || !is_false(page->being_reclaimed) || !is_false(page->being_modified)
        || fault->vma == NULL || !integer(fault->vma->prot, &wanted)
        || !integer(page->max_prot, &most) || wanted & ~most
        || !is_exactly(page->swap, given.CompiledSwap))
        plain = 0;
    else
        plain = enclave_is_plain(fault->enclave);
    if (plain <= 0)
        RELEASE(page), page = NULL;
    return page;
}

/* Load the page for the task, as PlainSwap.load(). */
static PyObject *
load_for(struct fault *fault)
{
    PyObject *where = CALL(fault->driver, group_and_node, fault->task, NULL), *claim = NULL;
    PyObject *label = NULL, *epc = NULL;

    if (where == NULL || !PyTuple_Check(where))
        goto done;
    label = PyDict_GetItemWithError(given.labels, fault->page->kind);
    if (is_none(fault->task))
        Py_INCREF(claim = Py_None);
    else
        claim = GET(fault->task, claim);
    if (label != NULL && claim != NULL)
        epc = swap_load(fault->page->swap, fault->page->entry, (PyObject *)fault->page, label,
                        PyTuple_GetItem(where, 1), PyTuple_GetItem(where, 0), claim);
done:
    if (epc == NULL && !PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "a page of no known type");
    Py_XDECREF(claim);
    Py_XDECREF(where);
    return epc;
}

/* Load the neighbours that the policy names. */
static int
load_ahead(struct fault *fault)
{
    PyObject *policy = GET(fault->core, policy), *index = NULL, *pages = NULL, *wanted = NULL;
    int64_t size;
    int any = -1;

    if (policy != NULL && GET_INTEGER(Enclave, fault->enclave, size, &size) == 0
        && (index = PyLong_FromLongLong(fault->index)) != NULL
        && (pages = PyLong_FromLongLong(size >> PAGE_SHIFT)) != NULL
        && (wanted = CALL(policy, neighbours, index, pages, NULL)) != NULL)
        any = PyObject_IsTrue(wanted);
    if (any > 0)
        any = effect(PyObject_CallFunctionObjArgs(given.load_ahead, (PyObject *)fault->page,
                                                  fault->task, NULL));
    Py_XDECREF(wanted);
    Py_XDECREF(pages);
    Py_XDECREF(index);
    Py_XDECREF(policy);
    return any;
}

/* Load the page and map it. */
static int
resolve(struct fault *fault)
{
    EnclavePage *page = fault->page;
    PyObject *epc = load_for(fault), *ptes;
    int status = -1;

    if (epc == NULL)
        return -1;
    set_field(&page->epc, epc);
    set_field(&page->entry, Py_None);
    if (add_to_field(&fault->counts->reloads, 1) == 0
        && core_mark_reclaimable(fault->core, epc) == 0 && load_ahead(fault) == 0
        && (ptes = GETF(Mm, fault->mm, ptes)) != NULL) {
        status = effect(CALL(ptes, install, fault->linaddr, ((SgxEpcPage *)epc)->addr,
                             fault->vma->prot, NULL));
        Py_DECREF(ptes);
        if (status == 0 && is_false(page->touched)) {
            set_field(&page->touched, Py_True);
            status = add_to_field(&fault->counts->touched, 1);
        }
    }
    Py_DECREF(epc);
    return status;
}

/* Count a fault of a kind. */
static int
count_fault(PyObject *faults, PyObject *kind)
{
    PyObject *found = PyDict_GetItemWithError(faults, kind), *number;
    int64_t count = 0;
    int status = -1;

    if (found != NULL && !integer(found, &count))
        PyErr_SetString(PyExc_TypeError, "the number of faults is no integer");
    number = PyErr_Occurred() ? NULL : PyLong_FromLongLong(count + 1);
    if (number != NULL)
        status = PyDict_SetItem(faults, kind, number);
    Py_XDECREF(number);
    return status;
}

/* A fault has ended with the exception that is set: (kind, result, wait), or the exception. */
static PyObject *
ended_by_error(struct fault *fault)
{
    PyObject *type, *error, *traceback, *ended = NULL;

    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (error != NULL)
        ended = PyObject_CallFunctionObjArgs(given.page_ended, fault->enclave, error, NULL);
    if (ended != NULL && is_none(ended)) {
        Py_CLEAR(ended);
        PyErr_Restore(type, error, traceback);
        return NULL;
    }
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    return ended;
}

/* handle(enclave, mm, vma, linaddr, task): as softsgx.driver.optimised.handle. */
PyObject *
handle(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    struct fault fault = {0};
    PyObject *counts = NULL, *ended = NULL, *result = NULL;

    if (count != 5) {
        PyErr_SetString(PyExc_TypeError, "handle() takes 5 arguments");
        return NULL;
    }
    fault.enclave = args[0];
    fault.mm = args[1];
    fault.vma = AS(EnclaveVma, args[2]);
    fault.linaddr = args[3];
    fault.task = args[4];
    fault.page = loadable(&fault);
    if (PyErr_Occurred())
        goto done;
    if (fault.page != NULL) {
        fault.driver = GETF(Enclave, fault.enclave, driver);
        fault.core = fault.driver == NULL ? NULL : GET(fault.driver, core);
        counts = fault.core == NULL ? NULL : GETF(Enclave, fault.enclave, counts);
        if (counts == NULL)
            goto done;
        fault.counts = AS(EnclaveCounts, counts);
    }
    if (fault.counts == NULL || !is_exactly(fault.core, given.CompiledCore)
        || !PyDict_Check(fault.counts->faults)) {
        result = PyObject_CallFunctionObjArgs(readable[HANDLE], args[0], args[1], args[2], args[3],
                                              args[4], NULL);
        goto done;
    }
    if (resolve(&fault) == 0)
        ended = PyTuple_Pack(3, given.major, given.NOPAGE, Py_None);
    else
        ended = ended_by_error(&fault);
    if (ended != NULL && count_fault(fault.counts->faults, PyTuple_GetItem(ended, 0)) == 0)
        result = PyTuple_GetSlice(ended, 1, 3);
done:
    Py_XDECREF(ended);
    Py_XDECREF(counts);
    Py_XDECREF(fault.core);
    Py_XDECREF(fault.driver);
    RELEASE(fault.page);
    return result;
}
