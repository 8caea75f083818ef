/* The fault that loads a page: as softsgx.driver.optimised.handle. */

#define _POSIX_C_SOURCE 200809L

#include "driver.h"
#include "engine.h"
#include "hw.h"
#include "paging.h"

#include <time.h>

struct fault {
    PyObject *enclave, *mm, *task;
    EnclaveVma *vma;
    EnclavePage *page;
    PyObject *driver, *core, *entry;  // the entry is NULL where there is a place
    struct place place;
    EnclaveCounts *counts;
    uint64_t linaddr;
    int64_t index;
};

/* The page that a fault can load by the plain path; NULL: none, perhaps with an error. */
static EnclavePage *
loadable(struct fault *fault)
{
    PyObject *pages;
    EnclavePage *page = NULL;
    uint64_t base;
    int64_t wanted;
    int plain;

    if (GET_ADDRESS(Enclave, fault->enclave, base, &base) < 0
        || (pages = GETF(Enclave, fault->enclave, pages)) == NULL)
        return NULL;
    /* An address below the base wraps to an index that no enclave has. */
    fault->index = (int64_t)((fault->linaddr - base) >> PAGE_SHIFT);
    page = page_at(pages, fault->index);
    if (page != NULL)
        HOLD(page);
    Py_DECREF(pages);
    if (page == NULL)
        return NULL;
    if (!is_none(page->epc) || !is_false(page->being_reclaimed)
        || fault->vma == NULL || !integer(fault->vma->prot, &wanted)
        || wanted & ~(int64_t)page->max_prot
        || swap_of(page) == NULL || PySet_Size(((Enclave *)page->enclave)->modified) != 0)
        plain = 0;
    else
        plain = enclave_is_plain(fault->enclave);
    if (plain > 0 && (plain = entry_place(swap_of(page), page->index, &fault->place)) == 0) {
        fault->entry = entry_get(swap_of(page), page->index);
        plain = fault->entry == NULL ? -1 : !is_none(fault->entry);
    }
    if (plain <= 0)
        RELEASE(page), page = NULL;
    return page;
}

/* The answer to a question about the task that faults: the driver's _group_of or _node_of, which is
 * released. */
static PyObject *
of_task(struct fault *fault, PyObject *function)
{
    PyObject *answer = NULL;

    if (function != NULL && function == given.own_group)
        answer = GETF(FaultingThread, fault->task, group);
    else if (function != NULL && function == given.first_node)
        answer = PyLong_FromLong(0);
    else if (function != NULL)
        answer = PyObject_CallFunctionObjArgs(function, fault->task, NULL);
    Py_XDECREF(function);
    return answer;
}

/* Load the page for the task, as PlainSwap.load(). */
static PyObject *
load_for(struct fault *fault)
{
    PyObject *kind = fault->page->kind, *epc = NULL, *claim = NULL, *group = NULL, *node = NULL;
    PyObject *label = kind == given.REG ? given.reg : PyDict_GetItemWithError(given.labels, kind);

    if (is_none(fault->task)) {
        Py_INCREF(claim = Py_None);
        Py_INCREF(group = Py_None);
        node = PyLong_FromLong(0);
    }
    else if ((group = of_task(fault, GETF(Driver, fault->driver, _group_of))) != NULL
             && (node = of_task(fault, GETF(Driver, fault->driver, _node_of))) != NULL)
        claim = GETF(FaultingThread, fault->task, claim);
    if (label != NULL && node != NULL && claim != NULL)
        epc = swap_load_from(swap_of(fault->page), fault->entry, fault->page->index, &fault->place,
                             (PyObject *)fault->page, label, node, group, claim);
    else if (!PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "a page of no known type");
    Py_XDECREF(node);
    Py_XDECREF(group);
    Py_XDECREF(claim);
    return epc;
}

/* Load the neighbours that the policy names. */
static int
load_ahead(struct fault *fault)
{
    PyObject *policy = GETF(EpcCore, fault->core, policy), *index = NULL, *pages = NULL;
    PyObject *wanted = NULL;
    int64_t size;
    int none = policy == NULL ? -1 : has_method_of(policy, given.Policy, names.neighbours);
    int any = -1;

    if (none != 0) {
        Py_XDECREF(policy);
        return none < 0 ? -1 : 0;
    }
    if (GET_INTEGER(Enclave, fault->enclave, size, &size) == 0
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
    if (entry_put(swap_of(page), page->index, Py_None) == 0
        && add_to_field(&fault->counts->reloads, 1) == 0
        && core_mark_reclaimable(fault->core, epc) == 0 && load_ahead(fault) == 0
        && (ptes = GETF(Mm, fault->mm, ptes)) != NULL) {
        status = install(ptes, fault->vma, fault->linaddr, ((SgxEpcPage *)epc)->addr);
        Py_DECREF(ptes);
        if (status == 0 && is_false(page->touched)) {
            set_flag(&page->touched, true);
            status = add_to_field(&fault->counts->touched, 1);
        }
    }
    Py_DECREF(epc);
    return status;
}

/* As driver.optimised._ended() of an EpcBusy: the task waits for a page. */
static PyObject *
ended_busy(struct fault *fault, PyObject *busy)
{
    PyObject *method = NULL, *wait = NULL, *ended = NULL;

    /* The traceback refers to a frame, which refers to the error: a reference cycle. */
    if (PyException_SetTraceback(busy, Py_None) == 0
        && (method = GET(fault->core, wait_for_page)) != NULL
        && (wait = PyObject_CallFunctionObjArgs(given.partial, method, busy, NULL)) != NULL)
        ended = PyTuple_Pack(3, given.busy, given.NOPAGE, wait);
    Py_XDECREF(wait);
    Py_XDECREF(method);
    return ended;
}

/* A fault has ended with the exception that is set: (kind, result, wait), or the exception. */
static PyObject *
ended_by_error(struct fault *fault)
{
    PyObject *type, *error, *traceback, *ended = NULL;

    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (is_exactly(error, given.EpcBusy))
        ended = ended_busy(fault, error);
    else if (error != NULL)
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

/* What a fault results in, and what the task waits for first (None: nothing); NULL: not known yet. */
struct outcome {
    PyObject *result, *wait;
};

static int
set_outcome(struct outcome *outcome, PyObject *result, PyObject *wait)
{
    if (result == NULL || wait == NULL)
        return -1;
    Py_INCREF(outcome->result = result);
    Py_INCREF(outcome->wait = wait);
    return 0;
}

static void
release_outcome(struct outcome *outcome)
{
    Py_XDECREF(outcome->wait);
    Py_XDECREF(outcome->result);
}

/* What the readable handler makes of a fault: a pair, or NULL with an error. */
static PyObject *
handle_readably(const struct fault *fault, PyObject *vma)
{
    PyObject *linaddr = PyLong_FromUnsignedLongLong(fault->linaddr), *pair = NULL;

    if (linaddr != NULL)
        pair = PyObject_CallFunctionObjArgs(readable[HANDLE], fault->enclave, fault->mm, vma,
                                            linaddr, fault->task, NULL);
    Py_XDECREF(linaddr);
    return pair;
}

/* As softsgx.driver.optimised.handle: 0, or -1 with an error. */
static int
handle_fault(PyObject *enclave, PyObject *mm, PyObject *vma, uint64_t linaddr, PyObject *task,
             struct outcome *outcome)
{
    struct fault fault = {
        .enclave = enclave, .mm = mm, .vma = AS(EnclaveVma, vma), .linaddr = linaddr, .task = task
    };
    PyObject *counts = NULL, *ended = NULL;
    int status = -1;

    fault.page = loadable(&fault);
    if (PyErr_Occurred())
        goto done;
    if (fault.page != NULL) {
        fault.driver = GETF(Enclave, fault.enclave, driver);
        fault.core = fault.driver == NULL ? NULL : GETF(Driver, fault.driver, core);
        counts = fault.core == NULL ? NULL : GETF(Enclave, fault.enclave, counts);
        if (counts == NULL)
            goto done;
        fault.counts = AS(EnclaveCounts, counts);
    }
    if (fault.counts == NULL || !is_exactly(fault.core, given.CompiledCore)
        || !has_counts(fault.counts->faults)) {
        ended = handle_readably(&fault, vma);
        if (ended != NULL)
            status = set_outcome(outcome, PyTuple_GetItem(ended, 0), PyTuple_GetItem(ended, 1));
    }
    else if (resolve(&fault) == 0) {
        if (count_label(fault.counts->faults, given.major, 1) == 0)
            status = set_outcome(outcome, given.NOPAGE, Py_None);
    }
    else if ((ended = ended_by_error(&fault)) != NULL
             && count_label(fault.counts->faults, PyTuple_GetItem(ended, 0), 1) == 0)
        status = set_outcome(outcome, PyTuple_GetItem(ended, 1), PyTuple_GetItem(ended, 2));
done:
    Py_XDECREF(ended);
    Py_XDECREF(counts);
    RELEASE(fault.place.page);
    Py_XDECREF(fault.entry);
    Py_XDECREF(fault.core);
    Py_XDECREF(fault.driver);
    RELEASE(fault.page);
    return status;
}

/* handle(enclave, mm, vma, linaddr, task): as softsgx.driver.optimised.handle. */
PyObject *
handle(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    struct outcome outcome = {0};
    PyObject *pair = NULL;
    uint64_t linaddr;

    if (count != 5)
        PyErr_SetString(PyExc_TypeError, "handle() takes 5 arguments");
    else if (unsigned_of(args[3], &linaddr)
             && handle_fault(args[0], args[1], args[2], linaddr, args[4], &outcome) == 0)
        pair = PyTuple_Pack(2, outcome.result, outcome.wait);
    release_outcome(&outcome);
    return pair;
}

/* --- address spaces ----------------------------------------------------------------------------- */

PyObject *
mapping_at(PyObject *mm, uint64_t at)
{
    PyObject *found = GETF(Mm, mm, found), *addr;
    EnclaveVma *vma = AS(EnclaveVma, found);

    if (found == NULL || (vma != NULL && at >= vma->start && at < vma->end))
        return found;
    addr = PyLong_FromUnsignedLongLong(at);
    replace(&found, addr == NULL ? NULL : CALL(mm, find, addr, NULL));
    Py_XDECREF(addr);
    return found;
}

/* Whether a fault at a mapping is one for handle_fault(): 0, 1, or -1 with an error. */
static int
is_for_c(PyObject *vma_object, PyObject *access)
{
    EnclaveVma *vma = AS(EnclaveVma, vma_object);
    Enclave *enclave = vma == NULL ? NULL : AS(Enclave, vma->enclave);
    PyObject *handler;
    int64_t wanted, prot;

    if (enclave == NULL || !IS(EnclaveCounts, enclave->counts) || !integer(access, &wanted)
        || !integer(vma->prot, &prot) || wanted & ~prot)
        return 0;
    handler = GETF(Driver, enclave->driver, handle_fault);
    Py_XDECREF(handler);
    return handler == NULL ? -1 : handler == given.handle;
}

/* As Runtime.now_ns(), whose clock is time.monotonic_ns() or another one. */
int
now_ns(PyObject *runtime, int64_t *time)
{
    PyObject *clock = is_exactly(runtime, given.InlineRuntime)
        ? GETF(InlineRuntime, runtime, _clock_ns)
        : NULL;
    PyObject *number = NULL;
    struct timespec now;
    int status;

    if (clock != NULL && clock == given.monotonic_ns && clock_gettime(CLOCK_MONOTONIC, &now) == 0) {
        *time = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
        Py_DECREF(clock);
        return 0;
    }
    if (!PyErr_Occurred())
        number = clock != NULL ? PyObject_CallNoArgs(clock) : CALL0(runtime, now_ns);
    status = number != NULL && integer(number, time) ? 0 : -1;
    Py_XDECREF(clock);
    if (number != NULL && status < 0)
        PyErr_SetString(PyExc_TypeError, "a time is no integer of 64 bits");
    Py_XDECREF(number);
    return status;
}

/* Give a lock back that was taken for reading; an error that is set stays. */
static int
release_read(RwLock *lock)
{
    PyObject *type, *error, *traceback;
    int64_t waiting;
    int status;

    PyErr_Fetch(&type, &error, &traceback);
    status = integer(lock->_waiting, &waiting) && !waiting
        ? add_to_field(&lock->_readers, -1)
        : effect(CALL0(lock, release_read));
    if (type == NULL)
        return status;
    PyErr_Restore(type, error, traceback);
    return -1;
}

/* handle_fault() with the lock held for reading; then wait, if need be. */
static PyObject *
fault_locked(Mm *mm, RwLock *lock, EnclaveVma *vma, uint64_t addr, PyObject *task)
{
    PyObject *result = NULL;
    struct outcome outcome = {0};
    EnclaveCounts *counts;
    int64_t began, ended;
    int status;

    if (now_ns(mm->runtime, &began) < 0)
        return NULL;
    if (add_to_field(&lock->_readers, 1) < 0)
        goto done;
    status = handle_fault(vma->enclave, (PyObject *)mm, (PyObject *)vma,
                          addr & -(uint64_t)PAGE_BYTES, task, &outcome);
    if (release_read(lock) < 0 || status < 0)
        goto done;
    result = outcome.result;
    if (!is_none(outcome.wait))
        result = effect(PyObject_CallNoArgs(outcome.wait)) < 0 ? NULL : given.RETRY;
    if (result != NULL && now_ns(mm->runtime, &ended) == 0) {
        counts = (EnclaveCounts *)((Enclave *)vma->enclave)->counts;
        if (add_to_field(&counts->fault_ns, ended - began) < 0)
            result = NULL;
    }
    else
        result = NULL;
    Py_XINCREF(result);
done:
    release_outcome(&outcome);
    return result;
}

/* As Mm.fault(). */
PyObject *
mm_fault(PyObject *object, PyObject *addr, PyObject *access, PyObject *task)
{
    Mm *mm = AS(Mm, object);
    RwLock *lock = mm == NULL ? NULL : AS(RwLock, mm->mmap_lock);
    PyObject *vma = NULL, *result = NULL;
    int plain = 0, given_task;
    uint64_t at;

    if (lock != NULL && is_true(mm->_uninterleaved) && is_false(lock->has_writer)
        && address(addr, &at)) {
        vma = mapping_at(object, at);
        plain = vma == NULL ? -1 : is_for_c(vma, access);
    }
    given_task = PyObject_IsTrue(task);
    if (plain > 0 && given_task >= 0) {
        HOLD(lock);
        result = fault_locked(mm, lock, (EnclaveVma *)vma, at, given_task ? task : mm->owner);
        RELEASE(lock);
    }
    else if (plain == 0 && given_task >= 0)
        result = PyObject_CallFunctionObjArgs(readable[MM_FAULT], object, addr, access, task, NULL);
    Py_XDECREF(vma);
    return result;
}
