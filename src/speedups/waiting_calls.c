/* Entries of watched pages that are dropped by the thread of a fault, which waits for its page.
 *
 * As flush() of an address space, where no other thread uses it: the thread is stopped, executes
 * madvise(2) for each run of pages, and has its registers back.  What the loop does at the stop of a
 * thread that was held follows here as well, since it comes to no more than permits_going(). */

#include "driver.h"
#include "plain_faults.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef __WALL
#define __WALL 0x40000000
#endif

#define GETREGS 12
#define SETREGS 13
#define INTERRUPT 0x4207
#define PEEKSIGINFO 0x4209
#define GETSIGMASK 0x420A
#define SETSIGMASK 0x420B
#define MASK_BYTES 8

#define EVENT_STOP 128
#define INTERRUPTED (SIGTRAP | EVENT_STOP << 8) /* as waitid(2) reports it; wait4(2) by 8 bits more */
#define ALL_BUT_TRAP (~(UINT64_C(1) << (SIGTRAP - 1)))

#define DONTNEED_LOCKED 24
#define OUR_CALL UINT64_C(0x53584702CA110001) /* abi.py */
#define CALL_WORDS 7
#define CALL_BYTES (8 * CALL_WORDS)
#define MOST_CALLS (PAGE_BYTES / CALL_BYTES) /* in one table */
#define SYSCALL_BYTES 3 /* with the int3 */

/* The calls that a thread makes, and where the code for them is. */
struct calls {
    uint64_t (*words)[CALL_WORDS];
    size_t count;
    uint64_t start, end, table, mask;
    int memory;
    pid_t tid;
    struct user_regs_struct regs;
};

/* --- what is to be done ------------------------------------------------------------------------- */

/* Whether the thread is as it is while it runs, and nothing waits for its next stop: 0, 1, or -1. */
static int
is_usual_thread(struct service *service, PyObject *thread)
{
    PyObject *no[] = {names.kicked, names.in_call, names.mid_call, names.unstoppable, names._changed,
                      names._ended};
    PyObject *none[] = {names._elsewhere, names._next, names._new_xstate};
    int status = GET_TRUTH(FaultingThread, thread, running);

    for (size_t index = 0; status > 0 && index < sizeof no / sizeof *no; index++) {
        status = get_truth(thread, no[index]);
        status = status < 0 ? -1 : !status;
    }
    for (size_t index = 0; status > 0 && index < sizeof none / sizeof *none; index++)
        status = has(thread, none[index], Py_None);
    if (status > 0)
        status = (status = has_any(thread, names.pending)) < 0 ? -1 : !status;
    if (status > 0)
        status = (status = HAS_ANY(Waits, service->waits, asked)) < 0 ? -1 : !status;
    return status <= 0 ? status : PyObject_Size(service->kept) == 0;
}

/* Whether an address space has no thread but that one, and no calls are due or being collected. */
static int
is_usual_image(PyObject *image, PyObject *thread)
{
    PyObject *threads = NULL, *only;
    Py_ssize_t place = 0;
    int status = HAS(FaultingImage, image, current, Py_None);

    if (status > 0)
        status = (status = HAS_ANY(FaultingImage, image, _deferred_calls)) < 0 ? -1 : !status;
    if (status > 0)
        status = (status = get_truth(image, names._collecting)) < 0 ? -1 : !status;
    if (status > 0 && (threads = GET(image, threads)) == NULL)
        status = -1;
    if (status > 0)
        status = PyDict_Check(threads) && PyDict_Size(threads) == 1
            && PyDict_Next(threads, &place, NULL, &only) && only == thread;
    Py_XDECREF(threads);
    return status;
}

/* The calls of madvise(2) for a PageSet: 0, or -1 with an error. */
static int
find_calls(struct calls *calls, PyObject *watched)
{
    size_t count = (size_t)pages_in(watched);
    uint64_t *pages = pages_of(watched);
    struct run *runs = PyMem_Calloc(count, sizeof *runs);

    if (pages != NULL && runs != NULL) {
        calls->count = find_runs(pages, count, runs);
        calls->words = PyMem_Calloc(calls->count, CALL_BYTES);
    }
    for (size_t index = 0; calls->words != NULL && index < calls->count; index++)
        memcpy(calls->words[index],
               (const uint64_t[]){SYS_madvise, runs[index].start, runs[index].end - runs[index].start,
                                  DONTNEED_LOCKED, 0, 0, OUR_CALL},
               CALL_BYTES);
    PyMem_Free(runs);
    PyMem_Free(pages);
    if (calls->words != NULL)
        return 0;
    PyErr_NoMemory();
    return -1;
}

/* Find the code of our vDSO that makes the calls, as _make() of an address space. */
static int
find_code(struct calls *calls, struct fault *fault)
{
    PyObject *vdso = GET(fault->image, vdso), *memory = NULL;
    uint64_t base, inject_at;
    int64_t number;
    int status = -1;

    if (vdso != NULL && (memory = GET(fault->image, memory_fd)) != NULL
        && (calls->memory = PyObject_AsFileDescriptor(memory)) >= 0
        && get_integer(fault->thread, names.tid, &number) == 0
        && get_address(fault->thread, names.inject_at, &inject_at) == 0
        && get_address(fault->image, names.vdso_base, &base) == 0
        && get_address(vdso, names.calls, &calls->start) == 0
        && get_address(vdso, names.called, &calls->end) == 0
        && get_address(vdso, names.table, &calls->table) == 0) {
        calls->tid = (pid_t)number;
        calls->start += base;
        calls->end += base;
        calls->table += base;
        if (calls->count == 1) {
            calls->start = inject_at;
            calls->end = inject_at + SYSCALL_BYTES;
        }
        status = inject_at != 0;
    }
    Py_XDECREF(memory);
    Py_XDECREF(vdso);
    return status;
}

/* Whether the usual calls are due, and no others, and the thread can make them: 0, 1, or -1. */
static int
is_usual(struct service *service, struct fault *fault, struct calls *calls)
{
    UffdPager *pager = fault->waits ? usual_pager(fault->page_table) : NULL;
    int status;

    if (pager == NULL || !is_exactly(fault->image, given.ProcessImage)
        || !is_exactly(fault->thread, given.ProgramThread) || !IS(FaultEvents, service->faults))
        return PyErr_Occurred() ? -1 : 0;
    status = pages_in(pager->_watched) > 0;
    if (status > 0)
        status = is_usual_image(fault->image, fault->thread);
    if (status > 0)
        status = is_usual_thread(service, fault->thread);
    if (status > 0 && find_calls(calls, pager->_watched) < 0)
        status = -1;
    return status <= 0 ? status : find_code(calls, fault);
}

/* --- the thread's stops ------------------------------------------------------------------------- */

/* Wait until a thread of any program has stopped or ended; whether it is that one and has stopped so:
 * then its report is taken.  0, 1, or -1 with an error. */
static int
wait_for_status(pid_t tid, int expected)
{
    siginfo_t info = {0};
    int code, status = 0;

    for (;;) {
        Py_BEGIN_ALLOW_THREADS
        code = waitid(P_ALL, 0, &info, WEXITED | WSTOPPED | WNOWAIT | __WALL) == -1 ? errno : 0;
        Py_END_ALLOW_THREADS
        if (code != EINTR)
            break;
        if (PyErr_CheckSignals() < 0)
            return -1;
    }
    if (code || info.si_pid != tid || info.si_code != CLD_TRAPPED || info.si_status != expected)
        return 0;
    return waitpid(tid, &status, WNOHANG | __WALL) == tid && status == (expected << 8 | 0x7f);
}

/* Whether the signal of a fault is pending, as fault_waits() of threads. */
static bool
fault_waits(pid_t tid)
{
    static siginfo_t found[16];
    struct {
        uint64_t offset;
        uint32_t flags;
        int32_t count;
    } wanted = {0, 0, sizeof found / sizeof *found};
    long count = ptrace_request(PEEKSIGINFO, tid, (uint64_t)(uintptr_t)&wanted,
                                (uint64_t)(uintptr_t)found);

    for (long index = 0; index < count; index++)
        switch (found[index].si_signo) {
        case SIGILL:
        case SIGTRAP:
        case SIGBUS:
        case SIGFPE:
        case SIGSEGV:
            if (found[index].si_code > 0)
                return true;
        }
    return false;
}

/* Whether a thread has been stopped in the code of an enclave, so that the loop would not move it: 0,
 * 1, or -1 with an error. */
static int
is_in_enclave(struct fault *fault, const struct calls *calls)
{
    PyObject *rip = PyLong_FromUnsignedLongLong(calls->regs.rip), *stubs = NULL, *found = NULL;
    int status = -1;

    if (rip != NULL && (found = mapping_at(fault->mm, calls->regs.rip)) != NULL
        && (stubs = GET(fault->image, cpuid_stubs)) != NULL) {
        status = !is_none(found);
        if (status && !is_none(stubs) && (status = is_so(CALL(stubs, has_entry, rip, NULL))) >= 0)
            status = !status;
    }
    Py_XDECREF(stubs);
    Py_XDECREF(found);
    Py_XDECREF(rip);
    return status;
}

/* Let the loop see a stop that was taken: 0, or -1 with an error. */
static int
keep_status(struct service *service, const struct calls *calls)
{
    PyObject *tid = PyLong_FromLong(calls->tid), *status = PyLong_FromLong(INTERRUPTED << 8 | 0x7f);
    int done = tid == NULL || status == NULL
        ? -1
        : effect(CALL(service->waits, keep, tid, status, NULL));

    Py_XDECREF(status);
    Py_XDECREF(tid);
    return done;
}

/* Stop the thread, which waits for a page: 1; 0: flush() has to see to it; or -1 with an error. */
static int
stop_thread(struct service *service, struct fault *fault, struct calls *calls)
{
    int status;

    if (ptrace_request(INTERRUPT, calls->tid, 0, 0) == -1)
        return 0;
    if (show_late_page(&fault->late) < 0)
        return -1;
    status = wait_for_status(calls->tid, INTERRUPTED);
    if (status <= 0)
        return status;
    status = !fault_waits(calls->tid)
        && ptrace_request(GETREGS, calls->tid, 0, (uint64_t)(uintptr_t)&calls->regs) != -1;
    if (status)
        status = is_in_enclave(fault, calls);
    if (status > 0)
        return 1;
    return status < 0 || keep_status(service, calls) < 0 ? -1 : 0;
}

/* --- its calls ---------------------------------------------------------------------------------- */

/* Start the code that makes calls: whether the thread is still there. */
static bool
start(struct calls *calls, size_t first, size_t count)
{
    const uint64_t *words = calls->words[first];
    uint64_t mask = ALL_BUT_TRAP; /* the kernel resets the handler of a blocked signal that it forces */
    size_t bytes = CALL_BYTES * count;
    struct user_regs_struct regs = calls->regs;

    regs.rip = calls->start;
    regs.orig_rax = (unsigned long long)-1;
    regs.rbx = calls->table;
    regs.rbp = count;
    if (calls->count == 1) {
        regs.rbx = calls->regs.rbx;
        regs.rbp = calls->regs.rbp;
        regs.rax = words[0];
        regs.rdi = words[1];
        regs.rsi = words[2];
        regs.rdx = words[3];
        regs.r10 = words[4];
        regs.r8 = words[5];
        regs.r9 = words[6];
    }
    else if (pwrite(calls->memory, words, bytes, (off_t)calls->table) != (ssize_t)bytes)
        return false;
    return ptrace_request(GETSIGMASK, calls->tid, MASK_BYTES, (uint64_t)(uintptr_t)&calls->mask) != -1
        && ptrace_request(SETSIGMASK, calls->tid, MASK_BYTES, (uint64_t)(uintptr_t)&mask) != -1
        && ptrace_request(SETREGS, calls->tid, 0, (uint64_t)(uintptr_t)&regs) != -1
        && continue_thread(calls->tid) == 0;
}

/* Wait for the end of the code: 1; 0: the thread has stopped for something else; or -1. */
static int
arrive(const struct calls *calls)
{
    struct user_regs_struct regs;
    int status;

    while ((status = wait_for_status(calls->tid, SIGTRAP)) > 0) {
        if (ptrace_request(GETREGS, calls->tid, 0, (uint64_t)(uintptr_t)&regs) == -1)
            return 0; /* it has ended */
        if (regs.rip == calls->end)
            return 1;
        if (continue_thread(calls->tid)) /* a SIGTRAP of another origin, which is not blocked */
            return 0;
    }
    return status;
}

static bool
give_back(struct calls *calls)
{
    return ptrace_request(SETREGS, calls->tid, 0, (uint64_t)(uintptr_t)&calls->regs) != -1
        && ptrace_request(SETSIGMASK, calls->tid, MASK_BYTES, (uint64_t)(uintptr_t)&calls->mask) != -1;
}

/* Continue in Python where the thread has stopped for something else: as borrow(). */
static int
continue_otherwise(struct fault *fault, struct calls *calls)
{
    PyObject *regs = PyBytes_FromStringAndSize((const char *)&calls->regs, sizeof calls->regs);
    PyObject *end = PyLong_FromUnsignedLongLong(calls->end);
    PyObject *mask = PyLong_FromUnsignedLongLong(calls->mask);
    int status = regs == NULL || end == NULL || mask == NULL
        ? -1
        : effect(CALL(fault->thread, end_borrowed, regs, end, mask, NULL));

    Py_XDECREF(mask);
    Py_XDECREF(end);
    Py_XDECREF(regs);
    return status;
}

/* A request has failed: the thread has ended. */
static int
gone(struct fault *fault)
{
    if (effect(CALL0(fault->thread, sigmask)) == 0)
        PyErr_SetString(PyExc_OSError, "a request to a stopped thread has failed");
    return -1;
}

/* Let the thread make the calls: 0, or -1 with an error. */
static int
make(struct fault *fault, struct calls *calls)
{
    size_t count;
    int status = 0;

    for (size_t first = 0; status == 0 && first < calls->count; first += count) {
        count = calls->count - first < MOST_CALLS ? calls->count - first : MOST_CALLS;
        if (!start(calls, first, count))
            return gone(fault);
        status = arrive(calls);
        if (status == 0)
            status = continue_otherwise(fault, calls);
        else if (status > 0)
            status = give_back(calls) ? 0 : gone(fault);
    }
    return status;
}

/* The stops were taken, and perhaps SIGCHLD for others, too. */
static void
look_for_stops(struct service *service)
{
    char information[128];

    if (read(service->signals, information, sizeof information) < 0)
        errno = 0; /* there is none */
    set_field(&((FaultEvents *)service->faults)->may_have_stopped, Py_True);
}

int
drop_watched(struct service *service, struct fault *fault)
{
    struct calls calls = {0};
    UffdPager *pager;
    int status = is_usual(service, fault, &calls);

    if (status > 0 && (status = stop_thread(service, fault, &calls)) > 0) {
        fault->stopped = true;
        pager = pager_of(fault->page_table);
        map_clear(pager->_present);
        set_clear(pager->_watched);
        status = SETF(FaultingThread, fault->thread, running, Py_False) < 0
                || SET(fault->thread, _kept, Py_None) < 0 || make(fault, &calls) < 0
            ? -1
            : 1;
        look_for_stops(service);
    }
    PyMem_Free(calls.words);
    return status;
}
