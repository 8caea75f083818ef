/* The loop over plain faults: as softsgx/engines/native/faults/plain.py, PlainFaults._next. */

#include "driver.h"
#include "plain_faults.h"

#include <signal.h>
#include <stddef.h>

#define SIGBUS_STOP (SIGBUS << 8 | 0x7f)

void
release(void *references, size_t bytes)
{
    PyObject **each = references;

    for (size_t index = 0; index < bytes / sizeof(PyObject *); index++)
        Py_CLEAR(each[index]);
}

/* --- a fault ------------------------------------------------------------------------------------ */

int
set_address(struct fault *fault, uint64_t linaddr)
{
    fault->page = linaddr & PAGE_MASK;
    fault->linaddr = PyLong_FromUnsignedLongLong(linaddr);
    return fault->linaddr == NULL ? -1 : 0;
}

/* Whether the page of the address has an entry: 0, 1, or -1 with an error. */
static int
has_entry(struct fault *fault)
{
    PyObject *entry;
    int status = page_has_entry(fault->page_table, fault->page);

    if (status != -2)
        return status;
    entry = CALL(fault->page_table, entry, fault->linaddr, NULL);
    Py_XDECREF(entry);
    return entry == NULL ? -1 : !is_none(entry);
}

/* As PlainFaults._may_be_plain. */
int
is_plain(struct service *service, struct fault *fault)
{
    PyObject *found;
    EnclaveVma *vma;
    int64_t prot = 0;
    int status;

    if ((status = GET_TRUTH(FaultingThread, fault->thread, breakpoints)))
        return status < 0 ? -1 : 0;
    if ((status = GET_TRUTH(FaultingImage, fault->image, watched)) > 0
        && (status = GET_TRUTH(FaultingThread, fault->thread, watched)) == 0)
        return 0;
    if (status < 0 || (fault->mm == NULL && (fault->mm = GET(fault->image, mm)) == NULL)
        || (found = mapping_at(fault->mm, fault->page)) == NULL)
        return -1;
    vma = AS(EnclaveVma, found);
    status = vma != NULL && integer(vma->prot, &prot) && prot == READ_WRITE;
    Py_DECREF(found);
    if (status <= 0)
        return status;
    if ((fault->page_table == NULL
         && (fault->page_table = GETF(FaultingImage, fault->image, page_table)) == NULL)
        || (status = has_entry(fault)) < 0)
        return -1;
    if (status > 0)
        return 0;
    status = HAS(FaultingThread, fault->thread, resumes, fault->inside);
    if (status == 0) {
        PyObject *exits = GET(service->transitions, exits), *at_once;

        at_once = exits == NULL ? NULL : CALL(exits, return_at_once, fault->thread, NULL);
        Py_XDECREF(exits);
        status = at_once == NULL ? -1 : PyObject_IsTrue(at_once);
        Py_XDECREF(at_once);
    }
    return status;
}

int
is_quiet(struct service *service)
{
    PyObject *runtime = service->runtime;
    Py_ssize_t waiting;
    int status;

    if (service->ready != NULL) {
        waiting = PyObject_Size(service->ready) | PyObject_Size(service->lock_waiters)
            | PyObject_Size(service->timers);
        status = waiting < 0 ? -1 : waiting > 0;
        if (status == 0)
            status = GET_TRUTH(InlineRuntime, runtime, _has_failures);
    }
    else if ((status = has_any(runtime, names._ready)) == 0
        && (status = has_any(runtime, names._lock_waiters)) == 0
        && (status = has_any(runtime, names._timers)) == 0)
        status = get_truth(runtime, names._has_failures);
    return status < 0 ? -1 : !status;
}

int
is_untraced(struct fault *fault)
{
    if (fault->hw == NULL && (fault->hw = GETF(ProcessorMode, fault->cpu, hw)) == NULL)
        return -1;
    return HAS(Machine, fault->hw, tracer, Py_None);
}

/* Whether the fault was resolved, and nothing else has to be done: 0, 1, or -1 with an error. */
static int
is_usual(struct service *service, struct fault *fault, PyObject *result)
{
    int status;

    if (result != given.NOPAGE && result != given.RETRY)
        return 0;
    if ((status = HAS(ProcessorMode, fault->cpu, inside, fault->inside)) <= 0)
        return status;
    status = is_untraced(fault);
    return status <= 0 ? status : is_quiet(service);
}

int
count_exit(PyObject *inside)
{
    PyObject *enclave = GETF(EnclaveMode, inside, enclave);
    PyObject *crossings = enclave == NULL ? NULL : GETF(ResidentSecs, enclave, crossings);
    int status = -1;

    if (crossings != NULL && ADD_INTEGER(Crossings, crossings, aex, 1) == 0)
        status = ADD_INTEGER(Crossings, crossings, eresume, 1);
    Py_XDECREF(crossings);
    Py_XDECREF(enclave);
    return status;
}

/* As flush() of address spaces. */
static int
flush(struct service *service, struct fault *fault)
{
    int status = 0;

    if (is_exactly(fault->image, given.ProcessImage)
        && (status = HAS_ANY(FaultingImage, fault->image, _deferred_calls)) == 0
        && (status = pager_has_nothing_due(fault->page_table)) > 0)
        return 0;
    if (status == 0 && (status = drop_watched(service, fault)) > 0)
        return 0;
    return status < 0 || show_late_page(&fault->late) < 0 ? -1 : effect(CALL0(fault->image, flush));
}

int
go(struct service *service, struct fault *fault)
{
    PyObject *thread = fault->thread;
    Py_ssize_t kept = PyObject_Size(service->kept);
    int status;
    int64_t tid;

    if (kept < 0)
        return -1;
    if (kept == 0 && is_exactly(thread, given.ProgramThread)) {
        if ((status = get_truth(thread, names._changed)) == 0
            && (status = get_truth(thread, names._ended)) == 0
            && (status = get_truth(thread, names.in_call)) == 0
            && (status = has(thread, names._new_xstate, Py_None)) > 0
            && (status = has(thread, names._kept, Py_None)) > 0
            && (status = get_integer(thread, names.tid, &tid)) == 0
            && continue_thread((int)tid) == 0)
            return 0;
        if (status < 0)
            return -1;
    }
    return effect(CALL0(thread, resume));  // it has ended, perhaps: resume() says so
}

int
finish(struct service *service, struct fault *fault)
{
    int leaving = HAS_ANY(NativeStore, service->store, _leaving);

    if (leaving < 0 || (leaving && (show_late_page(&fault->late) < 0 || hide_unmapped(service->store) < 0)))
        return -1;
    return flush(service, fault);
}

/* Resume the thread: as Loop.resume_thread() at such a stop. */
static int
resume(struct service *service, struct fault *fault)
{
    if (finish(service, fault) < 0 || permits_going(service, fault) < 0
        || SETF(FaultingThread, fault->thread, running, Py_True) < 0
        || SETF(FaultingImage, fault->image, current, Py_None) < 0)
        return -1;
    return go(service, fault);
}

PyObject *
call_driver(struct fault *fault, bool direct)
{
    return direct ? mm_fault(fault->mm, fault->linaddr, given.READ, fault->thread)
                  : CALL(fault->mm, fault, fault->linaddr, given.READ, fault->thread, NULL);
}

/* Let the driver resolve a plain fault, and resume the thread. */
static int
resolve(struct service *service, struct fault *fault)
{
    PyObject *result, *number, *enclave;
    int usual, direct;

    if (ADD_INTEGER(PlainFaults, service->plain, served, 1) < 0 || permits_settle(service) < 0
        || (direct = has_mm_fault(fault->mm)) < 0)
        return -1;
    result = call_driver(fault, direct);
    if (result == NULL)
        return -1;
    usual = is_usual(service, fault, result);
    if (usual == 0) {
        enclave = GET(service->transitions, enclave);
        number = enclave == NULL ? NULL
                                 : CALL(enclave, faulted, fault->thread, fault->linaddr,
                                        given.BUS_ADRERR, result, NULL);
        Py_XDECREF(enclave);
        Py_DECREF(result);
        if (number == NULL)
            return -1;
        usual = effect(CALL(service->server, resume_thread, fault->thread, number, NULL));
        Py_DECREF(number);
        return usual;
    }
    Py_DECREF(result);
    if (usual < 0 || SETF(FaultingThread, fault->thread, spurious, given.NO_REPETITION) < 0
        || count_exit(fault->inside) < 0)
        return -1;
    return resume(service, fault);
}

int
find_inside(struct service *service, struct fault *fault)
{
    if ((fault->cpu == NULL && (fault->cpu = GETF(FaultingThread, fault->thread, cpu)) == NULL)
        || (fault->inside = GETF(ProcessorMode, fault->cpu, inside)) == NULL
        || permits_report(service, fault) < 0)
        return -1;
    replace(&fault->inside, GETF(ProcessorMode, fault->cpu, inside)); /* reports change it */
    return fault->inside == NULL ? -1 : !is_none(fault->inside);
}

/* As PlainFaults._serve: 1, 0: the fault is not plain, or -1 with an error. */
static int
attempt(struct service *service, struct fault *fault, uint64_t linaddr)
{
    int status;

    if (SETF(FaultingImage, fault->image, current, fault->thread) < 0)
        return -1;
    status = find_inside(service, fault);
    if (status <= 0)
        return status;
    if (set_address(fault, linaddr) < 0)
        return -1;
    status = is_plain(service, fault);
    if (status > 0)
        status = resolve(service, fault) < 0 ? -1 : 1;
    return status;
}

int
failed(struct service *service, PyObject *thread)
{
    PyObject *type, *error, *traceback, *process, *pid = NULL, *tid = NULL;
    int status = -1;

    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (!PyErr_GivenExceptionMatches(type, PyExc_Exception)) {
        PyErr_Restore(type, error, traceback);
        return -1;
    }
    if (traceback != NULL)
        PyException_SetTraceback(error, traceback);
    process = GET(thread, process);
    if (process != NULL && (pid = GET(process, pid)) != NULL && (tid = GET(thread, tid)) != NULL)
        status = effect(CALL(service->server, failed, pid, tid, error, NULL));
    Py_XDECREF(tid);
    Py_XDECREF(pid);
    Py_XDECREF(process);
    Py_XDECREF(traceback);
    Py_XDECREF(error);
    Py_XDECREF(type);
    return status;
}

/* As stopped() of threads, for a SIGBUS; *stop is a new reference. */
static int
record_stop(PyObject *thread, int fetched, PyObject **stop)
{
    PyObject *no[] = {names._loaded, names._borrowed, names.at_call, names.mid_call, names.in_call};
    PyObject *what = PyLong_FromLong(fetched), *status;
    int done = what == NULL ? -1 : 0;

    if (done == 0 && is_exactly(thread, given.ProgramThread)) {
        Py_INCREF(*stop = given.sigbus_stop);
        for (size_t index = 0; done == 0 && index < sizeof no / sizeof *no; index++)
            done = PyObject_SetAttr(thread, no[index], Py_False);
        if (done == 0 && SET(thread, _fetched, what) == 0
            && SET(thread, _real_xstate, Py_None) == 0 && SET(thread, _kept, Py_None) == 0)
            done = SET(thread, _at_signal, Py_True);
        else
            done = -1;
    }
    else if (done == 0) {
        status = PyLong_FromLong(SIGBUS_STOP);
        if (status == NULL || (*stop = CALL(thread, stopped, status, what, NULL)) == NULL)
            done = -1;
        Py_XDECREF(status);
    }
    Py_XDECREF(what);
    return done;
}

/* Serve the SIGBUS of a thread. */
static int
serve(struct service *service, PyObject *thread, int fetched)
{
    struct fault fault = {.thread = thread, .image = GETF(FaultingThread, thread, image)};
    PyObject *stop = NULL, *type, *error, *traceback;
    uint64_t info_at;
    int status = -1;

    Py_INCREF(thread);
    if (fault.image == NULL || SETF(FaultingThread, thread, running, Py_False) < 0
        || SETF(FaultingThread, thread, unstoppable, Py_False) < 0
        || record_stop(thread, fetched, &stop) < 0
        || get_address(thread, names.info_at, &info_at) < 0)
        goto done;
    status = 0;
    if (fetched & SIGNAL_INFORMATION) {
        const siginfo_t *info = (const siginfo_t *)(uintptr_t)info_at;

        if (info->si_code == BUS_ADRERR) {
            status = attempt(service, &fault, (uint64_t)(uintptr_t)info->si_addr);
            if (status < 0)
                status = failed(service, thread) < 0 ? -1 : 1;
            PyErr_Fetch(&type, &error, &traceback);
            if (SETF(FaultingImage, fault.image, current, Py_None) < 0)
                status = -1;
            if (type != NULL)
                PyErr_Restore(type, error, traceback);
        }
    }
    if (status == 0)
        status = effect(CALL(service->server, guard, thread, stop, NULL));
done:
    Py_XDECREF(stop);
    release(&fault, offsetof(struct fault, late));
    return status < 0 ? -1 : 0;
}

static int
find_objects(struct service *service, PyObject *plain)
{
    Py_INCREF(service->plain = plain);
    if ((service->server = GETF(PlainFaults, plain, _server)) == NULL
        || (service->held = GET(service->server, held)) == NULL
        || (service->threads = GET(service->server, threads)) == NULL
        || (service->waits = GETF(PlainFaults, plain, _waits)) == NULL
        || (service->kept = GETF(Waits, service->waits, kept)) == NULL
        || (service->places = GETF(Waits, service->waits, places)) == NULL
        || (service->permits = GETF(PlainFaults, plain, _permits)) == NULL
        || (service->open = GETF(UnseenCrossings, service->permits, _open)) == NULL
        || (service->unused = GETF(UnseenCrossings, service->permits, _unused)) == NULL
        || (service->recorded = GETF(UnseenCrossings, service->permits, _recorded)) == NULL
        || (service->transitions = GETF(PlainFaults, plain, _transitions)) == NULL
        || (service->store = GETF(PlainFaults, plain, _store)) == NULL
        || (service->runtime = GETF(PlainFaults, plain, _runtime)) == NULL || find_events(service) < 0)
        return -1;
    if (PyDict_Check(service->threads) && PyDict_Check(service->places)
        && PyDict_Check(service->unused) && PySet_Check(service->open)
        && PySet_Check(service->recorded))
        return 0;
    PyErr_SetString(PyExc_TypeError, "an object of plain faults is of another class");
    return -1;
}

/* The thread of a stop that may be a plain fault, borrowed; NULL: of no such stop, or an error. */
static PyObject *
stopped_thread(struct service *service, const struct found *found)
{
    PyObject *thread, *key;

    if (found->status != SIGBUS_STOP || (key = PyLong_FromLong(found->tid)) == NULL)
        return NULL;
    thread = PyDict_GetItemWithError(service->threads, key);
    Py_DECREF(key);
    return thread;
}

/* Whether faults can be events now: 0, 1, or -1 with an error. */
static int
have_events(struct service *service)
{
    FaultEvents *faults = AS(FaultEvents, service->faults);

    if (faults != NULL && PyDict_Check(faults->images))
        return PyDict_Size(faults->images) > 0;
    return is_none(service->faults) ? 0 : has_any(service->faults, names.images);
}

/* Whether the loop or its waits hold a stop: 0, 1, or -1 with an error. */
static int
is_anything_held(struct service *service)
{
    Py_ssize_t waiting = PyObject_Size(service->held);

    if (waiting == 0)
        waiting = PyObject_Size(service->kept);
    return waiting < 0 ? -1 : waiting > 0;
}

/* Serve plain faults; return the first other stop or end, or None. */
static PyObject *
serve_faults(PyObject *Py_UNUSED(module), PyObject *plain)
{
    struct service service = {0};
    struct found found;
    PyObject *result = NULL, *thread;
    int events, status = find_objects(&service, plain);

    while (status == 0) {
        if ((status = is_anything_held(&service)) != 0) {
            if (status > 0)
                Py_INCREF(result = Py_None);
            break;
        }
        if (PyErr_CheckSignals() < 0 || (events = have_events(&service)) < 0)
            break;
        if ((status = wait_for(&service, events, &found)) != 0) {
            if (status > 0)
                Py_INCREF(result = Py_None);
            break;
        }
        if (found.is_event) {
            status = serve_event(&service, &found.event);
            continue;
        }
        thread = events ? NULL : stopped_thread(&service, &found);
        if (thread == NULL) {
            if (!PyErr_Occurred())
                result = Py_BuildValue("(iii)", found.tid, found.status, found.fetched);
            break;
        }
        status = serve(&service, thread, found.fetched);
    }
    release(&service, offsetof(struct service, epoll));
    return result;
}

static PyMethodDef functions[] = {
    {"serve_faults", serve_faults, METH_O,
     "serve_faults(plain): as PlainFaults.next()."},
    {NULL, NULL, 0, NULL},
};

int
add_plain_faults(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
