/* Plain faults whose threads wait: as softsgx/engines/native/faults/plain.py, PlainFaults.resolve. */

#include "driver.h"
#include "plain_faults.h"

#include <stddef.h>

#define WRITE_PROTECTED 2

static PyObject *
as_object(const struct fault_event *event)
{
    return PyObject_CallFunction(given.FaultEvent, "iiKK", event->uffd, event->tid,
                                 (unsigned long long)event->address,
                                 (unsigned long long)event->flags);
}

/* Find what the thread of an event has; it has all of it until it ends. */
static int
know(struct service *service, PyObject *thread, const struct fault_event *event)
{
    struct known *known = &service->known;
    int direct;

    release(known, sizeof(*known));
    service->uffd = event->uffd;
    service->tid = event->tid;
    Py_INCREF(known->thread = thread);
    if ((known->key = PyLong_FromLong(event->tid)) == NULL
        || (known->image = GETF(FaultingThread, thread, image)) == NULL
        || (known->cpu = GETF(FaultingThread, thread, cpu)) == NULL
        || (known->hw = GETF(ProcessorMode, known->cpu, hw)) == NULL
        || (known->mm = GET(known->image, mm)) == NULL
        || (known->page_table = GETF(FaultingImage, known->image, page_table)) == NULL
        || (direct = has_mm_fault(known->mm)) < 0)
        return -1;
    service->direct = direct;
    return 0;
}

static bool
is_known(struct service *service, const struct fault_event *event)
{
    return service->known.thread != NULL && event->uffd == service->uffd
        && event->tid == service->tid;
}

/* As FaultEvents.thread(): a new reference; NULL: it has ended, or an error. */
static PyObject *
waiting_thread(struct service *service, const struct fault_event *event)
{
    bool known = is_known(service, event);
    PyObject *key = known ? service->known.key : PyLong_FromLong(event->tid), *thread, *object;
    int64_t own = 0;

    thread = key == NULL ? NULL : PyDict_GetItemWithError(service->threads, key);
    if (!known)
        Py_XDECREF(key);
    if (thread != NULL && known && thread == service->known.thread) {
        Py_INCREF(thread);
        return thread;
    }
    if (thread != NULL && get_integer(thread, names._own_tid, &own) == 0 && own == event->tid) {
        PyObject *images = GETF(FaultEvents, service->faults, images);
        PyObject *image = GETF(FaultingThread, thread, image);
        PyObject *uffd = PyLong_FromLong(event->uffd), *waited = NULL;

        if (images != NULL && uffd != NULL)
            waited = PyObject_GetItem(images, uffd);
        Py_XDECREF(waited);
        Py_XDECREF(image);
        Py_XDECREF(uffd);
        Py_XDECREF(images);
        if (waited != NULL && waited == image) {
            if (know(service, thread, event) < 0)
                return NULL;
            Py_INCREF(thread);
            return thread;
        }
    }
    if (PyErr_Occurred() || (object = as_object(event)) == NULL)
        return NULL;
    thread = CALL(service->faults, thread, object, NULL);
    Py_DECREF(object);
    if (thread == Py_None)
        Py_CLEAR(thread);
    return thread;
}

static int
stop_at(struct service *service, const struct fault_event *event)
{
    PyObject *object = as_object(event);
    int status = object == NULL ? -1 : effect(CALL(service->waits, stop_at, object, NULL));

    Py_XDECREF(object);
    return status;
}

/* Count and report the exit that is skipped: as AsynchronousExits.skip(). */
static int
skip(struct service *service, struct fault *fault)
{
    int plain = is_untraced(fault);

    if (plain < 0 || (!plain && show_late_page(&fault->late) < 0))
        return -1;
    if (!plain) {
        PyObject *exits = GET(service->transitions, exits);
        int status;

        if (exits == NULL)
            return -1;
        status = effect(CALL(exits, skip, fault->thread, given.PF, NULL));
        Py_DECREF(exits);
        return status;
    }
    return count_exit(fault->inside);
}

/* Resume the thread from a stop that no other code has seen. */
static int
resume(struct service *service, struct fault *fault)
{
    if (permits_going(service, fault) < 0 || SETF(FaultingThread, fault->thread, running, Py_True) < 0)
        return -1;
    return go(service, fault);
}

/* Let the thread continue, unless it was stopped meanwhile. */
static int
continue_it(struct service *service, struct fault *fault, const struct fault_event *event)
{
    int status;

    if (SETF(FaultingThread, fault->thread, spurious, given.NO_REPETITION) < 0 || skip(service, fault) < 0
        || (status = is_quiet(service)) < 0
        || (!status && (show_late_page(&fault->late) < 0
            || effect(CALL0(service->server, background)) < 0))
        || finish(service, fault) < 0)
        return -1;
    if (fault->stopped)
        return resume(service, fault);
    status = GET_TRUTH(FaultingThread, fault->thread, running);
    if (status <= 0)
        return status;
    if (permits_going(service, fault) < 0)
        return -1;
    status = wake_with_late_page(&fault->late);
    return status ? (status < 0 ? -1 : 0) : wake_waiting(event->uffd, event->address);
}

/* Let the driver resolve a plain fault, and wake the thread: 1, 0: it has to stop, or -1. */
static int
resolve(struct service *service, struct fault *fault, const struct fault_event *event)
{
    PyObject *result;
    bool expects;
    int status;

    if (ADD_INTEGER(PlainFaults, service->plain, served, 1) < 0
        || SETF(FaultingImage, fault->image, faulting, fault->thread) < 0
        || permits_settle(service) < 0)
        return -1;
    expects = expect_late_page(fault->page_table, event->uffd, fault->page);
    result = call_driver(fault, service->direct && fault->mm == service->known.mm);
    if (expects)
        take_late_page(&fault->late);
    if (result == NULL)
        return -1;
    status = GET_TRUTH(FaultingThread, fault->thread, running);
    if (status <= 0) { /* it was stopped meanwhile */
        Py_DECREF(result);
        return status < 0 ? -1 : 1;
    }
    status = result == given.NOPAGE || result == given.RETRY;
    Py_DECREF(result);
    if (!status)
        return 0;
    status = HAS(ProcessorMode, fault->cpu, inside, fault->inside);
    if (status == 0)
        PyErr_SetString(PyExc_AssertionError, "a thread has left its enclave without a stop");
    return status <= 0 || continue_it(service, fault, event) < 0 ? -1 : 1;
}

/* 1: the thread was woken, or was stopped meanwhile; 0: it has to stop; -1: an error. */
static int
attempt(struct service *service, struct fault *fault, const struct fault_event *event)
{
    int status;

    if (SETF(FaultingThread, fault->thread, unstoppable, Py_False) < 0
        || (status = find_inside(service, fault)) < 0)
        return -1;
    if (!status || event->flags & WRITE_PROTECTED)
        return 0;
    if (set_address(fault, event->address) < 0)
        return -1;
    if ((status = permits_have_slot(fault)) > 0
        && (status = is_plain(service, fault)) > 0)
        status = resolve(service, fault, event);
    return status;
}

/* As in Python: requests to the thread have to succeed when its process is ended. */
static int
failed_waiting(struct service *service, PyObject *thread)
{
    PyObject *type, *error, *traceback;

    PyErr_Fetch(&type, &error, &traceback);
    if (PyErr_GivenExceptionMatches(type, PyExc_Exception)
        && effect(CALL(service->server, hold, thread, NULL)) < 0) {
        Py_XDECREF(type);
        Py_XDECREF(error);
        Py_XDECREF(traceback);
        return -1;
    }
    PyErr_Restore(type, error, traceback);
    return failed(service, thread);
}

/* What is known of the thread of a fault. */
static void
take_known(struct service *service, struct fault *fault)
{
    struct known *known = &service->known;

    Py_INCREF(fault->image = known->image);
    Py_INCREF(fault->cpu = known->cpu);
    Py_INCREF(fault->hw = known->hw);
    Py_INCREF(fault->mm = known->mm);
    Py_INCREF(fault->page_table = known->page_table);
}

int
serve_event(struct service *service, const struct fault_event *event)
{
    struct fault fault = {.waits = true};
    PyObject *thread = waiting_thread(service, event), *type, *error, *traceback;
    int status;

    if (thread == NULL)
        return PyErr_Occurred() ? -1 : 0;
    fault.thread = thread;
    if (thread == service->known.thread && is_known(service, event))
        take_known(service, &fault);
    else
        fault.image = GETF(FaultingThread, thread, image);
    status = fault.image == NULL ? -1 : attempt(service, &fault, event);
    if (show_late_page(&fault.late) < 0) /* of a thread that is not woken */
        status = -1;
    if (status == 0)
        status = stop_at(service, event);
    if (status < 0)
        status = failed_waiting(service, thread);
    PyErr_Fetch(&type, &error, &traceback);
    if (fault.image != NULL && SETF(FaultingImage, fault.image, faulting, Py_None) < 0)
        status = -1;
    if (type != NULL)
        PyErr_Restore(type, error, traceback);
    release(&fault, offsetof(struct fault, late));
    return status < 0 ? -1 : 0;
}
