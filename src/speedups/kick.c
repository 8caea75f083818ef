/* What follows an EWB that comes too early: ETRACK, and interrupts of the processors that are inside.
 * As softsgx.paging.optimised.PlainSwap._try_again() and softsgx.driver.enclave.Enclave.kick(). */

#include "engine.h"
#include "hw.h"
#include "paging.h"

/* Do the last step of what has ended with a status, as a finally clause: its error replaces another. */
static int
at_last(int status, int (*last)(void *), void *object)
{
    PyObject *type, *error, *traceback;

    PyErr_Fetch(&type, &error, &traceback);
    if (last(object) == 0) {
        PyErr_Restore(type, error, traceback);
        return status;
    }
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    return -1;
}

/* --- interrupts --------------------------------------------------------------------------------- */

/* A walk over the address spaces of an enclave: SRCU, and the index of its readers. */
struct reading {
    Srcu *srcu;
    int64_t index;
};

static int
count_reader(const struct reading *reading, int64_t change)
{
    PyObject *readers = reading->srcu->_readers, *count;
    int64_t number;

    if (!integer(PyList_GetItem(readers, (Py_ssize_t)reading->index), &number)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "a number of readers is no integer");
        return -1;
    }
    count = PyLong_FromLongLong(number + change);
    return count == NULL ? -1 : PyList_SetItem(readers, (Py_ssize_t)reading->index, count);
}

/* As Srcu.leave(). */
static int
leave(void *object)
{
    struct reading *reading = object;
    PyObject *index;
    int status;

    if (is_false(reading->srcu->_turning))
        return count_reader(reading, -1);
    index = PyLong_FromLongLong(reading->index);
    status = index == NULL ? -1 : effect(CALL(reading->srcu, leave, index, NULL));
    Py_XDECREF(index);
    return status;
}

/* As Mm.unpin(). */
static int
unpin(void *object)
{
    Mm *mm = object;
    int64_t users;

    if (integer(mm->users, &users) && users > 1)
        return set_integer(&mm->users, users - 1);
    return effect(CALL0(mm, unpin));
}

/* Interrupt the processors in one address space, unless it has ended. */
static int
kick_space(Mm *mm)
{
    PyObject *ptes = mm->ptes;
    int64_t users;
    int status;

    if (!integer(mm->users, &users)) {
        PyErr_SetString(PyExc_TypeError, "a number of users is no integer");
        return -1;
    }
    if (!users)
        return 0;
    if (set_integer(&mm->users, users + 1) < 0)
        return -1;
    Py_INCREF(ptes);
    status = kick_threads(ptes);
    Py_DECREF(ptes);
    return at_last(status, unpin, mm);
}

/* Whether tasks take no turns here, so that no step waits. */
static bool
are_uninterleaved(const Srcu *srcu, PyObject *mms)
{
    if (srcu == NULL || !is_true(srcu->_uninterleaved) || !is_false(srcu->_gone)
        || !PyList_Check(srcu->_readers) || !PyTuple_Check(mms))
        return false;
    for (Py_ssize_t index = 0; index < PyTuple_Size(mms); index++) {
        const EnclaveMm *entry = AS(EnclaveMm, PyTuple_GetItem(mms, index));
        const Mm *mm = entry == NULL ? NULL : AS(Mm, entry->mm);

        if (mm == NULL || !is_true(mm->_uninterleaved))
            return false;
    }
    return true;
}

/* As Enclave.kick(). */
static int
kick(PyObject *object)
{
    Enclave *enclave = AS(Enclave, object);
    EnclaveCounts *counts = enclave == NULL ? NULL : AS(EnclaveCounts, enclave->counts);
    Driver *driver = enclave == NULL ? NULL : AS(Driver, enclave->driver);
    struct reading reading;
    PyObject *mms;
    Mm *mm;
    int status;

    if (counts == NULL || driver == NULL || !is_none(driver->tracer)
        || !are_uninterleaved(reading.srcu = AS(Srcu, enclave->srcu), enclave->mms)
        || !integer(reading.srcu->_index, &reading.index))
        return effect(CALL0(object, kick));
    Py_INCREF(mms = enclave->mms);
    HOLD(reading.srcu);
    status = add_to_field(&counts->kicks, 1) < 0 ? -1 : count_reader(&reading, 1);
    if (status == 0) {
        for (Py_ssize_t index = 0; status == 0 && index < PyTuple_Size(mms); index++) {
            HOLD(mm = (Mm *)((EnclaveMm *)PyTuple_GetItem(mms, index))->mm);
            status = kick_space(mm);
            RELEASE(mm);
        }
        status = at_last(status, leave, &reading);
    }
    RELEASE(reading.srcu);
    Py_DECREF(mms);
    return status;
}

/* --- EWB once more ------------------------------------------------------------------------------ */

/* A swapping that C code knows, with its counters and its SECS. */
struct eviction {
    CompiledSwap *swap;
    Counters *counters;
};

/* As EnclaveSwap._kick_cpus(). */
static int
kick_cpus(const struct eviction *eviction)
{
    PyObject *function = eviction->swap->_kick, *enclave;
    int status;

    if (add_to_field(&eviction->counters->kicks, 1) < 0)
        return -1;
    Py_INCREF(function);
    enclave = bound_to(function, given.kick_enclave);
    status = enclave != NULL  ? kick(enclave)
        : PyErr_Occurred() ? -1
                           : effect(PyObject_CallNoArgs(function));
    Py_XDECREF(enclave);
    Py_DECREF(function);
    return status;
}

/* As EnclaveSwap._etrack(): 1: the previous cycle is incomplete; 0: another result; -1: an error. */
static int
track(const struct eviction *eviction)
{
    CompiledSwap *swap = eviction->swap;
    SgxEpcPage *secs = AS(SgxEpcPage, swap->secs);
    PyObject *result;
    int incomplete;

    if (secs == NULL) {
        PyErr_SetString(PyExc_AssertionError, "the enclave has resident pages but no SECS");
        return -1;
    }
    if (add_to_field(&eviction->counters->etrack, 1) < 0 || add_to_field(&swap->etracks, 1) < 0)
        return -1;
    result = call_on_page(swap->_leaves, ETRACK, secs);
    if (result == NULL) {
        if (!PyErr_ExceptionMatches(given.Fault))
            return -1;
        PyErr_Clear();
        return 0;
    }
    incomplete = result == given.PREV_TRK_INCMPL;
    Py_DECREF(result);
    return incomplete;
}

/* As EnclaveSwap._start_epoch(). */
static int
start_epoch(const struct eviction *eviction)
{
    int incomplete = track(eviction);

    if (incomplete <= 0)
        return incomplete;
    if (add_to_field(&eviction->counters->prev_trk_incmpl, 1) < 0 || kick_cpus(eviction) < 0)
        return -1;
    return track(eviction) < 0 ? -1 : 0;
}

/* A swapping that C code knows, of a core without tracer, with a reference to its counters. */
static bool
known(PyObject *swap, struct eviction *eviction)
{
    EpcCore *core;

    eviction->swap = AS(CompiledSwap, swap);
    core = eviction->swap == NULL ? NULL : AS(EpcCore, eviction->swap->_core);
    if (core == NULL || !is_none(core->tracer) || !is_exactly(swap, given.CompiledSwap)
        || (eviction->counters = AS(Counters, eviction->swap->_counters)) == NULL)
        return false;
    HOLD(eviction->counters);
    return true;
}

int
swap_start_epoch(PyObject *swap)
{
    struct eviction eviction;
    int status;

    if (!known(swap, &eviction))
        return 0;
    status = start_epoch(&eviction);
    RELEASE(eviction.counters);
    return status < 0 ? -1 : 1;
}

int
swap_kick_cpus(PyObject *swap)
{
    struct eviction eviction;
    int status;

    if (!known(swap, &eviction))
        return effect(CALL0(swap, _kick_cpus));
    status = kick_cpus(&eviction);
    RELEASE(eviction.counters);
    return status;
}
