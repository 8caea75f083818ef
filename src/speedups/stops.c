/* ptrace(2), wait(2) and userfaultfd(2): what the tracer asks of the kernel at each stop or fault.
 *
 * The readable form is softsgx/engines/native/kernel.py. */

#include "engine.h"

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <sys/syscall.h>

#ifndef __WALL
#define __WALL 0x40000000
#endif

#define SYSCALL_STOP (SIGTRAP | 0x80)
#define SECCOMP_EVENT 7
#define SECOND_NS 1000000000u

/* The kernel's ptrace: glibc's takes variable arguments, and returns what PEEK requests read. */
long
ptrace_request(long what, pid_t tid, uint64_t address, uint64_t data)
{
    return syscall(SYS_ptrace, what, (long)tid, (long)address, (long)data);
}

int
continue_thread(int tid)
{
    return ptrace_request(PTRACE_CONT, tid, 0, 0) == -1 ? errno : 0;
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
    result = ptrace_request((long)values[0], (pid_t)values[1], values[2], values[3]);
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
    if (at_signal && ptrace_request(PTRACE_GETSIGINFO, tid, 0, addresses[1]) != -1) {
        fetched |= SIGNAL_INFORMATION;
        /* Faults on enclave memory are served without the registers. */
        if (signal == SIGBUS && ((siginfo_t *)(uintptr_t)addresses[1])->si_code == BUS_ADRERR)
            return fetched;
    }
    if (ptrace_request(PTRACE_GETREGS, tid, 0, addresses[0]) != -1)
        fetched |= REGISTERS;
    return fetched;
}

/* Wait for a stop or an end: 0, or -1 with an error. */
int
wait_for_stop(int options, PyObject *places, int *thread, int *status, int *fetched)
{
    pid_t tid;
    int code;

    *status = *fetched = 0;
    for (;;) {
        Py_BEGIN_ALLOW_THREADS
        tid = waitpid(-1, status, options | __WALL);
        code = errno;
        Py_END_ALLOW_THREADS
        if (tid >= 0)
            break;
        if (code != EINTR) {
            errno = code;
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
        if (PyErr_CheckSignals() < 0)
            return -1;
    }
    *thread = tid;
    if (tid == 0)
        *status = 0;
    else if (WIFSTOPPED(*status)) {
        *fetched = fetch(tid, *status, places);
        if (*fetched < 0)
            return -1;
    }
    return 0;
}

static PyObject *
next_stop(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    int tid, status, fetched;
    long options;

    if (count != 2 || !PyDict_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "next_stop() takes options and a dict");
        return NULL;
    }
    options = PyLong_AsLong(args[0]);
    if (options == -1 && PyErr_Occurred())
        return NULL;
    if (wait_for_stop((int)options, args[1], &tid, &status, &fetched) < 0)
        return NULL;
    return Py_BuildValue("(iii)", tid, status, fetched);
}

static uint64_t
monotonic_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

/* Wait for SIGCHLD or another one of ``signals``: its number, 0: it is ``due_ns``, or -1. */
static int
wait_for_signal(const sigset_t *signals, uint64_t due_ns)
{
    uint64_t now = monotonic_ns(), left_ns = due_ns > now ? due_ns - now : 0;
    struct timespec limit = {(time_t)(left_ns / SECOND_NS), (long)(left_ns % SECOND_NS)};
    int number, code;

    if (left_ns == 0)
        return 0;
    Py_BEGIN_ALLOW_THREADS
    number = sigtimedwait(signals, NULL, &limit);
    code = errno;
    Py_END_ALLOW_THREADS
    if (number > 0)
        return number;
    if (code == EAGAIN)
        return 0;
    if (code == EINTR)
        return PyErr_CheckSignals() < 0 ? -1 : SIGCHLD; /* look again */
    errno = code;
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
}

static PyObject *
next_stop_within(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    int tid, status, fetched, number = SIGCHLD;
    uint64_t values[2], due_ns;
    sigset_t signals;

    if (count != 3 || !PyDict_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "next_stop_within() takes two integers and a dict");
        return NULL;
    }
    if (read_words("next_stop_within", args, 2, values, 2) < 0)
        return NULL;
    due_ns = values[0] ? monotonic_ns() + values[0] : 0;
    sigemptyset(&signals);
    sigaddset(&signals, SIGCHLD);
    for (int bit = 0; bit < 64; bit++)
        if (values[1] >> bit & 1)
            sigaddset(&signals, bit + 1);
    for (;;) {
        if (wait_for_stop(WNOHANG, args[2], &tid, &status, &fetched) < 0)
            return NULL;
        if (tid)
            return Py_BuildValue("(iii)", tid, status, fetched);
        number = wait_for_signal(&signals, due_ns);
        if (number < 0)
            return NULL;
        if (number == 0 || values[1] >> (number - 1) & 1)
            return Py_BuildValue("(iii)", 0, number, 0);
    }
}

/* --- faults whose threads wait ------------------------------------------------------------------- */

#define WAKE 0x8010AA02
#define SIGNAL_BYTES 128

/* struct uffd_msg, of a page fault. */
struct message {
    uint8_t event, padding[7];
    uint64_t flags, address;
    uint32_t tid, more;
};

int
wait_for_fault(int epoll, int signals, int limit_ms, int first, struct fault_event *event)
{
    struct epoll_event ready = {0};
    struct message message;
    char information[SIGNAL_BYTES];
    int count, code;

    for (;;) {
        Py_BEGIN_ALLOW_THREADS
        ready.data.fd = first;
        count = first >= 0 ? 1 : epoll_wait(epoll, &ready, 1, limit_ms);
        first = -1;
        code = errno;
        if (count > 0) {
            if (ready.data.fd == signals)
                count = (int)read(signals, information, sizeof(information));
            else
                count = (int)read(ready.data.fd, &message, sizeof(message));
            code = errno;
        }
        else if (count == 0)
            ready.data.fd = signals;
        Py_END_ALLOW_THREADS
        if (count >= 0)
            break;
        if (code != EAGAIN && code != EINTR) { /* EAGAIN: none, or the thread has taken it back */
            errno = code;
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
        if (PyErr_CheckSignals() < 0)
            return -1;
    }
    if (ready.data.fd == signals)
        return 0;
    *event = (struct fault_event){ready.data.fd, (int)message.tid, message.address, message.flags};
    return 1;
}

static PyObject *
next_fault(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    struct fault_event event;
    uint64_t values[2];
    int epoll, status, first;

    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "next_fault() takes 4 arguments");
        return NULL;
    }
    first = (int)PyLong_AsLong(args[3]);
    if (PyErr_Occurred() || (epoll = PyObject_AsFileDescriptor(args[0])) < 0
        || read_words("next_fault", args + 1, 2, values, 2) < 0
        || (status = wait_for_fault(epoll, (int)values[0], (int)values[1], first, &event)) < 0)
        return NULL;
    if (status == 0)
        Py_RETURN_NONE;
    return Py_BuildValue("iiKK", event.uffd, event.tid, (unsigned long long)event.address,
                         (unsigned long long)event.flags);
}

int
wake_waiting(int uffd, uint64_t linaddr)
{
    uint64_t range[2] = {linaddr & PAGE_MASK, PAGE_BYTES};

    if (ioctl(uffd, WAKE, range) != -1)
        return 0;
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
}

static PyObject *
wake_page(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    uint64_t values[2];

    if (read_words("wake_page", args, count, values, 2) < 0
        || wake_waiting((int)values[0], values[1]) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"try_ptrace", (PyCFunction)(void (*)(void))try_ptrace, METH_FASTCALL,
     "try_ptrace(request, tid, address, data): the result, or -errno."},
    {"next_stop", (PyCFunction)(void (*)(void))next_stop, METH_FASTCALL,
     "next_stop(options, places): thread, status of wait(2), what was fetched."},
    {"next_stop_within", (PyCFunction)(void (*)(void))next_stop_within, METH_FASTCALL,
     "next_stop_within(limit_ns, signals, places): as next_stop(), for a time."},
    {"next_fault", (PyCFunction)(void (*)(void))next_fault, METH_FASTCALL,
     "next_fault(epoll, signals, limit_ms, first): userfaultfd, thread, address, flags; or None."},
    {"wake_page", (PyCFunction)(void (*)(void))wake_page, METH_FASTCALL,
     "wake_page(uffd, address): UFFDIO_WAKE of a page."},
    {NULL, NULL, 0, NULL},
};

int
add_stops(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
