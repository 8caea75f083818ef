/* Waiting for plain faults: as the waits of PlainFaults._next, Waits.next_or_fault and FaultEvents.wait. */

#include "plain_faults.h"

#include <sys/wait.h>

#define LONGEST_WAIT_MS 100
#define MOST_IN_A_ROW 16

int
find_events(struct service *service)
{
    PyObject *epoll;
    int64_t signals;

    if ((service->faults = GETF(Waits, service->waits, faults)) == NULL)
        return -1;
    if (is_none(service->faults))
        return 0;
    epoll = GETF(FaultEvents, service->faults, epoll);
    if (is_exactly(service->runtime, given.InlineRuntime)
        && ((service->ready = GETF(InlineRuntime, service->runtime, _ready)) == NULL
            || (service->lock_waiters = GETF(InlineRuntime, service->runtime, _lock_waiters)) == NULL
            || (service->timers = GETF(InlineRuntime, service->runtime, _timers)) == NULL)) {
        Py_XDECREF(epoll);
        return -1;
    }
    service->epoll = epoll == NULL ? -1 : PyObject_AsFileDescriptor(epoll);
    Py_XDECREF(epoll);
    if (service->epoll < 0 || GET_INTEGER(FaultEvents, service->faults, signals, &signals) < 0)
        return -1;
    service->signals = (int)signals;
    return 0;
}

/* Wait where the loop has something to do at a time: 0; 1: the wait has ended without an event; or
 * -1. */
static int
wait_in_python(struct service *service, struct found *found)
{
    PyObject *event = is_none(service->faults) ? CALL0(service->waits, next)
                                               : CALL0(service->waits, next_or_fault);
    unsigned long long address, flags;
    int done;

    if (event == NULL)
        return -1;
    if (is_none(event)) {
        Py_DECREF(event);
        return 1;
    }
    if (is_exactly(event, given.FaultEvent)) {
        found->is_event = true;
        done = PyArg_ParseTuple(event, "iiKK", &found->event.uffd, &found->event.tid, &address,
                                &flags);
        found->event.address = address;
        found->event.flags = flags;
    }
    else
        done = PyArg_ParseTuple(event, "iii", &found->tid, &found->status, &found->fetched);
    Py_DECREF(event);
    return done ? 0 : -1;
}

/* As FaultEvents.wait(). */
static int
wait_for_event(struct service *service, struct fault_event *event)
{
    FaultEvents *faults = (FaultEvents *)service->faults;
    int64_t latest, count;
    int status, first;

    if (!integer(faults->latest, &latest) || !integer(faults->in_a_row, &count)) {
        PyErr_SetString(PyExc_TypeError, "a number of faults is no integer");
        return -1;
    }
    first = count < MOST_IN_A_ROW ? (int)latest : -1;
    status = wait_for_fault(service->epoll, service->signals, LONGEST_WAIT_MS, first, event);
    if (status < 0)
        return -1;
    if (status == 0) {
        set_field(&faults->may_have_stopped, Py_True);
        return set_integer(&faults->latest, -1);
    }
    count = event->uffd == first ? count + 1 : 1;
    if (set_integer(&faults->in_a_row, count) < 0 || set_integer(&faults->latest, event->uffd) < 0)
        return -1;
    return 1;
}

/* As Waits.next_or_fault(), where faults are events: 0, or -1. */
static int
wait_for_either(struct service *service, struct found *found)
{
    int status;

    for (;;) {
        if ((status = GET_TRUTH(FaultEvents, service->faults, may_have_stopped)) < 0)
            return -1;
        if (status) {
            if (wait_for_stop(WNOHANG, service->places, &found->tid, &found->status,
                              &found->fetched) < 0)
                return -1;
            if (found->tid)
                return 0;
            set_field(&((FaultEvents *)service->faults)->may_have_stopped, Py_False);
        }
        status = wait_for_event(service, &found->event);
        found->is_event = status > 0;
        if (status)
            return status < 0 ? -1 : 0;
    }
}

int
wait_for(struct service *service, int events, struct found *found)
{
    int only = HAS(Waits, service->waits, look_ns, Py_None);

    *found = (struct found){0};
    if (events && !IS(FaultEvents, service->faults))
        only = only < 0 ? -1 : 0;
    if (only <= 0)
        return only < 0 ? -1 : wait_in_python(service, found);
    return events ? wait_for_either(service, found)
                  : wait_for_stop(0, service->places, &found->tid, &found->status, &found->fetched);
}
