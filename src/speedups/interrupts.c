/* Interrupts of the threads of an address space of the native engine: as EnclavePageTable.kick(),
 * Loop.kick() and AsynchronousExits.interrupt(). */

#include "hw.h"
#include "plain_faults.h"

/* Whether a thread inside would resume at once: as AsynchronousExits.return_at_once(). */
static int
returns_at_once(PyObject *exits, PyObject *thread, PyObject *inside)
{
    int known = HAS(FaultingThread, thread, resumes, inside);

    return known ? known : is_so(CALL(exits, return_at_once, thread, NULL));
}

/* Whether the fault at hand is the exit of a thread: 0, 1, or -1 with an error. */
static int
is_at_fault(PyObject *thread)
{
    PyObject *image = GETF(FaultingThread, thread, image);
    int status = image == NULL ? -1 : HAS(FaultingImage, image, current, thread);

    if (status == 0)
        status = HAS(FaultingImage, image, faulting, thread);
    Py_XDECREF(image);
    return status;
}

/* Whether a processor's machine has no tracer: 0, 1, or -1 with an error. */
static int
has_no_tracer(PyObject *cpu)
{
    PyObject *hw = GETF(ProcessorMode, cpu, hw);
    int status = hw == NULL ? -1 : HAS(Machine, hw, tracer, Py_None);

    Py_XDECREF(hw);
    return status;
}

/* As AsynchronousExits.interrupt(). */
static int
interrupt(PyObject *exits, PyObject *thread, PyObject *cpu, PyObject *inside)
{
    int status = has_no_tracer(cpu), at_fault;

    if (status <= 0)
        return status < 0 ? -1 : is_so(CALL(exits, interrupt, thread, NULL));
    status = returns_at_once(exits, thread, inside);
    if (status > 0)
        status = try_virtual_exit(cpu);
    if (status <= 0)
        return status;
    at_fault = is_at_fault(thread);
    if (at_fault == 0 && count_exit(inside) < 0)
        at_fault = -1;
    return at_fault < 0 ? -1 : 1;
}

/* As Transitions.stays_inside(). */
static int
stays_inside(PyObject *transitions, PyObject *thread, PyObject *cpu, PyObject *inside)
{
    PyObject *exits;
    int status;

    if (!is_exactly(transitions, given.Transitions))
        return is_so(CALL(transitions, stays_inside, thread, NULL));
    exits = GET(transitions, exits);
    if (exits == NULL)
        return -1;
    status = is_exactly(exits, given.AsynchronousExits)
        ? interrupt(exits, thread, cpu, inside)
        : is_so(CALL(transitions, stays_inside, thread, NULL));
    Py_DECREF(exits);
    return status;
}

/* Make a thread leave its enclave, if it is in one. */
static int
kick_thread(PyObject *loop, PyObject *transitions, PyObject *thread)
{
    PyObject *cpu = GETF(FaultingThread, thread, cpu);
    PyObject *inside = cpu == NULL ? NULL : GETF(ProcessorMode, cpu, inside);
    int status = inside == NULL ? -1 : is_none(inside);

    if (status == 0)
        status = stays_inside(transitions, thread, cpu, inside);
    if (status == 0)
        status = effect(CALL(loop, _take_out, thread, NULL));
    Py_XDECREF(inside);
    Py_XDECREF(cpu);
    return status < 0 ? -1 : 0;
}

/* As Loop.kick(). */
static int
kick_image(PyObject *loop, PyObject *image)
{
    PyObject *permits = GET(loop, _permits), *transitions = NULL, *threads = NULL, *each = NULL;
    int status = permits == NULL ? -1 : settle(permits);

    if (status == 0 && (threads = GET(image, threads)) != NULL)
        each = PyMapping_Values(threads);
    if (each == NULL || (transitions = GET(loop, _transitions)) == NULL)
        status = -1;
    for (Py_ssize_t index = 0; status == 0 && index < PyList_Size(each); index++)
        status = kick_thread(loop, transitions, PyList_GetItem(each, index));
    Py_XDECREF(transitions);
    Py_XDECREF(each);
    Py_XDECREF(threads);
    Py_XDECREF(permits);
    return status;
}

/* Call kick_all() of a page table, which is Loop.kick with an address space. */
static int
kick_all(PyObject *function)
{
    PyObject *kick, *args, *loop = NULL;
    int status = 0;

    if (!is_exactly(function, given.partial))
        return effect(PyObject_CallNoArgs(function));
    kick = GET(function, func);
    args = GET(function, args);
    if (kick == NULL || args == NULL)
        status = -1;
    else if (PyTuple_Size(args) == 1)
        loop = bound_to(kick, given.kick_image);
    if (loop != NULL)
        status = kick_image(loop, PyTuple_GetItem(args, 0));
    else if (PyErr_Occurred())
        status = -1;
    else
        status = effect(PyObject_CallNoArgs(function));
    Py_XDECREF(loop);
    Py_XDECREF(args);
    Py_XDECREF(kick);
    return status;
}

int
kick_threads(PyObject *object)
{
    EnclavePageTable *table = (EnclavePageTable *)object;
    PyObject *function;
    int status;

    if (!is_exactly(object, given.EnclavePageTable))
        return effect(CALL0(object, kick));
    if (hide_unmapped(table->_store) < 0)
        return -1;
    Py_INCREF(function = table->kick_all);
    status = kick_all(function);
    Py_DECREF(function);
    return status;
}
