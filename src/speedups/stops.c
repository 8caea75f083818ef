/* ptrace(2) and wait(2): what the tracer asks of the kernel at each stop.
 *
 * The readable form is softsgx/engines/native/kernel.py. */

#include "speedups.h"

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>
#include <sys/syscall.h>

#ifndef __WALL
#define __WALL 0x40000000
#endif

enum { REGISTERS = 1, SIGNAL_INFORMATION = 2 };

#define SYSCALL_STOP (SIGTRAP | 0x80)
#define SECCOMP_EVENT 7

/* The kernel's ptrace: glibc's takes variable arguments, and returns what PEEK requests read. */
static long
request(long what, pid_t tid, uint64_t address, uint64_t data)
{
    return syscall(SYS_ptrace, what, (long)tid, (long)address, (long)data);
}

static PyObject *
try_ptrace(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    uint64_t values[4];
    long result;
    int code;

    if (read_words("try_ptrace", args, count, values, 4) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    result = request((long)values[0], (pid_t)values[1], values[2], values[3]);
    code = errno;
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(result == -1 ? -code : result);
}

/* Fetch what handlers of a stop ask for in any case; return which of it, -1: a Python error. */
static int
fetch(pid_t tid, int status, PyObject *places)
{
    int signal = WSTOPSIG(status), event = status >> 16, fetched = 0;
    int at_signal = !event && signal != SYSCALL_STOP;
    PyObject *key, *place;
    uint64_t addresses[2];

    if (!at_signal && event != SECCOMP_EVENT)
        return 0;
    key = PyLong_FromLong(tid);
    if (key == NULL)
        return -1;
    place = PyDict_GetItemWithError(places, key);
    Py_DECREF(key);
    if (place == NULL)
        return PyErr_Occurred() ? -1 : 0;
    for (Py_ssize_t index = 0; index < 2; index++) {
        PyObject *number = PyTuple_GetItem(place, index);

        if (number == NULL)
            return -1;
        addresses[index] = PyLong_AsUnsignedLongLong(number);
        if (addresses[index] == (uint64_t)-1 && PyErr_Occurred())
            return -1;
    }
    if (at_signal && request(PTRACE_GETSIGINFO, tid, 0, addresses[1]) != -1) {
        fetched |= SIGNAL_INFORMATION;
        /* Faults on enclave memory are served without the registers. */
        if (signal == SIGBUS && ((siginfo_t *)(uintptr_t)addresses[1])->si_code == BUS_ADRERR)
            return fetched;
    }
    if (request(PTRACE_GETREGS, tid, 0, addresses[0]) != -1)
        fetched |= REGISTERS;
    return fetched;
}

static PyObject *
next_stop(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    pid_t tid;
    int status = 0, code, fetched = 0;
    long options;

    if (count != 2 || !PyDict_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "next_stop() takes options and a dict");
        return NULL;
    }
    options = PyLong_AsLong(args[0]);
    if (options == -1 && PyErr_Occurred())
        return NULL;
    for (;;) {
        Py_BEGIN_ALLOW_THREADS
        tid = waitpid(-1, &status, (int)options | __WALL);
        code = errno;
        Py_END_ALLOW_THREADS
        if (tid >= 0)
            break;
        if (code != EINTR) {
            errno = code;
            return PyErr_SetFromErrno(PyExc_OSError);
        }
        if (PyErr_CheckSignals() < 0)
            return NULL;
    }
    if (tid == 0)
        status = 0;
    else if (WIFSTOPPED(status)) {
        fetched = fetch(tid, status, args[1]);
        if (fetched < 0)
            return NULL;
    }
    return Py_BuildValue("(iii)", (int)tid, status, fetched);
}

static PyMethodDef functions[] = {
    {"try_ptrace", (PyCFunction)(void (*)(void))try_ptrace, METH_FASTCALL,
     "try_ptrace(request, tid, address, data): the result, or -errno."},
    {"next_stop", (PyCFunction)(void (*)(void))next_stop, METH_FASTCALL,
     "next_stop(options, places): thread, status of wait(2), what was fetched."},
    {NULL, NULL, 0, NULL},
};

int
add_stops(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
