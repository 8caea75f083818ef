/* Crossings that no stop has shown: as softsgx/engines/native/vdso/permits.py, at a plain fault. */

#include "plain_faults.h"

/* The quadwords of the gate of a slot and behind it; NULL with an error. */
static volatile uint64_t *
gate_of(PyObject *slot)
{
    uint64_t at;

    return GET_ADDRESS(Slot, slot, gate_at, &at) < 0 ? NULL : (volatile uint64_t *)(uintptr_t)at;
}

/* The slot of the TCS by which a thread is inside: a new reference; NULL, and no error: there is none.  A
 * TCS keeps its slot as long as the address space exists. */
static PyObject *
find_slot(struct service *service, struct fault *fault)
{
    struct known *known = &service->known;
    PyObject *table, *slots = NULL, *tcs = NULL, *slot = NULL;

    if (known->slot != NULL && known->image == fault->image && known->inside == fault->inside) {
        Py_INCREF(known->slot);
        return known->slot;
    }
    if ((table = GETF(FaultingImage, fault->image, permits)) == NULL)
        return NULL;
    if (!is_none(table) && !is_none(fault->inside)
        && (slots = GETF(PermitTable, table, _slots)) != NULL
        && (tcs = GETF(EnclaveMode, fault->inside, tcs_linaddr)) != NULL) {
        if (PyDict_Check(slots))
            slot = PyDict_GetItemWithError(slots, tcs);
        else
            PyErr_SetString(PyExc_TypeError, "slots of permits are in no dict");
    }
    Py_XINCREF(slot);
    if (slot != NULL && known->image == fault->image) {
        Py_INCREF(slot);
        replace(&known->slot, slot);
        Py_INCREF(fault->inside);
        replace(&known->inside, fault->inside);
    }
    Py_XDECREF(tcs);
    Py_XDECREF(slots);
    Py_DECREF(table);
    return slot;
}

/* Whether a thread has been inside alone since its gate was opened: as has_only() of slots. */
static int
has_only(PyObject *slot, PyObject *thread)
{
    int status = IS(Slot, slot) ? ((Slot *)slot)->inside == thread
                                : has(slot, names.inside, thread);
    volatile uint64_t *gate;
    uint64_t opened;

    if (status <= 0)
        return status;
    gate = gate_of(slot);
    return gate == NULL || GET_ADDRESS(Slot, slot, opened, &opened) < 0 ? -1 : *gate == opened;
}

/* Record the slot whose gate only the thread can use, if it has one open: as Permits.report(). */
static int
is_unused(struct service *service, struct fault *fault)
{
    PyObject *slot = find_slot(service, fault);
    int status;

    if (slot == NULL)
        return PyErr_Occurred() ? -1 : 0;
    status = PySet_Contains(service->open, slot);
    if (status > 0)
        status = has_only(slot, fault->thread);
    if (status > 0 && PyDict_SetItem(service->unused, fault->thread, slot) < 0)
        status = -1;
    if (status > 0)
        fault->slot = slot;
    else
        Py_DECREF(slot);
    return status;
}

/* As Permits.report(). */
int
permits_report(struct service *service, struct fault *fault)
{
    if (PySet_Size(service->open) > 0) {
        int unused = is_unused(service, fault);

        if (unused < 0)
            return -1;
        if (!unused)
            return effect(CALL(service->permits, report, fault->thread, NULL));
    }
    return SETF(UnseenCrossings, service->permits, _exited, Py_None);
}

/* As Permits.settle(). */
int
permits_settle(struct service *service)
{
    PyObject *slot;
    Py_ssize_t place = 0;
    uint64_t offset, closed;

    if (PySet_Size(service->open) > PyDict_Size(service->unused)
        || PySet_Size(service->recorded) > 0)
        return effect(CALL0(service->permits, settle));
    if (!address(given.exited_word, &offset) || !address(given.closed_behind, &closed)) {
        PyErr_SetString(PyExc_TypeError, "the layout of slots was not given");
        return -1;
    }
    while (PyDict_Next(service->unused, &place, NULL, &slot)) {
        volatile uint64_t *gate = gate_of(slot);

        if (gate == NULL)
            return -1;
        gate[offset] = closed;
    }
    return SETF(UnseenCrossings, service->permits, _exited, Py_None);
}

int
settle(PyObject *permits)
{
    struct service service = {.permits = permits};
    int status = -1;

    if (!is_exactly(permits, given.Permits))
        return effect(CALL0(permits, settle));
    if ((service.open = GETF(UnseenCrossings, permits, _open)) != NULL
        && (service.unused = GETF(UnseenCrossings, permits, _unused)) != NULL
        && (service.recorded = GETF(UnseenCrossings, permits, _recorded)) != NULL)
        status = permits_settle(&service);
    Py_XDECREF(service.recorded);
    Py_XDECREF(service.unused);
    Py_XDECREF(service.open);
    return status;
}

/* Whether the EEXIT of a thread would stop in any case, so that its gate stays closed: 0, 1, or -1 with
 * an error. */
static int
stops_at_exit(struct fault *fault)
{
    PyObject *table = GETF(FaultingImage, fault->image, permits), *slots, *slot;
    EnclaveMode *inside = AS(EnclaveMode, fault->inside);
    EnclaveMemory *memory;
    int status = table == NULL ? -1 : 0;

    if (inside != NULL && table != NULL && (slots = GETF(PermitTable, table, _slots)) != NULL) {
        slot = PyDict_Check(slots) ? PyDict_GetItemWithError(slots, inside->tcs_linaddr) : NULL;
        if (IS(Slot, slot) && ((Slot *)slot)->enclave == inside->enclave) {
            memory = AS(EnclaveMemory, ((Slot *)slot)->memory);
            status = memory == NULL ? is_none(((Slot *)slot)->memory)
                                    : PyDict_Check(memory->jumps) && !PyDict_Size(memory->jumps);
        }
        Py_DECREF(slots);
    }
    Py_XDECREF(table);
    return PyErr_Occurred() ? -1 : status;
}

/* As Permits.going(). */
int
permits_going(struct service *service, struct fault *fault)
{
    int status = HAS(FaultingImage, fault->image, permits, Py_None);
    PyObject *slot;

    if (status)
        return status < 0 ? -1 : 0;
    slot = PyDict_GetItemWithError(service->unused, fault->thread);
    if (slot == NULL && PyErr_Occurred())
        return -1;
    if (slot != NULL) {
        status = IS(Slot, slot) ? ((Slot *)slot)->stay == fault->inside
                                : has(slot, names.stay, fault->inside);
        if (status > 0)
            status = HAS(FaultingThread, fault->thread, blocked, Py_None);
        if (status < 0)
            return -1;
        if (status)
            return PyDict_DelItem(service->unused, fault->thread);
    }
    else if ((status = stops_at_exit(fault)) != 0)
        return status < 0 ? -1 : 0;
    if (show_late_page(&fault->late) < 0)
        return -1;
    return effect(CALL(service->permits, going, fault->thread, NULL));
}

/* As Permits.has_slot(). */
int
permits_have_slot(struct fault *fault)
{
    PyObject *table, *slots = NULL, *tcs = NULL;
    int status = -1;

    if (fault->slot != NULL)
        return 1;
    if ((table = GETF(FaultingImage, fault->image, permits)) == NULL)
        return -1;
    if (is_none(table))
        status = 1;
    else if ((slots = GETF(PermitTable, table, _slots)) != NULL
             && (tcs = GETF(EnclaveMode, fault->inside, tcs_linaddr)) != NULL)
        status = PyMapping_HasKey(slots, tcs);
    Py_XDECREF(tcs);
    Py_XDECREF(slots);
    Py_DECREF(table);
    return status;
}
